"""What a run takes, reckoned before a GPU is there."""
