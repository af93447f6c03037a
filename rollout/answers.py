"""What a step's responses look like: whether they ended by themselves, what they scored, the metrics of both."""

from numbers import Real

import numpy as np
import torch
from tensordict import TensorDict

from recipe.spin.core_algos import has_score
from recipe.spin.engine.rows import pad_rows
from recipe.spin.preferences.reward_error import RewardError
from recipe.spin.rollout.scoring import FAULT

# What is said of steps without a pair
NO_PAIR = "no prompt has two responses to tell apart: they tie, or were left out"
PAIR_REMEDY = (
    "Give the reward or the judge more grades, sample more responses (actor_rollout_ref.rollout.n), or take prompts "
    "that are neither too hard nor too easy"
)


def ended(responses: list[torch.Tensor], end_tokens: set[int]) -> torch.Tensor:
    """Which of N responses, given as tokens, ended by themselves (N,)."""
    return torch.tensor([len(tokens) > 0 and tokens[-1].item() in end_tokens for tokens in responses])


def count_missing(rewards: torch.Tensor, extra: list[dict]) -> int:
    """How many of N responses the reward gave no score; rewards (N, T) are NaN there, and `extra` says why.

    Raises:
        RewardError: when none has one.
    """
    missing = ~has_score(rewards)
    if missing.all():
        faults = [fields[FAULT] for fields in extra if FAULT in fields]
        raise RewardError(f"no response has a score. The first: {' '.join(faults[:1])}")
    return int(missing.sum())


def response_metrics(
    rewards: torch.Tensor, mask: torch.Tensor, ended: torch.Tensor, responses: TensorDict, extra: list[dict]
) -> dict[str, float]:
    """Metrics over N responses from rewards and mask (N, T), which of them `ended` (N,), and their extra fields."""
    scores, lengths, scored = (rewards * mask).sum(-1), mask.sum(-1), has_score(rewards)
    scores = scores[scored]
    metrics = {
        "score/mean": scores.mean().item(),
        "score/std": scores.std(correction=0).item(),
        "response_length/mean": lengths.float().mean().item(),
        "response_length/max": lengths.max().item(),
        "response/end_token_rate": ended.float().mean().item(),
    }
    if "rollout_log_probs" in responses:
        # the mean of -log p over sampled tokens estimates the entropy per token without another forward pass
        log_probs = pad_rows(responses["rollout_log_probs"])
        metrics["rollout/entropy"] = (-(log_probs * mask).sum() / mask.sum()).item()
    info = [fields.get("reward_extra_info", {}) for fields, found in zip(extra, scored, strict=True) if found]
    if info and all("acc" in one and "score" in one for one in info):  # verl calls a plain number `acc` as well
        metrics["score/accuracy"] = float(np.mean([one["acc"] for one in info]))
    return metrics | named_rewards(info)


def named_rewards(info: list[dict]) -> dict[str, float]:
    """Means of the numbers that a reward function returned beside `score` and `acc`, by its names for them.

    Each over the responses for which it returned that name; a name with anything but numbers is left out.
    """
    names = set().union(*info) - {"score", "acc"}
    values = {name: [one[name] for one in info if name in one] for name in sorted(names)}
    return {f"reward/{name}": float(np.mean(found)) for name, found in values.items() if are_numbers(found)}


def are_numbers(values: list) -> bool:
    """Whether a metric can be made of what a reward returned by a name."""
    return all(isinstance(value, Real | np.bool_) for value in values)
