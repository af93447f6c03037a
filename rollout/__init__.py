"""How prompts reach vLLM and how the answers come back."""
