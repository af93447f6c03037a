"""The sweep that the defaults are chosen by: its arms, its table, and that it goes on; its runs take minutes each."""

import json

import pytest
from checkable_run import Run

from benchmarks import defaults
from benchmarks.default_run import seeded
from benchmarks.machine import results_file, slug


@pytest.mark.parametrize("arm", defaults.ARMS)
def test_every_arm_is_a_run_that_may_start_and_differs_from_the_default(run: Run, arm):
    default, changed = run.check(), run.check(*defaults.ARMS[arm])
    assert (changed == default) == (arm == "default")


def test_what_an_arm_changes_is_in_its_name():
    assert list(defaults.ARMS)[:2] == ["default", "lr=1e-5"] and "lr=1e-5 dpo_beta=0.3" in defaults.ARMS
    assert "eps=1e-4" in defaults.ARMS and len(defaults.ARMS) == len(defaults.SETTINGS)


def result(sampled: float) -> dict:
    return {"after": {"sampled": sampled, "greedy": sampled / 2}, "pairs": 40 * sampled}


def test_the_table_has_what_reaches_most_first_the_failures_last_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(defaults, "ARMS", dict.fromkeys(("default", "n=2", "lr=3e-5", "dpo_pairing=all"), []))
    found = {
        "n=2, seed 1": result(0.25),
        "default, seed 1": result(0.5),
        "default, seed 2": result(0.75),
        "lr=3e-5, seed 1": {"failed": "error: the DPO loss is nan"},
    }
    _, _, *lines, empty, missing = defaults.table(found).splitlines()
    assert (empty, missing) == ("", "Not run yet: `lr=3e-5`, `dpo_pairing=all`.")
    assert lines == [
        "| default | 2 | 0.625 (0.177) | 0.312 (0.088) | 25 |",
        "| `n=2` | 1 | 0.250 | 0.125 | 10 |",
        "| lr=3e-5, seed 1 | failed | error: the DPO loss is nan |  |  |",
    ]


def test_runs_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(defaults, "recorded", lambda overrides, folder: asked.append((folder.name, overrides)) or {})
    file = tmp_path / "defaults.json"
    defaults.sweep(["n=2"], [1], tmp_path, file)
    found = defaults.sweep(["n=2", "dpo_beta=0.3"], [1, 2], tmp_path, file)
    names = ["n=2, seed 1", "dpo_beta=0.3, seed 1", "n=2, seed 2", "dpo_beta=0.3, seed 2"]
    assert [name for name, _ in asked] == [slug(name) for name in names]
    assert asked[3][1] == [*seeded(2), "algorithm.dpo_beta=0.3"]
    assert json.loads(file.read_text())["runs"].keys() == found.keys()


def test_the_documents_table_is_that_of_the_recorded_runs(tmp_path):
    """It is never edited by hand."""
    file = results_file("defaults")
    found = json.loads(file.read_text())["runs"] if file.exists() else {}
    copy = tmp_path / "defaults.md"
    copy.write_text(defaults.DOCUMENT.read_text())
    defaults.write_document(found, copy)
    assert copy.read_text() == defaults.DOCUMENT.read_text()
