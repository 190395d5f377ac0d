"""The commands `data check` and `data make`."""
