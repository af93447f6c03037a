"""The report of a finished run, where something in its folder or around it is missing or broken."""

import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe.spin.preferences.source import PreferenceSource
from recipe.spin.rollout.held_out import HeldOutValidation
from recipe.spin.run import report

SAMPLED = "val-core/sums/acc/mean@4"


def put(run: Path, entries: dict[int, dict], end: str = "") -> None:
    (run / "metrics").mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "data": metrics}) + "\n" for step, metrics in entries.items()]
    (run / "metrics" / "from_step_00000000.jsonl").write_text("".join(lines) + end)


def write(run: Path) -> dict:
    report.write(OmegaConf.create({"trainer": {"default_local_dir": str(run)}}), seconds=60.0, peak_memory_gb=1.0)
    return json.loads((run / "summary.json").read_text())


GOOD = {0: {SAMPLED: 0.1}, 1: {"score/mean": 0.1}, 2: {"score/mean": 0.2, SAMPLED: 0.5}}


def test_a_run_in_order(tmp_path, capsys):
    put(tmp_path, GOOD)
    summary = write(tmp_path)
    assert (summary["before"], summary["after"], summary["steps"]) == ({"sampled": 0.1}, {"sampled": 0.5}, 2)
    assert summary["unreadable_metrics_lines"] == 0
    output = capsys.readouterr().out
    assert "sampled:  0.100 before, 0.500 after" in output and str(tmp_path / report.PLOT) in output
    assert (tmp_path / report.PLOT).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", [None, type(sys)("matplotlib")])  # not installed; broken
def test_a_plot_that_cannot_be_made_is_said(tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "matplotlib", missing)
    put(tmp_path, GOOD)
    assert write(tmp_path)["after"] == {"sampled": 0.5}
    assert "plot:    none could be made" in capsys.readouterr().out
    assert not (tmp_path / report.PLOT).exists()


def test_the_summary_is_there_before_the_plot(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "plot", stop)
    put(tmp_path, GOOD)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2


def test_a_score_that_is_no_number(tmp_path, capsys):
    """verl writes NaN as null."""
    put(tmp_path, GOOD | {2: {"score/mean": None, SAMPLED: None, "val-core/more/acc/mean@4": 0.5}})
    assert write(tmp_path)["after"] == {"sampled": None}
    output = capsys.readouterr().out
    assert "0.100 before, not a number after" in output and str(tmp_path / report.PLOT) in output


def test_a_line_that_a_kill_cut_off(tmp_path, capsys):
    put(tmp_path, GOOD, end='{"step":3,"da')
    assert write(tmp_path)["unreadable_metrics_lines"] == 1
    assert "1 lines in" in capsys.readouterr().out


def test_a_validation_after_training_alone_is_not_called_before(tmp_path, capsys):
    put(tmp_path, {1: {}, 2: {SAMPLED: 0.5}})
    summary = write(tmp_path)
    assert (summary["before"], summary["after"]) == ({}, {"sampled": 0.5})
    assert "sampled:  not measured before, 0.500 after" in capsys.readouterr().out


def test_no_metrics_at_all(tmp_path):
    (tmp_path / "metrics").mkdir()
    summary = write(tmp_path)
    assert (summary["before"], summary["after"], summary["steps"]) == ({}, {}, 0)


@pytest.mark.parametrize(("variable", "measure"), [("acc", "accuracy"), ("reward", "score"), ("win_rate", "win rate")])
def test_the_report_names_what_was_measured(tmp_path, capsys, variable, measure):
    name = f"val-core/sums/{variable}/mean@4"
    put(tmp_path, {0: {name: 0.25}, 4: {name: 0.5}})
    assert write(tmp_path)["measure"] == measure
    assert f"held-out {measure}, sampled:  0.250 before, 0.500 after" in capsys.readouterr().out


def test_what_failed_in_validations_is_told(tmp_path, capsys):
    failed, unscored = "val-failed/answers", "val-aux/prompts_without_score"
    put(tmp_path, {0: {SAMPLED: 0.1, failed: 0.0}, 2: {SAMPLED: 0.5, failed: 0.0}})
    assert write(tmp_path)["held_out_faults"] == {}
    assert "held-out answers failed" not in capsys.readouterr().out
    put(tmp_path, {0: {failed: 0.031, unscored: 2}, 2: {failed: 0.25}, 4: {failed: 0.0, unscored: None}})
    assert write(tmp_path)["held_out_faults"] == {"0": {failed: 0.031, unscored: 2}, "2": {failed: 0.25}}
    output = capsys.readouterr().out
    assert "  25.0% of the held-out answers failed at step 2, or fewer at 1 other validations\n" in output
    assert "  2 held-out prompts have a response without a score at step 0\n" in output


class VerlsValidation:
    def _validate(self) -> dict:
        return {"val-core/sums/acc/mean@4": 0.5, "val-failed/answers": 0.25, "val-aux/prompts_without_score": 0}


class Trainer(HeldOutValidation, VerlsValidation):
    global_steps, val_dataloader = 8, []
    source = PreferenceSource(None, None)
    config = OmegaConf.create(
        {"actor_rollout_ref": {"rollout": {"val_kwargs": {"n": 4, "do_sample": True, "temperature": 1.0}}}}
    )

    def __init__(self):
        self.progress = {"step": 7}


def test_the_console_gets_to_know_what_failed_in_a_validation():
    trainer = Trainer()
    assert trainer._validate()["val-core/sums/acc/mean@4"] == 0.5 and trainer.val_dataloader == []
    assert trainer.progress == {"step": 7, "validation": {"step": 8, "faults": {"val-failed/answers": 0.25}}}
