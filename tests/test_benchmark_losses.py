"""The sweep over losses: its arms, what it reads, its table, and that it goes on; its runs take two hours."""

import json

import pytest
from checkable_run import Run

from benchmarks import losses
from benchmarks.machine import results_file, run_missing, slug
from recipe.spin.core_algos import LOSSES, LossOptions


def result(sampled: float, **more) -> dict:
    accuracy = {"after": {"sampled": sampled, "greedy": sampled / 2}}
    return accuracy | {"logp_per_chosen_token": [-1, -0.5], "response_length": [14, 11], "warnings": []} | more


@pytest.mark.parametrize("name", losses.ARMS)
def test_every_arm_is_a_run_that_may_start(run: Run, name):
    run.check(*(f"algorithm.{setting}" for setting in losses.ARMS[name]))


def test_every_loss_and_every_option_has_an_arm():
    arms = " ".join(setting for settings in losses.ARMS.values() for setting in settings)
    assert [name for name in LOSSES if name not in arms] == []
    silent = {"f_alpha_divergence_coef"}  # its default is the arm's
    assert [name for name in vars(LossOptions()) if f"dpo_{name}=" not in arms and name not in silent] == []


def test_the_table_has_the_best_first_the_failures_mean_and_worst_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(losses, "ARMS", dict.fromkeys(("weak", "absent", "broken", "good", "gone"), ()))
    found = {
        "weak": result(0.2),
        "broken": {"failed": "error: the DPO loss is nan"},
        "good": result(0.8, warnings=["gap", "likelihood"]),
    }
    _, _, *lines, empty, missing = losses.table(found).splitlines()
    assert (empty, missing) == ("", "Not run yet: absent; gone.")
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
    monkeypatch.setattr(losses, "recorded", lambda overrides, folder: ran.append((folder.name, overrides)) or {})
    file = tmp_path / "results" / "losses.json"
    assert losses.sweep([], tmp_path, file) == {"one": {}, "two": {}}
    two = [*losses.SETTINGS, "algorithm.dpo_beta=1"]
    assert ran == [(slug("one"), losses.SETTINGS), (slug("two"), two)]
    assert losses.sweep([], tmp_path, file).keys() == {"one", "two"} and len(ran) == 2
    losses.sweep(["two"], tmp_path, file)
    assert ran[2:] == ran[1:2] and json.loads(file.read_text())["losses"].keys() == {"one", "two"}


def test_what_another_command_found_meanwhile_is_kept(tmp_path):
    file = tmp_path / "found.json"

    def run(name: str) -> dict:
        if name == "one":
            run_missing(["other"], [], lambda name: {"by": "another"}, file, "runs", made="today")
        return {"by": "this"}

    found = run_missing([], ["one", "two"], run, file, "runs", made="today")
    assert found == {"other": {"by": "another"}, "one": {"by": "this"}, "two": {"by": "this"}}
    assert json.loads(file.read_text()) == {"made": "today", "runs": found}
    assert [path.name for path in tmp_path.glob("*.unfinished")] == []


def test_the_documents_table_is_that_of_the_recorded_runs(tmp_path):
    """It is never edited by hand."""
    file = results_file("losses")
    found = json.loads(file.read_text())["losses"] if file.exists() else {}
    copy = tmp_path / "losses.md"
    copy.write_text(losses.DOCUMENT.read_text())
    losses.write_document(found, copy)
    assert copy.read_text() == losses.DOCUMENT.read_text()
