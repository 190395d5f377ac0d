"""Servers as processes: one, one per GPU, one for a with-block."""
