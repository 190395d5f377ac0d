"""Whether a machine can do a run, asked before the run is started."""
