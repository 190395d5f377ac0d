"""Which weights a name means, and in which format they are written."""
