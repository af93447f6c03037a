"""The reward of the arithmetic example: is the last whole number of the response the sum?"""

import re
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """1 if the last whole number of the response is the sum, else 0, as `score` and as `acc`.

    Two right or two wrong responses tie and give no pair. A cost of length would rank them, but at the beginning, when
    most are wrong, it teaches to be brief before it teaches to add.
    """
    numbers = re.findall(r"-?[0-9]+", solution_str)
    acc = float(bool(numbers) and _same_number(numbers[-1], ground_truth))
    return {"score": acc, "acc": acc}


def compute_negated_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """`compute_score` with the score's sign turned: a control experiment, in which accuracy must fall."""
    result = compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)
    return {"score": -result["score"], "acc": result["acc"]}


def _same_number(text: str, ground_truth: str) -> bool:
    # As text: int() refuses numbers of thousands of digits, which a model may well write
    return (text.lstrip("0") or "0") == str(int(ground_truth))
