"""Makes the data set of the GSM8K example: grade school word problems (arXiv 2110.14168), in verl's format.

    python -m recipe.spin.examples.gsm8k.prepare --output DIR [--local FOLDER | --revision COMMIT]

Takes openai/gsm8k from the Hugging Face hub, its newest or the given revision, or, with --local, train.jsonl and
test.jsonl from a folder: one JSON object a line with the texts `question` and `answer`, whose last line is `#### N`.
Writes train.parquet and test.parquet.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipe.spin.tools.data_sets import read_file, read_hub, write_splits

INSTRUCTION = "Think step by step, then end with a line that holds only the final number: #### <answer>"
REMEDY = "Check the network, or give a folder with train.jsonl and test.jsonl by --local."
FINAL_ANSWER = re.compile(r"####\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*$")


def final_answer(answer: str) -> str:
    """The number after the closing `####` of a worked solution, without thousands separators."""
    match = FINAL_ANSWER.search(answer)
    if match is None:
        raise ValueError("`answer` does not end with `#### N`, N a number")
    return match[1].replace(",", "")


def row(index: int, split: str, problem: Any) -> dict[str, Any]:
    """One problem in verl's format. Raises ValueError that says what is wrong with it."""
    if not isinstance(problem, dict):
        raise ValueError("this is no JSON object")
    for key in ("question", "answer"):
        if not isinstance(problem.get(key), str) or not problem[key].strip():
            raise ValueError(f"`{key}` is missing, empty or no text")
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{problem['question'].strip()}\n\n{INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": final_answer(problem["answer"])},
        "extra_info": {"index": index, "split": split},
    }


def rows_of(problems: Iterable[tuple[str, Any]], split: str) -> list[dict[str, Any]]:
    """The rows of a split; problems come with the place they were read from, which an error names."""
    rows = []
    for index, (place, problem) in enumerate(problems):
        try:
            rows.append(row(index, split, problem))
        except ValueError as error:
            raise ValueError(
                f"{place}: {error}. Correct or remove the row; each needs `question` and `answer`, "
                "which ends with `#### N`."
            ) from None
    if not rows:
        raise ValueError(f"the split {split} has no row. Check that its file is the right one and not cut off.")
    return rows


def prepare(output: Path, local: Path | None = None, revision: str | None = None) -> None:
    """Writes train.parquet and test.parquet into the folder, or neither if a row is malformed."""
    splits = {}
    for split in ("train", "test"):
        hub = ("openai/gsm8k", "main", split, revision, REMEDY)
        splits[split] = rows_of(read_file(local / f"{split}.jsonl") if local else read_hub(*hub), split)
    write_splits(output, splits)
    print(f"[data] {output}: {len(splits['train'])} training and {len(splits['test'])} held-out problems of GSM8K")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the data set of the GSM8K example.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write into")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--local", type=Path, help="a folder with train.jsonl and test.jsonl, instead of the hub")
    source.add_argument("--revision", help="a commit, tag or branch of the data set on the hub (its newest)")
    try:
        prepare(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"[data] error: {error}")


if __name__ == "__main__":
    main()
