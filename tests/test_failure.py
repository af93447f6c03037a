"""What a failed run's last lines say: the cause, the remedy, the logs; and the signals that stop a run."""

import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from checkable_run import composed, override
from omegaconf import OmegaConf
from ray.exceptions import RayTaskError

from recipe.spin.main_spin import _check_by_verl
from recipe.spin.run import failure, signals
from recipe.spin.run.check import ConfigError
from recipe.spin.run.failure import RunFailed, explained

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ray_logs(tmp_path, monkeypatch) -> Path:
    logs = tmp_path / "ray"
    logs.mkdir()
    monkeypatch.setattr(failure, "ray_logs", lambda: logs)
    return logs


def refusal(logs: Path, error: BaseException) -> list[str]:
    with pytest.raises(RunFailed) as caught, explained(logs):
        raise error
    return str(caught.value).splitlines()


@pytest.mark.parametrize("error", [ValueError("n is 1"), OSError(28, "No space left on device", "/data/x")])
def test_the_cause_the_remedy_and_the_logs_are_the_last_lines(tmp_path, ray_logs, error):
    lines = refusal(tmp_path / "run" / "logs", error)
    assert lines[0] == f"{type(error).__name__}: {error}"
    assert "same command" in lines[-2] and str(tmp_path / "run" / "logs") in lines[-1]
    assert len(lines) == 3
    assert "Traceback" in (tmp_path / "run" / "logs" / "error.txt").read_text()


def test_what_the_agent_loop_logged_is_the_cause_and_only_of_this_run(tmp_path, ray_logs):
    error = RayTaskError("run", "Traceback\n  File x\nRuntimeError: generating or scoring failed", RuntimeError("x"))
    older = tmp_path / "run" / "logs"
    older.mkdir(parents=True)
    (older / "worker-1.err").write_text("Error in _run_prompt\nKeyError: 'an older run'\n")
    assert refusal(older, error)[0] == "RuntimeError: generating or scoring failed"
    (ray_logs / "worker-1.err").write_text("ERROR: Error in _run_prompt for uid=1\n  File y\na.b.MyError: in a.b: it\n")
    assert refusal(older, error)[0] == "MyError: in a.b: it"


def test_a_full_disk_is_named_whatever_the_error_says(tmp_path, ray_logs, monkeypatch):
    """torch.save on a full disk says "unexpected pos 576 vs 470"."""
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    lines = refusal(tmp_path / "run" / "logs", RuntimeError("unexpected pos 576 vs 470"))
    assert any("No space is left" in line and str(tmp_path) in line for line in lines)


def test_logs_that_cannot_be_written_hide_nothing(tmp_path, ray_logs):
    (tmp_path / "run").write_text("a file, no folder")
    lines = refusal(tmp_path / "run" / "logs", ValueError("the cause"))
    assert lines[0] == "ValueError: the cause" and "cannot be written" in lines[-1]


def test_a_stop_is_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), explained(tmp_path):
        raise KeyboardInterrupt


def test_what_verl_refuses_is_one_message():
    """verl's own checks are assertions and errors of its dataclasses."""
    config = override(composed("cpu"), ["actor_rollout_ref.actor.loss_agg_mode=nonsense", "data.train_batch_size=4"])
    OmegaConf.resolve(config)
    with pytest.raises(ConfigError, match=r"verl refuses these settings: (?s:.*)nonsense"):
        _check_by_verl(config)


# ---------------------------------------------------------------------- signals

STOPPED = """
import os, signal, sys, time
from recipe.spin.run import signals
signals.honor()
import ray
with signals.kept_from_ray():
    import ray._private.utils
    ray._private.utils.set_sigterm_handler(lambda number, frame: sys.exit(number))  # as ray.init does
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(30)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)  # a second one must not cut the cleaning up
        time.sleep(0.01)
        print("cleaned up", signals.received, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_by_an_exception_while_ray_starts_too(number):
    command = [sys.executable, "-c", STOPPED, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"cleaned up [{int(number)}]\n" and done.returncode == 0, done.stderr


def test_nohup_is_left_alone(monkeypatch):
    installed = {}
    monkeypatch.setattr(signals.signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signals.signal, "signal", lambda number, handler: installed.update({number: handler}))
    signals.honor()
    assert set(installed) == {signal.SIGINT, signal.SIGTERM}


def test_a_stop_that_a_library_swallowed_is_raised_again(monkeypatch):
    signals.raise_received()
    monkeypatch.setattr(signals, "received", [signal.SIGTERM])
    with pytest.raises(KeyboardInterrupt):
        signals.raise_received()
