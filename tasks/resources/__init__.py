"""What stages work with, loaded once per process."""
