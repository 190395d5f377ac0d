"""A model opened to paint with."""
