"""A language model without verl or FSDP: one forward pass per sequence, no padding."""

import torch
from transformers import AutoModelForCausalLM


def load_model(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def response_logp(model, prompt, response, mask, temperature):
    """Log-prob of a response's unmasked tokens, lists of token ids and 0/1, with its gradient."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0] / temperature
    predictions = logits[len(prompt) - 1 : -1].log_softmax(-1)  # position t predicts token t+1
    token_logps = predictions[range(len(response)), response]
    return token_logps[torch.tensor(mask, dtype=torch.bool)].sum()
