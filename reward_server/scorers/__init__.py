"""What measures a picture: one file or folder each."""
