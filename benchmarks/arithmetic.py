"""Floating-point operations of a transformer's passes over what is really computed, from its configuration alone."""

from dataclasses import dataclass

from recipe.spin.checks.memory import Model


@dataclass(frozen=True)
class Work:
    """What a forward pass computes: tokens through layers, keys summed over queries, rows through the vocabulary."""

    tokens: int
    attended: int
    logits: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.attended + other.attended, self.logits + other.logits)


def forward_flop(model: Model, work: Work) -> float:
    """Floating-point operations of one forward pass; a multiplication with its addition counts as two."""
    linear = 2 * work.tokens * model.layers * model.layer_parameters
    attention = 4 * work.attended * model.layers * model.heads * model.head_size  # scores, and their mean of values
    return linear + attention + 2 * work.logits * model.hidden * model.vocabulary


def update_flop(model: Model, work: Work) -> float:
    """Forward and backward, which differentiates by inputs and by weights; nothing recomputed."""
    return 3 * forward_flop(model, work)


def causal(tokens: int, before: int = 0) -> int:
    """Keys that `tokens` queries in a row see, `before` tokens standing before them."""
    return tokens * before + tokens * (tokens + 1) // 2


def necessary(rows: list[tuple[int, list[int]]]) -> Work:
    """The least that log-probs take: rows of a prompt's length and its responses', the prompt once for all of them."""
    total = Work(0, 0, 0)
    for prompt, responses in rows:
        attended = causal(prompt) + sum(causal(response, prompt) for response in responses)
        total += Work(prompt + sum(responses), attended, sum(responses))
    return total


def sampling(rows: list[tuple[int, list[int]]]) -> Work:
    """The least that sampling takes: every token but a response's last is an input, every response token a draw."""
    total = Work(0, 0, 0)
    for prompt, responses in rows:
        inputs = [max(response - 1, 0) for response in responses]
        attended = causal(prompt) + sum(causal(count, prompt) for count in inputs)
        total += Work(prompt + sum(inputs), attended, sum(responses))
    return total
