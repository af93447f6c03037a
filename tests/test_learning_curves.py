"""The benchmark's reading, table and picture; its runs take hours and are not repeated here."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import learning_curves
from benchmarks.learning_curves import draw, read, table

VALIDATION = "val-core/arithmetic/acc/mean@4", "val-greedy-core/arithmetic/acc/mean@1"


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def arms(tmp_path):
    """Two seeds of each; the first as the recipe writes its metrics, the second as trl_online_dpo.py does."""
    ours, theirs = [], []
    for seed, gain in enumerate((0.1, 0.3)):
        start, end = (dict(zip(VALIDATION, (value, value / 2), strict=True)) for value in (0.1, 0.1 + gain))
        lines = [{"step": 0, **start}, {"step": 1, "score/mean": 0.2, "timing_s/step": 10 + seed}]
        lines.append({"step": 2, "score/mean": 0.3, "timing_s/step": 20 + seed, **end})
        ours.append(read(write(tmp_path / f"ours{seed}", lines)))
        lines = [{"step": 0, "sampled": 0.1, "greedy": 0.2}, {"step": 1, "score": 0.1, "seconds": 30}]
        lines.append({"step": 2, "score": 0.1, "seconds": 50, "sampled": 0.1, "greedy": 0.2})
        theirs.append(read(write(tmp_path / f"theirs{seed}", lines)))
    return {"ours": ours, "theirs": theirs}


def test_the_table_gives_mean_and_spread_over_seeds(arms):
    head, _, ours, theirs = table(arms).splitlines()
    assert head == "|  | step 0 | step 2 | greedy, step 2 | seconds a step, median |"
    assert ours == "| ours | 0.100 (0.000) | 0.300 (0.141) | 0.150 (0.071) | 16 |"
    assert theirs == "| theirs | 0.100 (0.000) | 0.100 (0.000) | 0.200 (0.000) | 40 |"


def test_the_picture_is_drawn(arms, tmp_path):
    draw(arms, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_all_arms_train_at_the_learning_rate_of_the_documents_table(tmp_path, monkeypatch):
    """Where the default is another by now; TRL's is declared in its own script."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    for name in ("defaults", "trl_settings", "trl_ties"):
        learning_curves.ARMS[name][1](tmp_path, 1)
    rate = "actor_rollout_ref.actor.optim.lr=1e-5"
    assert len(commands) == 3 and all(command.count(rate) == 1 for command in commands)
