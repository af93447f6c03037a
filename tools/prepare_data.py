"""Makes a run's data, train.parquet and test.parquet, of a file or of a data set on the Hugging Face hub.

    python -m recipe.spin.tools.prepare_data SOURCE --output DIR [--prompt KEY] [--answer KEY] [--response KEY] ...

SOURCE is a .jsonl, .json, .csv or .parquet file, or a hub name (--subset, --split, --revision). The column --prompt
holds a text, chat messages (role, content) or ShareGPT's turns (from, value). A last message of the assistant is no
part of the prompt but its response; of `chosen` and `rejected` messages the prompt is what both begin with. --answer is
the column that a reward function gets as ground_truth; a reward model and a judge do without. Where each row has a
response (of its messages, or in the column --response), the column `real` holds it for self-play (docs/self_play.md).
A prompt that stands in several rows is held out with all or none. The same arguments give the same rows.
"""

import argparse
import json
import random
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from recipe.spin.tools.data_sets import SUFFIXES, read_file, read_hub, write_splits

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
COMPARED = ("chosen", "rejected")
REMEDY = "Check name, --subset, --split and network, or give a file that is there."


def column(row: Any, key: str, option: str) -> Any:
    """What a row has under a key. Raises ValueError that says what it has instead."""
    if not isinstance(row, dict) or key not in row:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else f"no columns, but is {str(row)[:60]!r}"
        raise ValueError(f"there is no column `{key}`; the row has {has}. Name the right one by {option}")
    if row[key] is None or row[key] == "":
        raise ValueError(f"`{key}` is empty. Fill it, remove the row, or name another column by {option}")
    return row[key]


def messages_of(row: Any, key: str, option: str = "--prompt") -> list[dict[str, str]]:
    """A column's text, chat messages or ShareGPT turns as chat messages."""
    value, messages = column(row, key, option), []
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{key}` is {str(value)[:60]!r}, no text and no list of messages. Convert it")
    for turn in value:
        known = turn if isinstance(turn, dict) else {}
        role, text = known.get("role", known.get("from")), known.get("content", known.get("value"))
        if role not in ROLES or not isinstance(text, str):
            raise ValueError(
                f"`{key}` holds {str(turn)[:60]!r}; a message has a role (or from), one of {', '.join(ROLES)}, and a "
                "text as content (or value). Correct or remove the row"
            )
        messages.append({"role": ROLES[role], "content": text})
    return messages


def prompt_and_response(row: Any, key: str, response_key: str | None) -> tuple[list[dict[str, str]], str | None]:
    """The messages to answer, and the data's response to them, if it has one."""
    messages = messages_of(row, key)
    length = len(messages)
    if key in COMPARED and set(COMPARED) <= row.keys():
        messages, rejected = (messages_of(row, name) for name in COMPARED)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(messages, rejected, strict=False)))
    while length and messages[length - 1]["role"] == "assistant":
        length -= 1
    if not length or messages[length - 1]["role"] == "system":
        raise ValueError(f"`{key}` has nothing to answer before its response. Remove the row, or name another column")
    if response_key:
        return messages[:length], messages_of(row, response_key, "--response")[-1]["content"]
    rest = [message["content"] for message in messages[length : length + 1] if message["role"] == "assistant"]
    return messages[:length], rest[0] if rest else None


def row_of(row: Any, data_source: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row in verl's format; `real` is None without a response. Raises ValueError that says what is wrong."""
    prompt, response = prompt_and_response(row, options.prompt, options.response)
    if options.system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": options.system}, *prompt]
    answer = column(row, options.answer, "--answer") if options.answer else None
    if answer is not None and not isinstance(answer, str | int | float):
        raise ValueError(f"`{options.answer}` is {str(answer)[:60]!r}, no text or number. Name another by --answer")
    return {
        "data_source": data_source,
        "prompt": prompt,
        "real": [*prompt, {"role": "assistant", "content": response}] if response else None,
        "reward_model": {"style": "rule", "ground_truth": None if answer is None else str(answer)},
        "extra_info": {"question": prompt[-1]["content"]},
    }


def hold_out(rows: list[dict], size: int | None, seed: int) -> dict[str, list[dict]]:
    """Rows to train on and to hold out, no prompt in both. Raises ValueError where there are too few."""
    asked = [json.dumps(row["prompt"]) for row in rows]
    prompts = list(dict.fromkeys(asked))
    size = min(256, max(1, len(prompts) // 10)) if size is None else size
    if not 0 < size < len(prompts):
        raise ValueError(f"{len(prompts)} different prompts do not allow --test-size {size}, and some to train on.")
    held_out = set(random.Random(seed).sample(prompts, size))
    parts = {"train": [], "test": []}
    for row, prompt in zip(rows, asked, strict=True):
        parts["test" if prompt in held_out else "train"].append(row)
    return parts


def prepare(options: argparse.Namespace) -> None:
    """Writes both files, or neither if a row is malformed, and says what they hold."""
    path, rows = Path(options.source).expanduser(), []
    is_file = path.suffix in SUFFIXES or path.exists()
    made = [(options.output / f"{part}.parquet").resolve() for part in ("train", "test")]
    if is_file and (path.suffix not in SUFFIXES or path.resolve() in made):
        raise ValueError(f"{path}: name a file ({', '.join(SUFFIXES)}) that --output does not write over.")
    hub = (options.source, options.subset, options.split, options.revision, REMEDY)
    for place, row in read_file(path) if is_file else read_hub(*hub):
        try:
            rows.append(row_of(row, path.stem if is_file else options.source, options))
        except ValueError as error:
            raise ValueError(f"{place}: {error}.") from None
    if not (have_responses := all(row["real"] for row in rows)):
        rows = [{key: row[key] for key in row if key != "real"} for row in rows]
    parts = hold_out(rows, options.test_size, options.seed)
    write_splits(options.output, parts)
    for part, chosen in parts.items():
        print(f"[data] {options.output}/{part}.parquet: {len(chosen)} rows")
    print(f"[data] ground truth: {options.answer or 'none (a reward model or a judge does without)'}")
    print(f"[data] responses for self-play: {'in the column real' if have_responses else 'not in every row, left out'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=f"a file ({', '.join(SUFFIXES)}) or the name of a data set on the hub")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--prompt", default="prompt", help="column of texts, messages or conversations (prompt)")
    parser.add_argument("--answer", help="column of what a reward function compares with")
    parser.add_argument("--response", help="column of the data's responses, for self-play (the last message)")
    parser.add_argument("--system", help="a system message for prompts without one")
    parser.add_argument("--test-size", type=int, help="prompts to hold out (256, or a tenth where that is less)")
    parser.add_argument("--seed", type=int, default=0, help="decides which (0)")
    parser.add_argument("--subset", help="configuration of the data set on the hub, if it has several")
    parser.add_argument("--split", default="train", help="its split (train)")
    parser.add_argument("--revision", help="its commit, tag or branch (the newest)")
    try:
        prepare(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"[data] error: {error}")


if __name__ == "__main__":
    main()
