"""Runs as one HTML file: no server, no network; everything that it shows is inside."""
