"""How a stage call reaches the process or processes that do it."""
