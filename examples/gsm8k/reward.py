"""The reward of the GSM8K example: is the number after the response's last `####` the answer?"""

import re
from decimal import Decimal
from typing import Any

ANSWER = re.compile(r"####\s*\$?\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)")


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """`score` and `acc` are 1 if the number after the last `####` equals the answer, else 0.

    Thousands separators do not count, nor do zeros after the point: 1,000.00 is 1000. A response without `#### N` is
    wrong, whatever it says elsewhere.
    """
    answers = ANSWER.findall(solution_str)
    acc = float(bool(answers) and Decimal(answers[-1].replace(",", "")) == Decimal(ground_truth.replace(",", "")))
    return {"score": acc, "acc": acc}
