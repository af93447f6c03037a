"""Makes the data set of the arithmetic example: sums of two small numbers, in verl's format.

    python -m recipe.spin.examples.arithmetic.prepare --output DIR [--seed 0] [--test-size 100] [--train-size N]
        [--max-operand 20]

Writes train.parquet and test.parquet. A question that is held out is not trained on the other way round either:
if 3 + 5 is in the test set, 5 + 3 is not in the training set. The same arguments give the same rows.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from recipe.spin.tools.data_sets import write_splits

Pair = tuple[int, int]


def split_pairs(seed: int, test_size: int, train_size: int | None, max_operand: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs (a, b) of numbers up to max_operand, with no sum in both; None takes all the rest."""
    rng = random.Random(seed)
    unordered = [(a, b) for a in range(max_operand + 1) for b in range(a, max_operand + 1)]
    rng.shuffle(unordered)
    test: list[Pair] = []
    rest: list[Pair] = []
    for a, b in unordered:
        (test if len(test) < test_size else rest).extend(sorted({(a, b), (b, a)}))
    # A mirror image too many goes to neither set
    del test[test_size:]
    wanted = len(rest) if train_size is None else train_size
    if not 0 < test_size == len(test) or not 0 < wanted <= len(rest):
        raise ValueError(
            f"the {(max_operand + 1) ** 2} sums of numbers up to {max_operand} cannot give {test_size} held-out and "
            f"{'any' if train_size is None else train_size} training ones that share none. Both must be at least 1; "
            "lower --test-size or --train-size, or raise --max-operand."
        )
    rng.shuffle(rest)
    rng.shuffle(test)
    return rest[:wanted], test


def row(index: int, split: str, a: int, b: int) -> dict[str, Any]:
    """One question in verl's format, and in SPIN's: `real` ends with the response to learn by self-play."""
    question = {"role": "user", "content": f"What is {a} + {b}? Answer with the number only."}
    return {
        "data_source": "arithmetic",
        "prompt": [question],
        "real": [question, {"role": "assistant", "content": str(a + b)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(a + b)},
        "extra_info": {"index": index, "split": split, "a": a, "b": b},
    }


def prepare(
    output: Path, seed: int = 0, test_size: int = 100, train_size: int | None = None, max_operand: int = 20
) -> None:
    """Writes train.parquet and test.parquet into the folder."""
    train, test = split_pairs(seed, test_size, train_size, max_operand)
    pairs = {"train": train, "test": test}
    write_splits(output, {split: [row(i, split, *pair) for i, pair in enumerate(pairs[split])] for split in pairs})
    print(f"[data] {output}: {len(train)} training and {len(test)} held-out sums of numbers up to {max_operand}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the data set of the arithmetic example.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="decides the split and the order (0)")
    parser.add_argument("--test-size", type=int, default=100, help="held-out questions (100)")
    parser.add_argument("--train-size", type=int, help="training questions (all the others)")
    parser.add_argument("--max-operand", type=int, default=20, help="the largest number to add (20)")
    try:
        prepare(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"[data] error: {error}")


if __name__ == "__main__":
    main()
