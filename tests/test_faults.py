"""Processes of a run killed at its moments: whichever dies, the run ends, names it and leaves nothing.

A matrix of whole runs, left out of the suite but for a sample: `bash tests/run.sh tests/test_faults.py -m "slow or
long"`.
"""

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from whole_runs import finish, metrics, processes, start

ROOT = Path(__file__).resolve().parent.parent
REWARDS = """
import asyncio
import time

def compute_slowly(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    time.sleep(3)
    return float(len(solution_str))

def compute_none(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return None

def compute_for_ever(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    while True:
        time.sleep(1)

def compute_without_pause(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    while True:
        pass

async def compute_later(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    await asyncio.sleep(1e6)

async def compute_alone(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    time.sleep(1e6)  # nor does anything else in this reward's process go on

def compute_sometimes(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    if sum(map(ord, solution_str)) % 4 == 0:
        raise ValueError("of no use")
    return float(len(solution_str))
"""
NEVER = "did not return within algorithm.reward_timeout_s=5 s"
FAILING_REWARDS = {
    "compute_none": "returned None, which is no finite number,",
    "compute_for_ever": NEVER,
    "compute_without_pause": NEVER,
    "compute_later": NEVER,
    "compute_alone": NEVER,
    "compute_sometimes": "raised ValueError: of no use",
}
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
SAMPLE = {("engine", "generation")}  # in every run of the suite
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


def reward(folder: Path, name: str) -> list[str]:
    (folder / "reward.py").write_text(REWARDS)
    function = "reward.custom_reward_function"
    return [f"{function}.path={folder}/reward.py", f"{function}.name={name}"]


def last_lines(process, folder: Path) -> list[str]:
    """What a run said in the end that failed as it should."""
    output = finish(process, timeout=240)
    assert process.returncode == 1 and "Traceback" not in output, output[-5000:]
    lines = output[output.index("error: ") :].splitlines()
    assert "same command" in lines[-2] and lines[-1].startswith(f"logs: {folder}"), output[-5000:]
    return lines


@pytest.mark.parametrize(("component", "moment"), CASES)
def test_a_killed_process_is_named_and_ends_the_run(component, moment, run, tmp_path, monkeypatch):
    start, temporary = run
    monkeypatch.setenv("SPIN_FAULT", f"{component}:{moment}")
    overrides = [f"trainer.val_before_train={moment == 'validation'}", "trainer.total_training_steps=150"]
    if moment == "scoring":
        overrides += reward(tmp_path, "compute_slowly")
    process = start(tmp_path / "run", *overrides, program=["-m", "faulty_run"])
    assert last_lines(process, tmp_path)[0].startswith(f"error: {NAMES[component]} (process ")
    assert processes(tmp_path / "run") == [] and list(temporary.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize(("name", "words"), FAILING_REWARDS.items(), ids=FAILING_REWARDS)
def test_a_reward_that_fails_is_named_and_ends_the_run(name, words, run, tmp_path):
    start, temporary = run
    overrides = ["algorithm.reward_timeout_s=5", "trainer.val_before_train=False", *reward(tmp_path, name)]
    process = start(tmp_path / "run", *overrides)
    (error, *_) = last_lines(process, tmp_path)
    assert f"{name} of {tmp_path}/reward.py {words} for response" in error and "to the prompt 'train " in error
    assert processes(tmp_path / "run") == [] and list(temporary.iterdir()) == []


@pytest.mark.long
def test_a_reward_that_fails_now_and_then_can_be_tolerated(run, tmp_path):
    start, _ = run
    process = start(tmp_path / "run", "algorithm.reward_error=skip", *reward(tmp_path, "compute_sometimes"))
    output = finish(process)
    assert process.returncode == 0, output[-5000:]
    missing = [entry["score/missing"] for step, entry in metrics(tmp_path / "run").items() if step]
    assert len(missing) == 4 and 0 < sum(missing) < 4 * 8


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_can_be_stopped_while_ray_starts(number, run, tmp_path):
    start, temporary = run
    process = start(tmp_path / "run")
    deadline = time.monotonic() + 120
    while not list(temporary.glob("spin-*/ray/session_*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    output = finish(process, timeout=120)
    assert process.returncode == 128 + number and "the same command goes on" in output, output[-5000:]
    assert processes(tmp_path / "run") == [] and list(temporary.iterdir()) == []
