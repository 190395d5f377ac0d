"""The embedded world: a small Calligrapher that has learned to write, and the pictures it learned
from."""
