"""Everything that knows Prefect, and the ways in: commands, deployments, the page."""
