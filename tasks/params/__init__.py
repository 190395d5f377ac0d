"""One YAML file is one experiment, checked as a whole before anything starts."""
