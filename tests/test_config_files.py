"""Models, data and rewards that cannot work are refused before Ray starts, by one message with the remedy."""

import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from checkable_run import row, write_rows


# ---- Model -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("missing", "words"),
    [("*.safetensors", "weights"), ("tokenizer.json", "tokenizer"), ("config.json", "config.json")],
)
def test_incomplete_model_folder(run, tmp_path, missing, words):
    folder = shutil.copytree(run.settings["actor_rollout_ref.model.path"], tmp_path / "model")
    for file in folder.glob(missing):
        file.unlink()
    message = run.refusal(f"actor_rollout_ref.model.path={folder}")
    assert message.startswith("actor_rollout_ref.model.path=") and str(folder) in message
    assert words in message and "save_pretrained" in message


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/no-such-model", "a-name", "a/b/c"])
def test_missing_model_folder(run, name):
    message = run.refusal(f"actor_rollout_ref.model.path='{name}'")
    assert f"actor_rollout_ref.model.path='{name}'" in message and "no such folder" in message


# ---- Data ------------------------------------------------------------------------------------------------------------
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
        (row(2) | {"prompt": "What is 2 + 1?"}, ["'prompt'", "list of chat messages", "What is 2 + 1?"]),
        (row(2) | {"prompt": []}, ["'prompt'", "list of chat messages"]),
        (row(2) | {"prompt": [{"content": "What?"}]}, ["'role'", "'content'"]),
        (row(2) | {"prompt": ["What is 2 + 1?"]}, ["'role'", "'content'"]),
        (without("reward_model"), ["reward_model.ground_truth", "add the column"]),
        (row(2) | {"reward_model": {"style": "rule"}}, ["reward_model.ground_truth", "add the column"]),
        (row(2) | {"reward_model": "3"}, ["reward_model.ground_truth"]),
        (without("data_source"), ["'data_source'", "add the column"]),
        (["prompt"], ["'prompt'"]),
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
    ],
)
def test_faulty_row_is_named(run, tmp_path, bad, words):
    """Rows count from 0, as data sets do."""
    path = write_rows(tmp_path / "data.jsonl", [row(0), row(1), bad, row(3)])
    message = run.refusal(f"data.train_files={path}")
    assert message.startswith(f"data.train_files='{path}', row 2: ")
    assert [word for word in words if word not in message] == [], message


def test_ground_truth_is_not_asked_for_with_a_reward_model(run, tmp_path):
    rows = [{"data_source": "sums", "prompt": row(number)["prompt"]} for number in range(4)]
    path = write_rows(tmp_path / "data.jsonl", rows)
    run.check(f"data.train_files={path}", f"data.val_files={path}", "reward.reward_model.enable=True")


def test_fewer_rows_than_a_batch(run):
    message = run.refusal("data.train_batch_size=9")
    assert "data.train_files holds 8 prompts" in message
    assert "data.train_batch_size=9" in message and "lower data.train_batch_size" in message


# ---- Reward ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["reward.custom_reward_function.path", "no such file"]),
        ("x = 1\ndef compute_score(:\n", ["reward.custom_reward_function.path", "line 2", "correct"]),
        ("def score():\n    pass\n", ["reward.custom_reward_function.name='compute_score'", "defines score"]),
        ("x = 1\n", ["reward.custom_reward_function.name='compute_score'", "defines x"]),
        ("", ["reward.custom_reward_function.name='compute_score'", "no function"]),
    ],
    ids=["missing", "syntax", "other-function", "no-function", "empty"],
)
def test_reward_file(run, tmp_path, text, words):
    path = tmp_path / "my_reward.py"
    if text is not None:
        path.write_text(text)
    message = run.refusal(f"reward.custom_reward_function.path={path}")
    assert [word for word in [*words, str(path)] if word not in message] == [], message
