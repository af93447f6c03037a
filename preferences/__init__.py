"""Who prefers: where the pairs that a step trains on come from."""
