"""From logits to log-probs of responses; R response tokens, N responses, V vocabulary."""

import torch
from torch import Tensor

from recipe.spin.core_algos import sequence_logps, wpo_weights
from recipe.spin.engine.rows import pad_parts

CHUNK = 128  # tokens whose logits are in fp32 at a time


def token_logps(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of each label under softmax(logits / temperature), computed in fp32: (R, V), (R,) -> (R,).

    The gradient is written over the logits, so that backward holds no second (R, V) tensor: use the logits for nothing
    after this."""
    return _TokenLogps.apply(logits, labels, temperature)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        ctx.temperature = temperature
        picked, normalizers = [], []
        for part, chosen in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
            scaled = part.float() / temperature if temperature != 1.0 else part.float()
            picked.append(scaled.gather(1, chosen[:, None]).squeeze(1))
            normalizers.append(scaled.logsumexp(1))
        ctx.save_for_backward(logits, labels, normalizer := torch.cat(normalizers))
        return torch.cat(picked) - normalizer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, normalizer = ctx.saved_tensors
        parts = zip(*(tensor.split(CHUNK) for tensor in (logits, labels, normalizer, gradient)), strict=True)
        for part, chosen, constant, slope in parts:
            # d log p(label) / d logits = (one-hot - p) / temperature
            scaled = part.float() / ctx.temperature if ctx.temperature != 1.0 else part.float()
            probs = torch.sub(scaled, constant[:, None]).exp_()
            probs.mul_(-slope[:, None] / ctx.temperature)
            probs.scatter_add_(1, chosen[:, None], slope[:, None] / ctx.temperature)
            part.copy_(probs)
        return logits, None, None


@torch.no_grad()
def token_entropies(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), computed in fp32: (R, V) -> (R,)."""
    entropies = []
    for part in logits.split(CHUNK):
        logps = (part.float() / temperature).log_softmax(-1)
        entropies.append(-(logps.exp() * logps).sum(-1))
    return torch.cat(entropies)


@torch.no_grad()
def token_log_expected_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log sum_v p(v)^2 of p = softmax(logits / temperature), computed in fp32: (R, V) -> (R,)."""
    parts = [(part.float() / temperature).log_softmax(-1).mul_(2).logsumexp(-1) for part in logits.split(CHUNK)]
    return torch.cat(parts)


def response_values(token_values: Tensor, mask: Tensor, lengths: list[int], average: bool) -> Tensor:
    """Sum, or with `average` the mean, of each response's token values that count: (R,), (R,) -> (N,).

    This is where token log-probs become log-probs of responses (core_algos.sequence_logps)."""
    values, counted = (pad_parts(tensor, lengths) for tensor in (token_values, mask))
    return sequence_logps(values, counted, average=average)


def response_weights(token_values: Tensor, log_expected_probs: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    """WPO's weight of each response (core_algos.wpo_weights): (R,) each -> (N,)."""
    return wpo_weights(*(pad_parts(tensor, lengths) for tensor in (token_values, log_expected_probs, mask)))
