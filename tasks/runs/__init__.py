"""A run at work: makes artifacts in order, goes on, forks, prunes."""
