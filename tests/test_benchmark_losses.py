"""The sweep over losses: its arms, what it reads, its table, and that it goes on; its runs take two hours."""

import json

import pytest
from checkable_run import Run

from benchmarks import losses
from benchmarks.machine import ROOT
from recipe.spin.core_algos import LOSSES, LossOptions

VALIDATION = "val-core/arithmetic/acc/mean@4", "val-greedy-core/arithmetic/acc/mean@1"


def history(sampled: float) -> list[dict]:
    """Two steps as the recipe writes them, with the held-out accuracies before and after."""
    before, after = (dict(zip(VALIDATION, (value, value / 2), strict=True)) for value in (0.1, sampled))
    step = {"response_length/gap": 1.0, "rewards/chosen": 0.0, "actor/beta": 0.1, "training/reference_refreshed": 0.0}
    first = {"logps/chosen_token": -1.0, "response_length/mean": 14.0, "score/accuracy": 0.2, "timing_s/step": 10}
    last = {"logps/chosen_token": -0.5, "response_length/mean": 11.0, "score/accuracy": 0.3, "timing_s/step": 20}
    return [{"step": 0, **before}, {"step": 1, **step, **first}, {"step": 2, **step, **last, **after}]


@pytest.mark.parametrize("name", losses.ARMS)
def test_every_arm_is_a_run_that_may_start(run: Run, name):
    run.check(*(f"algorithm.{setting}" for setting in losses.ARMS[name]))


def test_every_loss_and_every_option_has_an_arm():
    arms = " ".join(setting for settings in losses.ARMS.values() for setting in settings)
    assert [name for name in LOSSES if name not in arms] == []
    silent = {"f_alpha_divergence_coef"}  # its default is the arm's
    assert [name for name in vars(LossOptions()) if f"dpo_{name}=" not in arms and name not in silent] == []


def test_a_run_is_summed_up():
    found = losses.summarize(history(0.7))
    assert found["before"] == {"greedy": 0.05, "sampled": 0.1} and found["after"] == {"greedy": 0.35, "sampled": 0.7}
    assert found["steps"] == 2 and found["training_accuracy"] == {"1": 0.2, "2": 0.3}
    assert found["logp_per_chosen_token"] == [-1.0, -0.5] and found["response_length"] == [14.0, 11.0]
    assert found["step_seconds"] == 15 and found["warnings"] == []


def test_the_table_has_the_best_first_the_failures_and_mean_and_worst():
    found = {
        "weak": losses.summarize(history(0.2)),
        "broken": {"failed": "error: the DPO loss is nan"},
        "good": losses.summarize(history(0.8)) | {"warnings": ["gap", "likelihood"]},
    }
    _, _, *lines = losses.table(found).splitlines()
    assert lines == [
        "| good | 0.800 | 0.400 | -1.00 -> -0.50 | 14.00 -> 11.00 | gap, likelihood |",
        "| weak | 0.200 | 0.100 | -1.00 -> -0.50 | 14.00 -> 11.00 |  |",
        "| broken | failed |  |  |  | error: the DPO loss is nan |",
        "| **mean of all** | 0.500 | 0.250 |  |  |  |",
        "| **worst of all** | 0.200 | 0.100 |  |  |  |",
    ]


def test_losses_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(losses, "ARMS", {"one": (), "two": ("dpo_beta=1",)})
    monkeypatch.setattr(losses, "run", lambda name, folder: ran.append(folder.name) or {"failed": f"run {len(ran)}"})
    file = tmp_path / "results" / "losses.json"
    found = losses.sweep([], tmp_path, file)
    assert ran == ["one", "two"] and found["two"]["overrides"] == ("dpo_beta=1",) and found["two"]["machine"]
    assert losses.sweep([], tmp_path, file).keys() == {"one", "two"} and len(ran) == 2
    losses.sweep(["two"], tmp_path, file)
    kept = json.loads(file.read_text())["losses"]
    assert ran[2:] == ["two"] and (kept["one"]["failed"], kept["two"]["failed"]) == ("run 1", "run 3")


def test_a_run_that_fails_leaves_its_last_words(tmp_path, monkeypatch):
    (tmp_path / "run_spin.sh").write_text('echo "$RUN_DIR" "$@"\necho "error: the DPO loss is nan" >&2\nexit 1\n')
    monkeypatch.setattr(losses, "ROOT", tmp_path)
    monkeypatch.setattr(losses, "ARMS", {"one": ("dpo_beta=1",)})
    assert losses.run("one", tmp_path / "one") == {"failed": "error: the DPO loss is nan"}
    assert "algorithm.dpo_beta=1" in (tmp_path / "one.log").read_text()


def test_the_documents_table_is_that_of_the_recorded_runs(tmp_path):
    """It is never edited by hand."""
    recorded = sorted((ROOT / "benchmarks" / "results").glob("losses-*.json"))
    found = json.loads(recorded[-1].read_text())["losses"] if recorded else {}
    copy = tmp_path / "losses.md"
    copy.write_text(losses.DOCUMENT.read_text())
    losses.write_document(found, copy)
    assert copy.read_text() == losses.DOCUMENT.read_text()
