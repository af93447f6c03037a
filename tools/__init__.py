"""Commands of their own, beside training."""
