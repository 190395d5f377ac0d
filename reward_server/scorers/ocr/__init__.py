"""What stands in a picture: read, compared with the target, and how likely the target is."""
