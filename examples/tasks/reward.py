"""The reward of the small tasks: is the last number or word of the response the answer?"""

import re
from typing import Any

from recipe.spin.examples.arithmetic.reward import compute_score as number_score


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """1 if the response ends with the ground truth, else 0, as `score` and as `acc`.

    A ground truth of digits is compared with the last whole number, as in the arithmetic example; of words, with the
    last word, whatever its case, one of those between which | stands being enough.
    """
    if ground_truth.isdigit():
        return number_score(data_source, solution_str, ground_truth, extra_info, **kwargs)
    words = re.findall(r"[^\W\d_]+", solution_str.lower())
    acc = float(bool(words) and words[-1] in ground_truth.split("|"))
    return {"score": acc, "acc": acc}
