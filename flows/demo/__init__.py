"""The page of `calligrapher demo`."""
