"""Data that cannot work is refused before Ray starts, by one message with the remedy."""

import ast
import errno
import inspect
import json
import textwrap
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from checkable_run import row, write_classifier, write_rows
from transformers import AutoTokenizer
from verl.utils.reward_score import default_compute_score

from recipe.spin.checks import data_files
from recipe.spin.checks.data_files import REWARDED


@pytest.fixture(scope="session")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


@pytest.mark.parametrize("key", ["data.train_files", "data.val_files"])
def test_missing_data_file(run, tmp_path, key):
    message = run.refusal(f"{key}={tmp_path}/absent.parquet")
    assert message.startswith(f"{key}=") and "absent.parquet" in message and "no such file" in message


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_file_without_rows(run, tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(1)]).slice(0, 0), path)
    else:
        path.write_text("")
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith("data.train_files=") and str(path) in message and "no rows" in message


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _footer_overwritten(content: bytes) -> bytes:
    """The file's last bytes are there, the rest of the footer is not."""
    return content[:-300] + bytes(292) + content[-8:]


def _page_overwritten(content: bytes) -> bytes:
    return content[:60] + b"\xff" * 100 + content[160:]


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _footer_overwritten,
        _page_overwritten,
        lambda content: b"",
    ],
    ids=["cut", "footer", "page", "empty"],
)
def test_damaged_parquet_file(run, tmp_path, damage):
    path = tmp_path / "damaged.parquet"
    path.write_bytes(damage((tmp_path / "train.parquet").read_bytes()))
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith("data.train_files=") and str(path) in message
    assert "not a readable parquet file" in message and "make it again" in message


def test_broken_json_line(run, tmp_path):
    path = Path(write_rows(tmp_path / "data.jsonl", [row(number) for number in range(4)]))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:20], lines[3]]))
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith("data.train_files=") and "data.jsonl" in message
    assert "line 3" in message and "one JSON object a line" in message


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_may_not_be_read(run, tmp_path, monkeypatch, name):
    read = Path.read_bytes

    def refuse(file):
        if file.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read all files
    (tmp_path / name).write_text(json.dumps(row(1)))
    message = run.refusal(f"data.train_files={tmp_path / name}")
    assert message.startswith(f"data.train_files='{tmp_path / name}': cannot be read (Permission denied)")


def test_json_lines_are_read(run, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [row(number) for number in range(4)])
    run.check(f"data.train_files={path}")


def test_several_files_are_counted_together(run, tmp_path):
    files = [write_rows(tmp_path / f"{i}.jsonl", [row(i), row(i + 1)]) for i in range(2)]
    run.check(f"data.train_files=[{','.join(files)}]")
    message = run.refusal(f"data.train_files=[{files[0]}]")
    assert "data.train_files holds 2 prompts" in message and "data.train_batch_size=4" in message


def test_file_of_another_kind(run, tmp_path):
    (tmp_path / "data.csv").write_text("prompt\nhello\n")
    message = run.refusal(f"data.val_files={tmp_path}/data.csv")
    assert message.startswith("data.val_files=") and ".parquet, .jsonl" in message


def without(key: str) -> dict:
    return {name: value for name, value in row(2).items() if name != key}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (without("prompt"), ["'prompt'", "it has data_source, reward_model", "data.prompt_key"]),
        (row(2) | {"prompt": "What is 2 + 1?"}, ["'prompt'", "chat messages", "What is 2 + 1?", "'content': TEXT}]"]),
        (row(2) | {"prompt": []}, ["'prompt'", "list of chat messages"]),
        (row(2) | {"prompt": [{"content": "What?"}]}, ["'role'", "'content'"]),
        (row(2) | {"prompt": ["What is 2 + 1?"]}, ["'role'", "'content'"]),
        (without("reward_model"), ["reward_model.ground_truth", "add the column"]),
        (row(2) | {"reward_model": {"style": "rule"}}, ["reward_model.ground_truth", "add the column"]),
        (row(2) | {"reward_model": "3"}, ["reward_model.ground_truth"]),
        (without("data_source"), ["'data_source'", "add the column"]),
        (["prompt"], ["'prompt'"]),
        (row(2) | {"prompt": [{"role": "user", "content": "\ud800"}]}, ["holds '\\ud800'", "half of a character"]),
    ],
    ids=[
        "no-prompt",
        "string-prompt",
        "empty-prompt",
        "no-role",
        "string-message",
        "no-reward-model",
        "no-ground-truth",
        "string-reward-model",
        "no-data-source",
        "no-object",
        "half-a-character",
    ],
)
def test_faulty_row_is_named(run, tmp_path, bad, words):
    """Rows count from 0, as data sets do."""
    path = write_rows(tmp_path / "data.jsonl", [row(0), row(1), bad, row(3)])
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith(f"data.train_files='{path}', row 2: ")
    assert [word for word in words if word not in message] == [], message


def train_and_test(folder: Path, rows: list[dict]) -> list[str]:
    """Files with the same rows but one: a copy would be refused."""
    return [write_rows(folder / "train.jsonl", rows), write_rows(folder / "test.jsonl", rows[1:])]


REWARD = "reward.custom_reward_function.path"
REWARD_MODEL = ["reward.reward_model.enable=True"]


def test_a_ground_truth_of_null_is_for_ones_own_reward(run, tmp_path):
    """Which may do without; verl's own would compare with nothing."""
    rows = [row(n) | {"data_source": "math", "reward_model": {"ground_truth": None}} for n in range(4)]
    files = [f"data.train_files={write_rows(tmp_path / 'data.jsonl', rows)}"]
    run.check(*files)
    message = run.refusal(*files, f"{REWARD}=null", f"data.val_files={named(tmp_path, 'math')[1].partition('=')[2]}")
    assert "row 0: reward_model.ground_truth is null" in message and "(REWARD_PATH)" in message


def test_ground_truth_is_not_asked_for_with_a_reward_model(run, tmp_path, tiny_llama):
    reward_model = write_classifier(tiny_llama, tmp_path / "classifier")
    rows = [{"data_source": "sums", "prompt": row(number)["prompt"]} for number in range(4)]
    train, held_out = train_and_test(tmp_path, rows)
    files = [f"data.train_files={train}", f"data.val_files={held_out}"]
    run.check(*files, *REWARD_MODEL, f"reward.reward_model.model_path={reward_model}", f"{REWARD}=null")
    message = run.refusal(*files, *REWARD_MODEL, f"reward.reward_model.model_path={reward_model}")
    assert "row 0: no reward_model.ground_truth" in message  # a function that asks the model gets it


JUDGE = [
    "algorithm.preference_source=judge",
    "algorithm.judge.servers=[reference]",
    "algorithm.judge.max_tokens=16",
    "actor_rollout_ref.rollout.max_model_len=512",
    "actor_rollout_ref.rollout.max_num_batched_tokens=512",
]
UNANSWERED = ["trainer.val_before_train=False", "trainer.test_freq=-1"]


def test_a_judge_without_a_reward_takes_prompts_alone(run, tmp_path):
    rows = [{"prompt": row(number)["prompt"]} for number in range(4)]
    train, held_out = train_and_test(tmp_path, rows)
    files = [f"data.train_files={train}", f"data.val_files={held_out}"]
    run.check(*files, *JUDGE, *UNANSWERED, f"{REWARD}=null")
    message = run.refusal(*files, *JUDGE, f"{REWARD}=null")
    assert message.startswith(f"data.val_files='{held_out}', row 0: no reward_model.ground_truth")
    assert message.endswith("(trainer.val_before_train=False trainer.test_freq=-1)")
    policy = "algorithm.judge.servers=[policy]"  # compares held-out answers too
    run.check(*files, *JUDGE, policy, f"{REWARD}=null")
    assert f"data.val_files='{held_out}'" in run.refusal(*files, *JUDGE, policy)
    assert "2 faults" not in run.refusal(*files, *JUDGE, *UNANSWERED)  # the reward is for the reports, and gets rows
    assert "data.train_files" in run.refusal(*files, *UNANSWERED, f"{REWARD}=null")


# ---- The reward that verl has for the data source --------------------------------------------------------------------
def named(tmp_path: Path, source) -> list[str]:
    rows = [row(number) | {"data_source": source} for number in range(4)]
    train, held_out = train_and_test(tmp_path, rows)
    return [f"data.train_files={train}", f"data.val_files={held_out}"]


@pytest.mark.parametrize("source", ["sums", 3, ["math"]])
def test_without_a_reward_file_verl_must_have_one(run, tmp_path, source):
    files = named(tmp_path, source)
    message = run.refusal(*files, f"{REWARD}=null")
    assert (
        message.startswith("2 faults") and f"row 0: verl has no reward of its own for data_source={source!r}" in message
    )
    assert f"{REWARD} (REWARD_PATH)" in message
    run.check(*files)
    run.check(*files, *JUDGE, *UNANSWERED, f"{REWARD}=null")


@pytest.mark.parametrize(
    "setting",
    ["reward.reward_manager.source=importlib", "actor_rollout_ref.rollout.agent.default_agent_loop=mine"],
)
def test_a_class_that_may_score_by_itself_is_believed(run, tmp_path, setting):
    run.check(*named(tmp_path, "sums"), f"{REWARD}=null", setting)


@pytest.mark.parametrize("source", ["openai/gsm8k", "aime_2025"])
def test_verls_reward_for_the_data_source_will_do(run, tmp_path, source):
    run.check(*named(tmp_path, source), f"{REWARD}=null")


def test_the_data_sources_that_verl_has_a_reward_for():
    """By the names that its function compares `data_source` with."""
    function = ast.parse(textwrap.dedent(inspect.getsource(default_compute_score))).body[0]
    compared = [node for node in ast.walk(function) if isinstance(node, ast.Compare)]
    names = {node.value for one in compared for node in ast.walk(one) if isinstance(node, ast.Constant)}
    assert names == REWARDED
    assert ast.unparse(function).count("data_source.startswith") == ast.unparse(function).count("startswith('aime')")
    with pytest.raises(NotImplementedError):
        default_compute_score("sums", "", "")


def test_fewer_rows_than_a_batch(run):
    message = run.refusal("data.train_batch_size=9")
    assert "data.train_files holds 8 prompts" in message
    assert "data.train_batch_size=9" in message and "lower data.train_batch_size" in message


# ---- What verl reads, and what it would choke on ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("array.json", lambda lines: b"[" + b",\n".join(lines) + b"]"),
        ("late.json", lambda lines: b"\n \t\r\n[" + b",\n".join(lines) + b"]\n"),
        ("twice.json", lambda lines: b"[" + b",\n".join(lines).replace(b"{", b'{"a": 1, "a": 2, ', 1) + b"]"),
        ("mark.jsonl", lambda lines: b"\xef\xbb\xbf" + b"\n".join(lines)),
        ("blank.jsonl", lambda lines: b"\n\n" + b"\n\n".join(lines) + b"\n\n"),
    ],
    ids=["array", "array after space", "key twice in an array", "byte order mark", "blank lines"],
)
def test_json_as_verl_reads_it(run, tmp_path, name, write):
    lines = [json.dumps(row(number)).encode() for number in range(4)]
    path = tmp_path / name
    path.write_bytes(write(lines))
    run.check(f"data.train_files={path}")
    assert len(datasets.load_dataset("json", data_files=str(path), cache_dir=tmp_path / "cache")["train"]) == 4


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_characters_that_json_writes_in_two_pass(run, tmp_path, kind):
    rows = [row(number) | {"note": "\U0001f600 and \\ud800"} for number in range(4)]
    path = tmp_path / f"data.{kind}"
    path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    run.check(f"data.train_files={path}")


@pytest.mark.parametrize(
    "content",
    [b"[" + json.dumps(row(1)).encode(), b'["\xed\xa0\x80"]', json.dumps([row(1)]).encode("utf-16-le")],
    ids=["cut", "half a character", "UTF-16"],
)
def test_broken_json_array(run, tmp_path, content):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith(f"data.train_files='{path}'") and "not JSON in UTF-8" in message


@pytest.mark.parametrize("old", ['{"data_source"', '{"role"', '{"style"'])
def test_a_key_that_stands_twice_in_a_line_is_refused(run, tmp_path, old):
    path = Path(write_rows(tmp_path / "data.jsonl", [row(number) for number in range(4)]))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["", *lines[:2], lines[2].replace(old, f'{{"a": 1, "a": 2, {old[1:]}'), lines[3]]))
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith(f"data.train_files='{path}', line 4 (row 2): the key 'a' stands twice in an object")
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        datasets.load_dataset("json", data_files=str(path), cache_dir=tmp_path / "cache")


# ---- Several files ---------------------------------------------------------------------------------------------------
def parts(folder: Path, *columns: dict) -> list[str]:
    """Files with these columns beside a prompt's, the first parquet, the others JSON lines and an array."""
    rows = [[row(number) | more] * 4 for number, more in enumerate(columns)]
    found = [
        write_rows(folder / f"part{number}.{'jsonl' if number else 'parquet'}", r) for number, r in enumerate(rows)
    ]
    if len(rows) > 2:
        found[2] = str(folder / "part2.json")
        Path(found[2]).write_text(json.dumps(rows[2]))
    return found


@pytest.mark.parametrize(
    ("columns", "types"),
    [
        ([{"a": "x"}, {"a": "x"}, {"a": "x"}], None),
        ([{}, {"a": 1}, {}], None),
        ([{"a": 1}, {"a": None}, {"a": 2}], None),
        ([{"a": None}, {"a": 1}], None),
        ([{"a": {"b": None}}, {"a": {"b": 1}}], None),
        ([{"a": {"b": 1}}, {"a": {"c": "x"}}], None),
        ([{"a": {"b": 1, "c": 2}}, {"a": {"c": 1, "b": 2}}], None),
        ([{}, {"a": [{"b": 1}, {"b": "x"}]}, {"a": [{"b": 2}, {"b": "y"}]}], None),
        ([{"a": "x"}, {"a": 1}], ("string", 0, "int64", 1)),
        ([{"a": 1}, {"a": 1.5}], ("int64", 0, "double", 1)),
        ([{"a": True}, {"a": 1}], ("bool", 0, "int64", 1)),
        ([{"a": None}, {"a": 1}, {"a": "x"}], ("int64", 1, "string", 2)),
        ([{"a": ["x"]}, {"a": [1]}], ("list<item: string>", 0, "list<item: int64>", 1)),
        ([{"a": {"b": "x"}}, {"a": {"b": 1}}], ("struct<b: string>", 0, "struct<b: int64>", 1)),
        ([{"a": None}, {"a": {"b": 1}}], ("null", 0, "struct<b: int64>", 1)),
    ],
)
def test_files_are_joined_that_datasets_joins(run, tmp_path, columns, types):
    files = parts(tmp_path, *columns)
    override = f"data.train_files=[{','.join(files)}]"
    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    loaded = [
        datasets.load_dataset(kinds[Path(file).suffix], data_files=file, cache_dir=tmp_path / "cache")["train"]
        for file in files
    ]
    if types is None:
        run.check(override)
        datasets.concatenate_datasets(loaded)
        return
    one, first, other, second = types
    message = run.refusal(override)
    assert message.startswith("data.train_files=[") and "write them alike" in message
    assert f"the column 'a' is {one} in '{files[first]}' and {other} in '{files[second]}', and verl joins" in message
    with pytest.raises((ValueError, AttributeError)):
        datasets.concatenate_datasets(loaded)


@pytest.mark.parametrize("column", ["session_id", "responses", "output"])
def test_a_column_that_the_rollout_adds_is_refused(run, tmp_path, column):
    path = write_rows(tmp_path / "data.jsonl", [row(number) | {column: "x"} for number in range(4)])
    message = run.refusal(f"data.val_files={path}")
    assert message.startswith(f"data.val_files='{path}', row 0: ") and f"'{column}'" in message and "rename" in message


def test_a_column_that_verl_sets_itself_passes(run, tmp_path):
    """pandas' reset_index() makes it; verl takes `extra_info.index`."""
    run.check(f"data.train_files={write_rows(tmp_path / 'data.parquet', [row(n) | {'index': n} for n in range(4)])}")


def test_extra_information_that_verl_could_not_read_is_refused(run, tmp_path):
    run.check(f"data.train_files={write_rows(tmp_path / 'a.jsonl', [row(n) | {'extra_info': None} for n in range(4)])}")
    path = write_rows(tmp_path / "b.jsonl", [row(number) | {"extra_info": '{"index": 1}'} for number in range(4)])
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith(f"data.train_files='{path}', row 0: the column 'extra_info' holds") and "dict" in message


def test_a_name_that_would_be_a_pattern_is_refused(run, tmp_path):
    """datasets looks for all files that fit."""
    path = write_rows(tmp_path / "part[1].jsonl", [row(number) for number in range(4)])
    assert "[ would be a pattern of names; rename the file" in run.refusal(f"data.train_files=['{path}']")


@pytest.mark.parametrize("column", ["images", "videos", "audios"])
def test_rows_with_more_than_text_are_refused(run, tmp_path, column):
    """vLLM would be shown them, and the update would know nothing of it."""
    rows = [row(number) | {column: []} for number in range(4)]
    run.check(f"data.train_files={write_rows(tmp_path / 'text.jsonl', rows)}")
    path = write_rows(tmp_path / "data.jsonl", [*rows[:2], row(2) | {column: ["a.file"]}, rows[3]])
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith(f"data.train_files='{path}', row 2: the column '{column}' is not empty")
    assert "trains on text alone" in message and "drop the column" in message


@pytest.mark.parametrize("source", ["reward", "self_play"])
def test_a_message_with_more_than_text_is_refused(run, tmp_path, source):
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "https://a/b"}}]
    key = {"reward": "prompt", "self_play": "real"}[source]
    rows = [row(number) | {key: [{"role": "user", "content": parts}]} for number in range(4)]
    path = write_rows(tmp_path / "data.jsonl", rows)
    message = run.refusal(f"data.train_files={path}", f"algorithm.preference_source={source}", f"data.prompt_key={key}")
    assert f"data.train_files='{path}', row 0: '{key}' holds a part of the type 'image_url'" in message
    assert "trains on text alone" in message


@pytest.mark.parametrize("content", [3, [], [3], ["text"], {"text": "x"}, True])
def test_a_message_without_text_is_refused(run, tmp_path, content):
    bad = row(2) | {"prompt": [{"role": "user", "content": content}]}
    message = run.refusal(f"data.train_files={write_rows(tmp_path / 'data.jsonl', [row(0), bad, row(1), row(3)])}")
    assert "row 1" in message and "'content': text" in message


def test_a_message_in_parts_passes(run, tmp_path):
    template = "actor_rollout_ref.model.custom_chat_template='{{ messages[0].content[0].text }}'"
    prompt = [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}]}]
    rows = [row(number) | {"prompt": prompt} for number in range(5)]
    files = [write_rows(tmp_path / "a.json", rows[:4]), write_rows(tmp_path / "b.json", rows[4:])]
    run.check(f"data.train_files={files[0]}", f"data.val_files={files[1]}", template)


def test_the_training_file_is_not_held_out(run):
    message = run.refusal(f"data.val_files={run.settings['data.train_files']}")
    assert message.startswith("data.val_files=") and "must not be trained on" in message


@pytest.mark.parametrize("name", ["copy.parquet", "link.parquet"])
def test_a_copy_of_the_training_file_is_not_held_out(run, tmp_path, name):
    train, path = Path(run.settings["data.train_files"]), tmp_path / name
    path.symlink_to(train) if name == "link.parquet" else path.write_bytes(train.read_bytes())
    message = run.refusal(f"data.val_files=[{run.settings['data.val_files']},{path}]")
    assert message.startswith("data.val_files=[") and "must not be trained on" in message
    assert (f"copy.parquet is a copy of {train}; " in message) == (name == "copy.parquet")


# ---- Lengths and numbers ---------------------------------------------------------------------------------------------
def question(words: int) -> dict:
    return row(1) | {"prompt": [{"role": "user", "content": "What " * words}]}


def test_a_prompt_that_is_too_long_is_refused(run, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [row(0), question(200), row(1), question(300), row(2)])
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith(f"data.train_files='{path}', row 1: the prompt has ") and "2 of 5 rows" in message
    assert "more than data.max_prompt_length=64, and its beginning would be cut off" in message
    assert "data.filter_overlong_prompts=True" in message


@pytest.mark.parametrize("key", ["data.train_files", "data.val_files"])
def test_prompts_that_verl_fetches_must_be_left_out_where_they_are_too_long(run, key):
    message = run.refusal(f"{key}=hdfs://a/b.parquet")
    assert message.startswith(f"{key}='hdfs://a/b.parquet': ") and "data.filter_overlong_prompts=True" in message
    run.check(f"{key}=hdfs://a/b.parquet", "data.filter_overlong_prompts=True")


def test_lengths_are_those_of_the_chat_template(run, tokenizer):
    """A limit of exactly the longest prompt passes, one token less does not."""
    prompts = [row(number)["prompt"] for number in range(8)]
    longest = max(len(tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"]) for p in prompts)
    run.check(f"data.max_prompt_length={longest}")
    message = run.refusal(f"data.max_prompt_length={longest - 1}")
    assert f"the prompt has {longest} tokens" in message and "data.val_files" in message  # all files are looked at


def test_measuring_that_takes_a_while_is_told(run, monkeypatch, capsys):
    """50,000 prompts of 100 tokens take 7 s of a free core, 19 s beside other work, and nothing else would be said."""
    told = "measuring 12 prompts for data.max_prompt_length"
    run.check()
    assert told not in capsys.readouterr().err
    monkeypatch.setattr(data_files, "MANY", 12)
    run.check()
    assert told in capsys.readouterr().err
    run.check("data.filter_overlong_prompts=True")  # measures a batch alone
    assert told not in capsys.readouterr().err


def test_prompts_that_are_too_long_are_left_out(run, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [question(200), *map(row, range(4)), question(200)])
    run.check(f"data.train_files={path}", "data.filter_overlong_prompts=True")
    message = run.refusal(f"data.train_files={path}", "data.filter_overlong_prompts=True", "data.train_batch_size=5")
    assert "data.train_files holds 4 prompts of at most data.max_prompt_length=64 tokens" in message


@pytest.mark.parametrize("key", ["data.train_files", "data.val_files"])
def test_all_prompts_left_out(run, tmp_path, key):
    path = write_rows(tmp_path / "data.jsonl", [question(200)] * 4)
    message = run.refusal(f"{key}={path}", "data.filter_overlong_prompts=True")
    assert message.startswith(f"{key}='{path}': all prompts are longer than data.max_prompt_length=64")


def test_a_prompt_that_the_template_does_not_take(run):
    template = "\"{{ raise_exception('system messages are not supported') }}\""
    message = run.refusal(f"actor_rollout_ref.model.custom_chat_template={template}")
    assert "data.train_files=" in message and "row 0: the chat template does not take the messages" in message
    assert "system messages are not supported" in message


def test_more_held_out_answers_than_the_queue_holds(run, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [row(number) for number in range(1001)])
    message = run.refusal(f"data.val_files={path}")
    assert "transfer_queue.backend.SimpleStorage.total_storage_size=4000" in message
    assert "1001 held-out prompts with 5 answers each make 5005" in message and "data.val_max_samples" in message
    run.check(f"data.val_files={path}", "data.val_max_samples=800")
    run.check(f"data.val_files={path}", "data.val_batch_size=500")


@pytest.mark.parametrize("setting", ["do_sample=False", "temperature=0"])
def test_held_out_prompts_that_are_not_sampled_have_one_answer_each(run, tmp_path, setting):
    """Whatever `n` says: the queue holds 4000."""
    values = "actor_rollout_ref.rollout.val_kwargs"
    one_each = [f"{values}.{setting}", f"{values}.n=4"]
    run.check(f"data.val_files={write_rows(tmp_path / 'some.jsonl', [row(i) for i in range(1001)])}", *one_each)
    too_many = write_rows(tmp_path / "many.jsonl", [row(i) for i in range(4001)])
    message = run.refusal(f"data.val_files={too_many}", *one_each)
    assert "4001 held-out prompts with 1 answer each make 4001" in message


def test_held_out_answers_that_a_judge_compares_are_one_each(run, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [row(number) for number in range(1001)])
    judge = [*JUDGE, "algorithm.judge.servers=[policy]", f"{REWARD}=null"]
    run.check(f"data.val_files={path}", *judge)
    assert "1001 held-out prompts with 5 answers each" in run.refusal(f"data.val_files={path}", *judge[:-1])


def test_faults_of_several_files_are_all_told(run, tmp_path):
    (tmp_path / "train.jsonl").write_text("{")
    message = run.refusal(
        f"data.train_files={tmp_path}/train.jsonl", "data.val_files=/absent.parquet", "trainer.save_freq=often"
    )
    assert message.startswith("3 faults\n  1. trainer.save_freq='often'")
    assert "\n  2. data.train_files=" in message and "\n  3. data.val_files='/absent.parquet'" in message
