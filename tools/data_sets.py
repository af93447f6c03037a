"""Rows of data sets: read from files and the Hugging Face hub with their places, written as a run's files."""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_file(path: Path) -> Iterable[tuple[str, Any]]:
    """The rows of a file of one of SUFFIXES with their places; what a .csv holds stays text, numbers too.

    Raises:
        ValueError: when the file, or a line of it, is not what its suffix says.
    """
    try:
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                csv.field_size_limit(sys.maxsize)  # a text may have more than its 131,072 characters
                rows = list(csv.DictReader(file))
        elif path.suffix == ".json" and path.read_text("utf-8-sig").lstrip().startswith("["):
            rows = json.loads(path.read_text("utf-8-sig"))
        else:
            return list(_read_lines(path))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{path}: this is no {path.suffix} file ({error}). Correct it or make it again.") from error
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows)]


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON Lines file; empty lines are passed over."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    yield place, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{place}: no valid JSON ({error}). Correct or remove the line.") from None


def read_hub(name: str, subset: str | None, split: str, revision: str | None, remedy: str) -> Iterator[tuple[str, Any]]:
    """The rows of a split of a data set on the hub with their places.

    Raises:
        ConnectionError: when the hub does not give it; ends with the remedy, a sentence.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:
        raise ConnectionError(
            f"{name}, split {split}, could not be loaded from the hub ({type(error).__name__}: {error}). {remedy}"
        ) from error
    return ((f"{name}, {split}, row {number}", row) for number, row in enumerate(rows))


def write_splits(output: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Writes SPLIT.parquet into the folder for each split; the files appear complete or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    partial = {split: output / f".{split}.parquet.{os.getpid()}" for split in splits}
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), partial[split])
    for split, file in partial.items():
        file.rename(output / f"{split}.parquet")
