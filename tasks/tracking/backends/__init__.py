"""A file for each tracker, named as in `tracking.backends`: a class `Backend`, a `Mirror`."""
