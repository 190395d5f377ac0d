"""`metrics.jsonl` is the truth, trackers show it; no other folder knows MLflow and its like."""
