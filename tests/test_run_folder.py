"""What a run's folder holds: which checkpoints may go, and the metrics of all parts of a run as one history."""

import json
from pathlib import Path

import pytest

from recipe.spin.run_folder import TRACKER, checkpoints, next_metrics_file, prune, read_history


def make_checkpoints(folder: Path, *names: str, tracked: str | None = None) -> None:
    for name in names:
        (folder / name / "actor").mkdir(parents=True)
    if tracked is not None:
        (folder / TRACKER).write_text(tracked)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("global_step_*"))


@pytest.mark.parametrize(
    ("before", "keep", "after"),
    [
        ([10, 50], -1, [10, 50]),
        ([10, 50], 0, [10, 50]),
        ([10, 20, 50], None, [10, 20, 50]),
        ([100, 150, 30, 40, 50], 2, [40, 50, 100, 150]),  # of a run that went further
        ([40, 45, 100, 50], 1, [50, 100]),  # 100 was cut off while it was saved
        ([9, 10, 11, 50], 3, [10, 11, 50]),  # by number, not by name
    ],
)
def test_the_newest_up_to_this_step_stay(tmp_path, before, keep, after):
    make_checkpoints(tmp_path, *(f"global_step_{step}" for step in before), tracked="50")
    prune(tmp_path, 50, keep)
    assert list(checkpoints(tmp_path)) == after


def test_the_one_that_the_tracker_names_stays(tmp_path):
    """It is the newest complete one where a save has not come to its end."""
    make_checkpoints(tmp_path, "global_step_10", "global_step_20", "global_step_30", tracked="10")
    prune(tmp_path, 30, 1)
    assert list(checkpoints(tmp_path)) == [10, 30]


@pytest.mark.parametrize("name", ["global_step_best", "global_step_50_1", "global_step_007", "global_step_", "other"])
def test_what_the_user_put_there_stays(tmp_path, name):
    make_checkpoints(tmp_path, name, "global_step_40", "global_step_50", tracked="50")
    prune(tmp_path, 50, 1)
    assert (tmp_path / name).is_dir() and list(checkpoints(tmp_path)) == [50]


def test_a_link_is_the_users(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = tmp_path / "run"
    make_checkpoints(run, "global_step_50", tracked="50")
    (run / "global_step_10").symlink_to(elsewhere)
    prune(run, 50, 1)
    assert left(run) == ["global_step_10", "global_step_50"]


# ---- metrics ---------------------------------------------------------------------------------------------------------
def write_part(folder: Path, name: str, steps, score: float, end: str = "") -> None:
    (folder / "metrics").mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "data": {"score/mean": score}}) + "\n" for step in steps]
    (folder / "metrics" / name).write_text("".join(lines) + end)


def scores(folder: Path) -> dict[int, float]:
    return {step: metrics["score/mean"] for step, metrics in read_history(folder)[0].items()}


def test_what_a_resumed_part_repeated_counts_once(tmp_path):
    write_part(tmp_path, "from_step_00000000.jsonl", range(4), 0.1)
    write_part(tmp_path, "from_step_00000002.jsonl", [3], 0.2)
    assert scores(tmp_path) == {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.2}


def test_each_part_has_a_file_of_its_own(tmp_path):
    """Two parts from one step: what the first one measured at that step is not lost to the second."""
    first = next_metrics_file(tmp_path, 2)
    write_part(tmp_path, first.name, [2, 3], 0.1)
    second = next_metrics_file(tmp_path, 2)
    write_part(tmp_path, second.name, [3], 0.2)
    assert (first.name, second.name) == ("from_step_00000002.jsonl", "from_step_00000002-2.jsonl")
    for _ in range(9):  # by number, not by name
        write_part(tmp_path, next_metrics_file(tmp_path, 2).name, [3], 0.3)
    assert scores(tmp_path) == {2: 0.1, 3: 0.3}
    assert next_metrics_file(tmp_path, 0).name == "from_step_00000000.jsonl"


@pytest.mark.parametrize(
    "line",
    ['{"step":3,"da', "[]", "null", '{"step":3}', '{"step":"x","data":{}}', '{"step":1,"data":5}']
    + ['{"step":Infinity,"data":{}}'],
)
def test_lines_that_are_no_metrics_are_counted(tmp_path, line):
    write_part(tmp_path, "from_step_00000000.jsonl", range(3), 0.1, end=line)
    write_part(tmp_path, "from_step_00000002.jsonl", [3], 0.2)
    (tmp_path / "metrics" / "from_step_old.jsonl").write_text("another's")
    history, unreadable = read_history(tmp_path)
    assert list(history) == [0, 1, 2, 3] and unreadable == 1
