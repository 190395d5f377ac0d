"""Rewards in, better weights out."""
