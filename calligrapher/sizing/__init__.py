"""How large a model is and what a forward pass holds in memory, without loading it."""
