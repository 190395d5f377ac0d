"""The command `calligrapher`."""
