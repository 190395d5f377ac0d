"""Cases and pictures: read, checked, laid on the canvas."""
