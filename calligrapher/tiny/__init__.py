"""The embedded world: a small Calligrapher that can write, and the pictures it learned from."""
