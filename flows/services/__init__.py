"""Prefect's server, workers and MLflow as processes that outlive the command."""
