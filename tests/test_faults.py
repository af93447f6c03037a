"""Processes of a run killed at its moments: whichever dies, the run ends, names it and leaves nothing.

A matrix of whole runs, left out of the suite but for a sample: `bash tests/run.sh tests/test_faults.py -m "slow or
long"`.
"""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from test_end_to_end import REWARD, finish, processes, start, task, tiny_llama  # noqa: F401 - fixtures

ROOT = Path(__file__).resolve().parent.parent
SLOW_REWARD = (
    REWARD
    + """
def compute_slowly(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    import time

    time.sleep(3)
    return compute_score(data_source, solution_str, ground_truth)
"""
)
NAMES = {
    "engine": "vLLM's server 0",  # which ends with its engine
    "server": "vLLM's server 0",
    "rank": "the trainer's rank 0",
    "agent": "agent loop worker 0",
    "reward": "reward worker 0",
    "controller": "TransferQueue's controller",
    "storage": "TransferQueue's storage 0",
    "runner": "the run's task runner",
    "raylet": "Ray's node manager (raylet)",
    "gcs_server": "Ray's control service (gcs_server)",
}
MOMENTS = ("generation", "scoring", "update", "refresh", "push", "validation", "checkpoint")
SAMPLE = {("engine", "generation"), ("controller", "update")}  # in every run of the suite
CASES = [
    pytest.param(component, moment, marks=pytest.mark.slow if (component, moment) in SAMPLE else pytest.mark.long)
    for component in NAMES
    for moment in MOMENTS
]


@pytest.fixture
def run(request, monkeypatch):
    """Starts a run in a temporary folder of its own, so that what is left there is this run's; returns that folder."""
    folder = Path(f"/tmp/f{os.getpid()}")
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    yield partial(start, request.getfixturevalue("task"), request.getfixturevalue("tiny_llama")), folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("component", "moment"), CASES)
def test_a_killed_process_is_named_and_ends_the_run(component, moment, run, tmp_path, monkeypatch):
    start, temporary = run
    monkeypatch.setenv("SPIN_FAULT", f"{component}:{moment}")
    overrides = [f"trainer.val_before_train={moment == 'validation'}"]
    if moment == "scoring":
        (tmp_path / "reward.py").write_text(SLOW_REWARD)
        overrides += [f"reward.custom_reward_function.path={tmp_path}/reward.py"]
        overrides += ["reward.custom_reward_function.name=compute_slowly"]
    process = start(tmp_path / "run", *overrides, program=["-m", "faulty_run"])
    output = finish(process, timeout=240)
    assert process.returncode == 1, output[-5000:]
    last = output[output.index("error: ") :].splitlines()
    assert last[0].startswith(f"error: {NAMES[component]} (process "), output[-5000:]
    assert "same command" in last[-2] and last[-1].startswith(f"logs: {tmp_path}") and "Traceback" not in output
    assert processes(tmp_path / "run") == [] and list(temporary.iterdir()) == []
