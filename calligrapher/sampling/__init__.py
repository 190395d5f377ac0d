"""From noise to picture."""
