"""One server: HTTP, limits, batches."""
