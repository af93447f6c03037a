"""Common data sets, made into what a run reads."""

import csv
import json
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet as pq
import pytest

from recipe.spin.tools import data_sets, prepare_data

ASKED, ANSWERED = {"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}


def prepare(monkeypatch, source, output: Path, *options: str) -> dict[str, list[dict]]:
    """Rows of both files, made by the command."""
    monkeypatch.setattr(sys, "argv", ["prepare_data", str(source), "--output", str(output), *options])
    prepare_data.main()
    return {part: pq.read_table(output / f"{part}.parquet").to_pylist() for part in ("train", "test")}


def write(path: Path, rows: list) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def questions(count: int) -> list[dict]:
    return [{"question": f"What is {i} + 1?", "number": f"00{i + 1}"} for i in range(count)]


@pytest.mark.parametrize("suffix", prepare_data.SUFFIXES)
def test_a_run_takes_questions_and_answers(run, tmp_path, monkeypatch, suffix):
    """Of each kind of file; an answer stays as it is written."""
    source = write(tmp_path / f"sums{suffix}", questions(8))
    options = ("--prompt", "question", "--answer", "number", "--system", "Be brief.", "--test-size", "3")
    made = prepare(monkeypatch, source, tmp_path / "data", *options)
    assert [len(made["train"]), len(made["test"])] == [5, 3]
    assert [row for row in made["train"] + made["test"] if row["prompt"][1]["content"] == "What is 6 + 1?"] == [
        {
            "data_source": "sums",
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6 + 1?"}],
            "reward_model": {"style": "rule", "ground_truth": "007"},
            "extra_info": {"question": "What is 6 + 1?"},
        }
    ]
    data = tmp_path / "data"
    run.check(f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet")


@pytest.mark.parametrize(("name", "opens"), [("rows.jsonl", ""), ("rows.json", "["), ("rows.csv", "")])
def test_a_file_may_begin_with_the_mark_of_its_encoding(tmp_path, name, opens):
    text = "question\n1\n" if name.endswith("csv") else '{"question": "1"}' + ("]" if opens else "\n")
    (tmp_path / name).write_text(opens + text, encoding="utf-8-sig")
    assert [row for _, row in data_sets.read_file(tmp_path / name)] == [{"question": "1"}]


def test_a_long_text_in_a_table(tmp_path):
    (tmp_path / "rows.csv").write_text(f"question\n{'a' * 200_000}\n")
    assert len(data_sets.read_file(tmp_path / "rows.csv")[0][1]["question"]) == 200_000


def test_both_files_are_those_of_one_call(tmp_path, monkeypatch):
    """Of a call that ends in between, old held-out prompts might be among the new ones that are trained on."""
    data_sets.write_splits(tmp_path, {"train": [{"a": 1}], "test": [{"a": 2}]})
    with pytest.raises(AttributeError):
        data_sets.write_splits(tmp_path, {"train": [{"a": 2}], "test": [3]})
    assert [row for _, row in data_sets.read_file(tmp_path / "train.parquet")] == [{"a": 1}]


SHAREGPT = [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": "7"}]
TURNS = [ASKED, {"role": "assistant", "content": "7?"}, {"role": "user", "content": "Sure?"}]


@pytest.mark.parametrize(
    ("row", "options", "prompt", "response"),
    [
        ({"messages": [ASKED, ANSWERED]}, ["--prompt", "messages"], [ASKED], "7"),
        ({"messages": TURNS}, ["--prompt", "messages"], TURNS, None),
        ({"messages": [*TURNS, ANSWERED]}, ["--prompt", "messages"], TURNS, "7"),
        ({"conversations": SHAREGPT}, ["--prompt", "conversations"], [ASKED], "7"),
        ({"prompt": ASKED["content"], "output": "7"}, ["--response", "output"], [ASKED], "7"),
        ({"prompt": ASKED["content"], "chosen": [ASKED, ANSWERED]}, ["--response", "chosen"], [ASKED], "7"),
        (
            {"chosen": [*TURNS, ANSWERED], "rejected": [*TURNS, ANSWERED | {"content": "8"}]},
            ["--prompt", "chosen"],
            TURNS,
            "7",
        ),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}, ["--prompt", "rejected"], [ASKED], "7"),
    ],
)
def test_prompts_end_before_the_response(run, tmp_path, monkeypatch, row, options, prompt, response):
    """Self-play takes what has responses."""
    numbered = json.dumps(row)
    rows = [json.loads(numbered.replace("3 + 4", f"{number} + 4")) for number in range(6)]
    source = write(tmp_path / "talks.jsonl", rows)
    made = prepare(monkeypatch, source, tmp_path / "data", *options, "--test-size", "2")
    found = {made_row["prompt"][0]["content"]: made_row for made_row in made["train"] + made["test"]}
    one = found[ASKED["content"]]
    assert one["prompt"] == prompt
    assert one.get("real") == (response and [*prompt, {"role": "assistant", "content": response}])
    if response:
        files = [
            f"data.{key}_files={tmp_path}/data/{part}.parquet" for key, part in (("train", "train"), ("val", "test"))
        ]
        source = ["algorithm.preference_source=self_play", "actor_rollout_ref.rollout.n=1", "data.prompt_key=real"]
        run.check(*files, *source)


def test_no_prompt_is_in_both_files_and_the_seed_decides(tmp_path, monkeypatch):
    source = write(tmp_path / "twice.jsonl", [{"prompt": f"question {number % 40}"} for number in range(80)])
    made = [prepare(monkeypatch, source, tmp_path / str(i), "--seed", seed) for i, seed in enumerate("001")]
    assert made[0] == made[1] != made[2]
    asked = {part: {row["prompt"][0]["content"] for row in rows} for part, rows in made[0].items()}
    assert len(asked["test"]) == 4 and len(made[0]["test"]) == 8  # a tenth of the prompts
    assert not asked["train"] & asked["test"] and len(made[0]["train"]) == 72


def test_rows_that_lack_a_response_leave_real_out(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "some.jsonl", [{"prompt": [ASKED, ANSWERED]}, {"prompt": "Why?"}])
    made = prepare(monkeypatch, source, tmp_path / "data")
    assert all("real" not in row for row in made["train"] + made["test"])
    assert "self-play: not in every row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"text": "Why?"}, [], ["no column `prompt`", "has text", "--prompt"]),
        (["Why?"], [], ["no columns", "Why?"]),
        ({"prompt": ""}, [], ["`prompt` is empty", "remove the row"]),
        ({"prompt": []}, [], ["`prompt` is '[]'", "no list of messages"]),
        ({"prompt": [{"role": "wizard", "content": "Hm"}]}, [], ["wizard", "user", "human", "remove the row"]),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, [], ["image", "text as content"]),
        ({"prompt": [ANSWERED]}, [], ["nothing to answer", "Remove the row"]),
        ({"prompt": "Why?"}, ["--answer", "label"], ["no column `label`", "--answer"]),
        ({"prompt": "Why?", "label": {"a": 1}}, ["--answer", "label"], ["{'a': 1}", "no text or number"]),
        ({"prompt": "Why?", "best": None}, ["--response", "best"], ["`best` is empty", "--response"]),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, monkeypatch, row, options, words):
    good = {"prompt": "How?", "label": "1", "best": "So."}
    source = write(tmp_path / "data.jsonl", [good, row])
    with pytest.raises(SystemExit) as ended:
        prepare(monkeypatch, source, tmp_path / "made", *options)
    message = str(ended.value)
    assert message.startswith(f"[data] error: {source}, line 2: ") and "\n" not in message
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.json", b"[{", ["this is no .json file", "make it again"]),
        ("data.jsonl", b'{"prompt": "\xff"}', ["data.jsonl: this is no .jsonl file"]),
        ("data.parquet", b"PAR1", ["this is no .parquet file"]),
        ("data.txt", b"Why?", [".jsonl, .json, .csv, .parquet"]),
        ("data.csv", b"prompt\nWhy?\n", ["1 different prompts", "--test-size 1"]),
        ("data.csv", None, ["No such file", "data.csv"]),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, monkeypatch, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        prepare(monkeypatch, tmp_path / name, tmp_path / "made")
    assert [word for word in words if word not in str(ended.value)] == [], ended.value


def test_the_source_is_not_written_over(tmp_path, monkeypatch):
    source = write(tmp_path / "train.parquet", [{"prompt": f"question {number}"} for number in range(4)])
    before = source.read_bytes()
    with pytest.raises(SystemExit, match="train.parquet: .* write over"):
        prepare(monkeypatch, source, tmp_path)
    assert source.read_bytes() == before


def test_a_name_is_asked_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(questions(4))

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = ("--prompt", "question", "--subset", "main", "--split", "train_prefs", "--revision", "abc")
    made = prepare(monkeypatch, "some/sums", tmp_path / "data", *options)
    assert asked == [(("some/sums", "main"), {"split": "train_prefs", "revision": "abc"})]
    assert len(made["train"]) == 3 and made["test"][0]["data_source"] == "some/sums"


def test_the_hub_that_does_not_answer_is_told(tmp_path, monkeypatch):
    def load(*arguments, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SystemExit, match=r"some/sums, split train, could not .* \(ConnectionError: offline\)"):
        prepare(monkeypatch, "some/sums", tmp_path / "data")
