"""The watch for a run whose processes live, and which does not get on."""

import signal
import subprocess
import time

import psutil
import pytest

from recipe.spin.run import stall
from recipe.spin.run.stall import Stall


@pytest.fixture
def clock(monkeypatch):
    now = {"s": 100.0}
    monkeypatch.setattr(stall.time, "monotonic", lambda: now["s"])
    return now


def progress(step: int, **more) -> dict:
    return {"step": step, "doing": "training", "total": 9, "metrics": {}, "finished": ()} | more


def test_a_run_that_does_the_same_for_too_long_has_stalled(clock):
    watch = Stall(60.0)
    for seconds, seen, expected in (
        (50, None, None),
        (5, progress(0, doing="loading the model"), None),
        (59, progress(0, doing="loading the model"), None),
        (0, progress(3, phase="gen", answering=12), None),
        (59, progress(3, phase="gen", answering=11), None),
        (59, progress(3, phase="update_actor", answering=0), None),
        (59, progress(4, phase=""), None),
        (61, progress(4, phase=""), "61 s: training after step 4"),
        (0, progress(4, phase="gen", answering=2), None),
        (70, None, r"70 s: training (gen) after step 4, 2 prompts waiting for answers"),
    ):
        clock["s"] += seconds
        watch.see(seen)
        found = watch.what([])
        assert (found is None) if expected is None else f"has not got on for {expected}. Where" in found
    assert found.endswith("raise trainer.stall_timeout_s=60, or set null")


def test_a_start_that_does_not_get_on_has_stalled_too(clock):
    watch = Stall(60.0)
    clock["s"] += 61
    watch.see(None)
    assert "61 s: starting." in watch.what([])


def test_without_a_limit_none_has(clock):
    watch = Stall(None)
    clock["s"] += 1e9
    assert watch.what([]) is None


def test_processes_that_are_stopped_are_named():
    with subprocess.Popen(["sleep", "60"]) as stopped, subprocess.Popen(["sleep", "60"]) as runs:
        stopped.send_signal(signal.SIGSTOP)
        processes = [psutil.Process(one.pid) for one in (stopped, runs)]
        while processes[0].status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        found = Stall(0.0).what(processes)
        for one in (stopped, runs):
            one.kill()
    assert f"; process {stopped.pid} (sleep) is stopped." in found and str(runs.pid) not in found
    assert "is stopped" not in Stall(0.0).what(processes)  # they are gone
