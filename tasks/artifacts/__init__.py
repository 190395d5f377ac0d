"""What is on disk: built once, whole or not at all, found again by provenance."""
