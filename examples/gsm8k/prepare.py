"""Makes the data set of the GSM8K example: grade school word problems (arXiv 2110.14168), in verl's format.

    python examples/gsm8k/prepare.py --output DIR [--local FOLDER | --revision COMMIT]

Takes openai/gsm8k from the Hugging Face hub, its newest or the given revision, or, with --local, train.jsonl and
test.jsonl from a folder: one JSON object a line with the texts `question` and `answer`, whose last line is `#### N`.
Writes train.parquet and test.parquet.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

INSTRUCTION = "Think step by step, then end with a line that holds only the final number: #### <answer>"
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


def read_local(path: Path) -> Iterator[tuple[str, Any]]:
    """The problems of a JSON Lines file with their places; empty lines are passed over."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    yield place, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{place}: no valid JSON ({error}). Correct or remove the line.") from None


def read_hub(split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """The problems of openai/gsm8k on the Hugging Face hub with their places."""
    from datasets import load_dataset

    try:
        problems = load_dataset("openai/gsm8k", "main", split=split, revision=revision)
    except Exception as error:
        raise ConnectionError(
            f"openai/gsm8k could not be loaded from the hub ({type(error).__name__}: {error}). Check the network, or "
            "give a folder with train.jsonl and test.jsonl by --local."
        ) from error
    for index, problem in enumerate(problems):
        yield f"openai/gsm8k, {split}, row {index}", problem


def write_split(output: Path, split: str, rows: list[dict[str, Any]]) -> None:
    """Writes one split; the file appears complete or not at all."""
    partial = output / f".{split}.parquet.{os.getpid()}"
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.rename(output / f"{split}.parquet")


def prepare(output: Path, local: Path | None = None, revision: str | None = None) -> None:
    """Writes train.parquet and test.parquet into the folder, or neither if a row is malformed."""
    splits = {
        split: rows_of(read_local(local / f"{split}.jsonl") if local else read_hub(split, revision), split)
        for split in ("train", "test")
    }
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        write_split(output, split, rows)
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
