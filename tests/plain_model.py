"""A language model without verl or FSDP: one forward pass per sequence, no padding."""

import torch
from transformers import AutoModelForCausalLM

# Of the training that the worker's is compared with. AdamW divides by the gradient's own size: at eps=1e-8 it would
# blow rounding noise in near-zero gradients up to whole steps of lr. With eps near the gradients' size a step is a
# smooth function of the gradient.
LEARNING_RATE, EPS, WEIGHT_DECAY = 1e-2, 1e-2, 0.01
REFRESH_AT = 3  # the step before which the reference is refreshed


def load_model(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def _predictions(model, prompt, response, temperature):
    """Log-probs (T, V) of what may stand at each place of the response."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0] / temperature
    return logits[len(prompt) - 1 : -1].log_softmax(-1)  # position t predicts token t+1


def response_logp(model, prompt, response, mask, temperature):
    """Log-prob of a response's unmasked tokens, lists of token ids and 0/1, with its gradient."""
    token_logps = _predictions(model, prompt, response, temperature)[range(len(response)), response]
    return token_logps[torch.tensor(mask, dtype=torch.bool)].sum()


def response_tokens(model, prompt, response, mask, temperature):
    """Log-probs of a response's unmasked tokens (T,), with their gradient, and the probability that a token drawn in
    the place of each would have in the mean (T,)."""
    counted = torch.tensor(mask, dtype=torch.bool)
    predictions = _predictions(model, prompt, response, temperature)
    expected = (predictions.detach().exp() ** 2).sum(-1)
    return predictions[range(len(response)), response][counted], expected[counted]


@torch.no_grad()
def response_entropy(model, prompt, response, mask, temperature):
    """Mean entropy of the distributions that a response's unmasked tokens were drawn from; 0 without tokens."""
    logps = _predictions(model, prompt, response, temperature)[torch.tensor(mask, dtype=torch.bool)]
    return -(logps.exp() * logps).sum(-1).mean() if len(logps) else torch.zeros(())
