"""`metrics.jsonl` is the truth, MLflow its mirror; the only folder that knows MLflow."""
