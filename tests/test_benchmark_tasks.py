"""The benchmark of small tasks: its arms, its table, and that it goes on; its runs take five minutes each."""

import json

import pytest
from checkable_run import Run

from benchmarks import tasks
from benchmarks.machine import results_file, slug
from recipe.spin.examples.tasks.prepare import TASKS, prepare


def result(before: float, after: float) -> dict:
    kinds = [{"sampled": value, "greedy": value + 0.1} for value in (before, after)]
    return dict(zip(("before", "after"), kinds, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_is_a_run_that_may_start_and_whose_prompts_fit(run: Run, task, tmp_path):
    prepare(task, tmp_path)
    config = run.check(*tasks.overrides(f"{task}, seed 7", tmp_path), "data.train_batch_size=32")
    assert config.data.seed == config.actor_rollout_ref.rollout.seed == 7


def test_every_task_is_shown_in_the_table():
    assert list(tasks.SHOWN) == list(TASKS)


def test_the_table_has_means_over_seeds_and_the_failures():
    found = {
        "larger, seed 1": result(0.1, 0.5),
        "larger, seed 2": result(0.1, 0.7),
        "sums, seed 1": {"failed": "error: the DPO loss is nan"},
    }
    _, _, *lines = tasks.table(found).splitlines()
    assert lines == [
        "| `larger` | Which number is larger, 59 or 63? | 2 "
        "| 0.100 (0.000) | 0.600 (0.141) | 0.200 (0.000) | 0.700 (0.141) |",
        "| sums, seed 1 | error: the DPO loss is nan | failed |  |  |  |  |",
    ]


def test_arms_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(tasks, "run", lambda name, folder: ran.append(folder.name) or result(0.1, 0.2))
    file = tmp_path / "results" / "tasks.json"
    tasks.sweep(["larger, seed 2"], [1, 2], tmp_path, file)
    assert ran == [slug("larger, seed 2")]
    found = tasks.sweep([], [2], tmp_path, file)
    others = [slug(f"{task}, seed 2") for task in ("sums", "differences", "opposites")]
    assert ran[1:] == others and len(found) == 4
    assert json.loads(file.read_text())["tasks"].keys() == found.keys()


def test_a_run_has_data_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "recorded", lambda overrides, folder: {"trained on": overrides[0]})
    found = tasks.run("larger, seed 1", tmp_path / "run")
    assert found == {"trained on": f"data.train_files={tmp_path}/run-data/train.parquet"}
    assert (tmp_path / "run-data" / "train.parquet").exists()


def test_the_documents_table_is_that_of_the_recorded_runs(tmp_path):
    """It is never edited by hand."""
    file = results_file("tasks")
    found = json.loads(file.read_text())["tasks"] if file.exists() else {}
    copy = tmp_path / "tasks.md"
    copy.write_text(tasks.DOCUMENT.read_text())
    tasks.write_document(found, copy)
    assert copy.read_text() == tasks.DOCUMENT.read_text()
