"""Makes the data set of one of several small tasks, in verl's format: other things to learn than the sums.

    python -m recipe.spin.examples.tasks.prepare --task TASK --output DIR [--seed 0] [--test-size 100] [--train-size N]

Tasks: `sums` of two-digit numbers, `differences` of small ones, the `larger` of two numbers, `opposites` of words.
Writes train.parquet and test.parquet. Questions that give each other away (3 + 5 and 5 + 3, hot and cold) are all held
out or all trained on. The same arguments give the same rows.
"""

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe.spin.tools.data_sets import write_splits

Question = tuple[str, str]  # and its answer; several that are right stand with a | between them
Group = list[Question]  # questions that give each other away

# Some words have several; no word stands in two pairs
OPPOSITES = """
above below, absent present, accept refuse|reject|decline, alive dead, always never, ancient modern, arrive depart,
asleep awake, attack defend, backward forward, bad good, beautiful ugly, before after, begin end|finish|stop,
bitter sweet, black white, bless curse, blunt sharp, borrow lend, bottom top, bright dim|dull|dark, build destroy,
busy idle, buy sell, calm anxious|agitated, cheap expensive, clean dirty, clever stupid, closed open, cold hot,
come go, common rare, complex simple, construct demolish, cruel kind, dangerous safe, day night, deep shallow,
east west, easy difficult|hard, empty full, entrance exit, even odd, expand contract|shrink, fail succeed, false true,
far near|close, fast slow, female male, few many, first last, float sink, foolish wise, forget remember,
freeze melt|thaw, friend enemy|foe, guilty innocent, happy sad|unhappy, hate love, heavy light, high low,
horizontal vertical, include exclude, inside outside, join separate|leave, junior senior, laugh cry,
lazy hardworking|diligent|active, left right, long short, loose tight, lose win, loud quiet|silent, major minor,
maximum minimum, mother father, narrow wide|broad, negative positive, north south, old young|new, optimist pessimist,
polite rude|impolite, poor rich|wealthy, praise criticize|blame, private public, pull push, question answer,
raise lower, receive give|send, rough smooth, strong weak, summer winter, sunrise sunset, temporary permanent,
thick thin, up down, victory defeat, wet dry, wild tame, worst best, yes no, yesterday tomorrow
"""


def sums() -> list[Group]:
    """Sums of numbers from 10 to 49, with their mirror images."""

    def ask(a: int, b: int) -> Question:
        return f"What is {a} + {b}? Answer with the number only.", str(a + b)

    return [[ask(a, b), ask(b, a)][: 1 + (a != b)] for a in range(10, 50) for b in range(a, 50)]


def differences() -> list[Group]:
    """Differences of numbers up to 30 that are not negative: 17 - 9 with 17 - 8, its answer's."""

    def ask(a: int, b: int) -> Question:
        return f"What is {a} - {b}? Answer with the number only.", str(a - b)

    return [[ask(a, b), ask(a, a - b)][: 1 + (2 * b != a)] for a in range(31) for b in range(a // 2 + 1)]


def larger() -> list[Group]:
    """Which of two different numbers from 10 to 99 is larger, in both orders."""

    def ask(a: int, b: int) -> Question:
        return f"Which number is larger, {a} or {b}? Answer with the number only.", str(max(a, b))

    return [[ask(a, b), ask(b, a)] for a in range(10, 100) for b in range(a + 1, 100)]


def opposites() -> list[Group]:
    """The opposite of a word, and of that the word itself."""

    def ask(word: str, answer: str) -> Question:
        return f"What is the opposite of {word}? Answer with one word only.", answer

    pairs = [pair.split() for pair in OPPOSITES.split(",")]
    return [[ask(word, other), ask(other.split("|")[0], word)] for word, other in pairs]


TASKS: dict[str, Callable[[], list[Group]]] = {
    "sums": sums,
    "differences": differences,
    "larger": larger,
    "opposites": opposites,
}


def split(
    groups: list[Group], seed: int, test_size: int, train_size: int | None
) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, no group in both; None takes all the rest to train on.

    Raises:
        ValueError: when there are too few questions for these sizes.
    """
    rng, test, rest = random.Random(seed), [], []
    groups = rng.sample(groups, len(groups))
    for group in groups:
        (test if len(test) < test_size else rest).extend(group)
    del test[test_size:]  # what is too many of the last group goes to neither
    wanted = len(rest) if train_size is None else train_size
    if not 0 < test_size == len(test) or not 0 < wanted <= len(rest):
        raise ValueError(
            f"the task's {sum(map(len, groups))} questions cannot give {test_size} held-out and "
            f"{'any' if train_size is None else train_size} training ones. Both must be at least 1; lower --test-size "
            "or --train-size"
        )
    return rng.sample(rest, len(rest))[:wanted], rng.sample(test, len(test))


def row(index: int, part: str, task: str, question: Question) -> dict[str, Any]:
    """One question in verl's format, and in SPIN's: `real` ends with the response to learn by self-play."""
    asked, answer = {"role": "user", "content": question[0]}, question[1]
    return {
        "data_source": task,
        "prompt": [asked],
        "real": [asked, {"role": "assistant", "content": answer.split("|")[0]}],
        "ability": "words" if task == "opposites" else "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": index, "split": part},
    }


def prepare(task: str, output: Path, seed: int = 0, test_size: int = 100, train_size: int | None = None) -> None:
    """Writes train.parquet and test.parquet of a task into the folder."""
    train, test = split(TASKS[task](), seed, test_size, train_size)
    parts = {"train": train, "test": test}
    write_splits(output, {part: [row(i, part, task, one) for i, one in enumerate(parts[part])] for part in parts})
    print(f"[data] {output}: {len(train)} training and {len(test)} held-out questions of the task {task}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the data set of a small task.")
    parser.add_argument("--task", choices=TASKS, required=True, help="what is to be learnt")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="decides the split and the order (0)")
    parser.add_argument("--test-size", type=int, default=100, help="held-out questions (100)")
    parser.add_argument("--train-size", type=int, help="training questions (all the others)")
    try:
        prepare(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"[data] error: {error}")


if __name__ == "__main__":
    main()
