"""A checkpoint looked at more closely, and compared with earlier ones."""
