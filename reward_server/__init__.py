"""The reward service and its client; stands alone, without the other packages."""
