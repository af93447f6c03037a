"""The files of prompts: readable, with the columns that a run needs, and with prompts of a length that it can use."""

import codecs
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from recipe.spin.checks.columns import check_columns
from recipe.spin.checks.derived import ROLLOUT, compares_held_out, is_self_play, scores_groups
from recipe.spin.checks.model_files import CHAT_TEMPLATE, load_tokenizer, prompt_writer
from recipe.spin.checks.reward_file import KEY
from recipe.spin.checks.rules.generation import require_queue
from recipe.spin.common.digests import digest
from recipe.spin.common.settings import ConfigError, Settings

TRAIN, VAL = "data.train_files", "data.val_files"
# Columns of a response, which a column of the data by the same name would overwrite, or meet in a call
TAKEN = {
    "uid",
    "session_id",
    "trajectory",
    "trace",
    "global_steps",
    "validate",
    "prompts",
    "responses",
    "response_mask",
}
TAKEN |= {"loss_mask", "input_ids", "position_ids", "rm_scores", "rollout_log_probs", "num_turns", "metrics"}
TAKEN |= {"extra_fields", "multi_modal_inputs", "output", "sampling_params", "priority", "self"}
TAKEN |= {"__rollout_n__", "__do_sample__"}
# Whose rows verl has a reward for (verl/utils/reward_score); besides, those that begin with aime
REWARDED = {"openai/gsm8k", "hiyouga/geometry3k", "math", "math_dapo", "math_dapo_reasoning"}
REWARDED |= {"lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500"}
REWARDED |= {f"numina_{name}" for name in ("aops_forum", "synthetic_math", "amc_aime", "synthetic_amc", "cn_k12")}
REWARDED |= {"numina_olympiads", "codecontests", "apps", "codeforces", "taco"}
REWARDED |= {f"searchR1_{name}" for name in ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique")}
REWARDED |= {"searchR1_bamboogle"}
YOURS = f"name a file with yours in {KEY}.path (REWARD_PATH)"
UNSCORED = ", or leave held-out prompts unanswered (trainer.val_before_train=False trainer.test_freq=-1)"
MEDIA = ("data.image_key", "data.video_key", "data.audio_key")
TEXT_ALONE = "vLLM would see it, and this recipe trains on text alone; take prompts of text"
SPACE = b" \t\r\n"  # of JSON
CHUNK = 256  # prompts that are measured at once
MANY = 10_000  # prompts whose measuring takes seconds, which is said


def check_data(settings: Settings) -> None:
    """Every file must be readable and its rows must be prompts; there must be enough of them for a batch."""
    files = {key: files_of(settings[key]) for key in (TRAIN, VAL)}
    _check_held_out(settings, files)
    prompts: dict[str, list[Prompts]] = {TRAIN: [], VAL: []}
    for key in (TRAIN, VAL):
        local = [file for file in files[key] if "://" not in file]  # others are fetched by verl
        settings.require(
            len(local) == len(files[key]) or settings["data.filter_overlong_prompts"],
            key,
            "prompts of files that verl fetches are not measured, and of one that is too long verl would cut off the "
            "beginning; set data.filter_overlong_prompts=True to leave such prompts out, or name files of this machine",
        )
        for file in local:
            settings.run(partial(_read, key=key, file=file, prompts=prompts[key]))
        if len(prompts[key]) == len(local) > 1:
            settings.run(partial(check_columns, key=key, files=local))
    if all(len(prompts[key]) == len(files[key]) for key in (TRAIN, VAL)):
        settings.run(partial(_check_amounts, prompts=prompts), partial(_check_lengths, prompts=prompts))


def _check_held_out(settings: Settings, files: dict[str, list[str]]) -> None:
    train, val = ([Path(file).resolve() for file in files[key]] for key in (TRAIN, VAL))
    same = next(((held_out, file) for held_out in val for file in train if _are_same(held_out, file)), None)
    copy = f"{same[0].name} is a copy of {same[1]}; " if same and same[0] != same[1] else ""
    settings.require(not same, VAL, f"{copy}held-out prompts must not be trained on; name a file of others")


def _are_same(one: Path, other: Path) -> bool:
    """Whether two files are one, or hold the same bytes."""
    if one == other:
        return True
    try:
        return one.stat().st_size == other.stat().st_size > 0 and digest(one) == digest(other)
    except OSError:  # verl fetches it, or it cannot be read, which is said of the file by itself
        return False


def files_of(files: str | list[str]) -> list[str]:
    """The names that a key with one or several files holds."""
    return [files] if isinstance(files, str) else files


def count_rows(file: Path) -> int:
    """Rows of a file that check_data has found in order; of a parquet file by its footer."""
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(file).num_rows if file.suffix == ".parquet" else len(_read_json(TRAIN, file))


def _read(settings: Settings, key: str, file: str, prompts: list["Prompts"]) -> None:
    prompts.append(read_prompts(settings, key, file))


@dataclass(frozen=True)
class Prompts:
    """The messages of each row of a file."""

    key: str
    file: str
    messages: list[list[dict]]

    def fault(self, row: int, fault: str) -> ConfigError:
        return ConfigError(f"{self.key}={self.file!r}, row {row}: {fault}")


# ---- Rows ------------------------------------------------------------------------------------------------------------
def read_prompts(settings: Settings, key: str, file: str) -> Prompts:
    """The prompts of a parquet, JSON-lines or JSON file.

    Raises:
        ConfigError: names the file, and the first row with a fault.
    """
    path = Path(file)
    if magic := set("*?[") & set(file):
        raise ConfigError(f"{key}={file!r}: {' and '.join(sorted(magic))} would be a pattern of names; rename the file")
    if not path.is_file():
        raise ConfigError(f"{key}={file!r}: there is no such file; make it (examples/) or name another")
    rows = _read_rows(key, path)
    if not rows:
        raise ConfigError(f"{key}={file!r}: the file has no rows; make it again")
    scored = not is_self_play(settings) and _is_scored(settings, key)
    for number, row in enumerate(rows):
        if fault := _row_fault(row, settings):
            raise ConfigError(f"{key}={file!r}, row {number}: {fault}")
        if scored and (fault := _reward_fault(row, settings)):
            raise ConfigError(f"{key}={file!r}, row {number}: {fault}{UNSCORED if key == VAL else ''}")
    end = -1 if is_self_play(settings) else None  # there the last message is the response
    return Prompts(key, file, [row[settings["data.prompt_key"]][:end] for row in rows])


def _read_rows(key: str, path: Path) -> list:
    import pyarrow
    import pyarrow.parquet

    if path.suffix in (".jsonl", ".json"):
        return _read_json(key, path)
    if path.suffix != ".parquet":
        raise ConfigError(f"{key}={str(path)!r}: verl reads .parquet, .jsonl and .json; convert the file")
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{key}={str(path)!r}: not a readable parquet file ({error}); make it again") from error


def _read_json(key: str, path: Path) -> list:
    """An object a line, or an array of objects; as datasets reads them, with a byte order mark and empty lines."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}={str(path)!r}: cannot be read ({error.strerror}); let this user read it") from error
    marked = content.startswith(codecs.BOM_UTF8)  # then datasets takes no space before an array
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.lstrip(b"" if marked else SPACE).startswith(b"["):
        try:
            rows = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{key}={str(path)!r}: not JSON in UTF-8 ({error}); make it again") from error
        _require_characters(key, path, content, rows)
        return rows
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            rows += [json.loads(line.decode(), object_pairs_hook=_object)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{key}={str(path)!r}, line {number}: not JSON in UTF-8 ({error}); write one JSON object a line"
            ) from error
        except _KeyTwiceError as error:
            raise ConfigError(
                f"{key}={str(path)!r}, line {number} (row {len(rows)}): the key {str(error)!r} stands twice in an "
                "object, which datasets does not read; leave one out"
            ) from error
    _require_characters(key, path, content, rows)
    return rows


def _require_characters(key: str, path: Path, content: bytes, rows: list) -> None:
    """JSON can name half of a character, which is in no text that a tokenizer takes."""
    if b"\\u" not in content:
        return
    for number, row in enumerate(rows):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ConfigError(
                f"{key}={str(path)!r}, row {number}: holds {half!r}, half of a character that JSON writes in two; "
                "write both or leave it out"
            ) from error


class _KeyTwiceError(Exception):
    """An object of JSON lines has a key twice; in an array datasets takes the last, as Python does."""


def _object(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _KeyTwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _row_fault(row: dict, settings: Settings) -> str | None:
    prompt_key = settings["data.prompt_key"]
    if not isinstance(row, dict) or prompt_key not in row:
        columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        return f"no column {prompt_key!r} (it has {columns}); name the prompts' column in data.prompt_key"
    messages = row[prompt_key]
    if not isinstance(messages, list) or not messages:
        remedy = "write a text as [{'role': 'user', 'content': TEXT}]"
        return f"{prompt_key!r} must be a list of chat messages, not {str(messages)[:60]!r}; {remedy}"
    for message in messages:
        if not _is_message(message):
            return f"{prompt_key!r} holds {str(message)[:60]!r}; a message is {{'role': ..., 'content': text}}"
        if others := _other_parts(message):
            return f"{prompt_key!r} holds a part of the type {others[0]!r}; {TEXT_ALONE}"
    if is_self_play(settings):
        last = messages[-1]
        if (
            len(messages) < 2
            or last["role"] != "assistant"
            or not last["content"]
            or not isinstance(last["content"], str)
        ):
            return f"{prompt_key!r} must end with the assistant's response to a prompt, not {str(last)[:60]!r}"
        return None
    taken = sorted(TAKEN & row.keys())
    if taken:
        return f"the column {taken[0]!r} has a name that the rollout uses itself; rename or drop it"
    extra = row.get("extra_info")
    if not isinstance(extra, dict | None):
        return f"the column 'extra_info' holds {str(extra)[:60]!r}; verl takes an object (dict) or null there"
    media = [settings[key] for key in MEDIA if row.get(settings[key])]
    return f"the column {media[0]!r} is not empty; {TEXT_ALONE}, and drop the column" if media else None


def _is_message(message) -> bool:
    """With a role and a text, or the parts of text that models of text and images take."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        return False
    content = message.get("content")
    parts = content if isinstance(content, list) and content else [None]
    return isinstance(content, str) or all(isinstance(part, dict) and "type" in part for part in parts)


def _other_parts(message: dict) -> list:
    """The types of a message's parts that are no text."""
    content = message["content"]
    return [] if isinstance(content, str) else [part["type"] for part in content if part["type"] != "text"]


def _is_scored(settings: Settings, key: str) -> bool:
    """Whether a reward function gets the rows of a file; a reward model, or a source that scores, takes prompts."""
    if key == VAL and not settings["trainer.val_before_train"] and settings["trainer.test_freq"] <= 0:
        return False
    if settings.value(f"{KEY}.path") is not None:
        return True
    if settings["reward.reward_model.enable"]:
        return False
    return not (compares_held_out(settings) if key == VAL else scores_groups(settings))


def _reward_fault(row: dict, settings: Settings) -> str | None:
    reward_model = row.get("reward_model")
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        return "no reward_model.ground_truth, which the reward function is called with; add the column"
    source = row.get("data_source")
    if source is None:
        return "no 'data_source', or null, which the reward function is called with; add the column"
    if not _verl_scores(settings):
        return None
    if reward_model["ground_truth"] is None:
        return f"reward_model.ground_truth is null, which verl's own reward cannot compare with; fill it in, or {YOURS}"
    if str(source) in REWARDED or str(source).startswith("aime"):
        return None
    return f"verl has no reward of its own for data_source={source!r}; {YOURS}"


def _verl_scores(settings: Settings) -> bool:
    """Whether verl's own reward for the data source is asked, and no class of the user's may score in its place."""
    return (
        settings.value(f"{KEY}.path") is None
        and settings["reward.reward_manager.source"] == "register"
        and settings[f"{ROLLOUT}.agent.default_agent_loop"] == "spin"
    )


# ---- Numbers ---------------------------------------------------------------------------------------------------------
def _check_amounts(settings: Settings, prompts: dict[str, list[Prompts]]) -> None:
    rows = {key: sum(len(file.messages) for file in prompts[key]) for key in (TRAIN, VAL)}
    batch, samples = settings["data.train_batch_size"], settings["data.train_max_samples"]
    if rows[TRAIN] < batch:
        raise _too_few(f"{rows[TRAIN]} prompts", batch)
    settings.require(
        samples <= 0 or samples >= batch,
        "data.train_max_samples",
        f"fewer prompts than data.train_batch_size={batch} make no step; raise it, or set -1 for all",
    )
    values, samples = f"{ROLLOUT}.val_kwargs", settings["data.val_max_samples"]
    sampled = settings[f"{values}.do_sample"] and settings[f"{values}.temperature"] > 0
    sampled = sampled and not compares_held_out(settings)  # which greedy answers alone are
    answers = 1 + (settings[f"{values}.n"] if sampled else 0)  # a greedy one, beside samples where these are asked for
    held_out = min(rows[VAL], samples) if samples > 0 else rows[VAL]
    together = min(held_out, settings["data.val_batch_size"] or held_out)
    each = f"{answers} answer{'s' * (answers > 1)}"
    who = f"{together} held-out prompts with {each} each make {together * answers}"
    require_queue(settings, together * answers, who, "set data.val_max_samples or data.val_batch_size")


def _too_few(prompts: str, batch: int) -> ConfigError:
    return ConfigError(
        f"{TRAIN} holds {prompts}, fewer than data.train_batch_size={batch}: add prompts or lower data.train_batch_size"
    )


# ---- Lengths ---------------------------------------------------------------------------------------------------------
def _check_lengths(settings: Settings, prompts: dict[str, list[Prompts]]) -> None:
    """verl leaves prompts that are too long out, where it is told to, and else cuts off their beginning."""
    tokenizer = load_tokenizer(settings)
    if tokenizer is None:
        return
    if not settings["data.filter_overlong_prompts"]:
        count = sum(len(file.messages) for file in (*prompts[TRAIN], *prompts[VAL]))
        if count >= MANY:
            sys.stderr.write(f"[spin] measuring {count} prompts for data.max_prompt_length, some thousands a second\n")
        for file in (*prompts[TRAIN], *prompts[VAL]):
            settings.run(partial(_require_short, tokenizer=tokenizer, prompts=file))
        return
    limit, batch = settings["data.max_prompt_length"], settings["data.train_batch_size"]
    for key, enough in ((TRAIN, batch), (VAL, 1)):
        lengths = chain.from_iterable(_lengths(settings, tokenizer, file) for file in prompts[key])
        kept = sum(1 for _ in islice(filter(limit.__ge__, lengths), enough))  # measures no more than it must
        settings.require(
            kept > 0,
            key,
            f"all prompts are longer than data.max_prompt_length={limit} tokens, and data.filter_overlong_prompts=True "
            "leaves them out; raise data.max_prompt_length",
        )
        if 0 < kept < enough:
            raise _too_few(f"{kept} prompts of at most data.max_prompt_length={limit} tokens", batch)


def _require_short(settings: Settings, tokenizer, prompts: Prompts) -> None:
    limit = settings["data.max_prompt_length"]
    overlong = [(row, length) for row, length in enumerate(_lengths(settings, tokenizer, prompts)) if length > limit]
    if overlong:
        row, length = overlong[0]
        most = max(length for _, length in overlong)
        raise prompts.fault(
            row,
            f"the prompt has {length} tokens, more than data.max_prompt_length={limit}, and its beginning would be "
            f"cut off ({len(overlong)} of {len(prompts.messages)} rows have more, up to {most}); raise "
            "data.max_prompt_length, or set data.filter_overlong_prompts=True to leave such rows out",
        )


def _lengths(settings: Settings, tokenizer, prompts: Prompts) -> Iterator[int]:
    """Tokens of each prompt, written as the rollout does."""
    write = prompt_writer(settings, tokenizer)
    for start in range(0, len(prompts.messages), CHUNK):
        texts = []
        for row, messages in enumerate(prompts.messages[start : start + CHUNK], start=start):
            try:
                texts.append(write(messages))
            except ValueError as error:
                raise prompts.fault(row, f"{error}; change them, or set {CHAT_TEMPLATE}") from error
        yield from map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
