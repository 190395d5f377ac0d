"""The stages, and everything about runs; knows no Prefect."""
