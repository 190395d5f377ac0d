"""FLUX.1-Fill with the style adapter: loaded, asked for a velocity, saved."""
