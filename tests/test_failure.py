"""What a failed run's last lines say: the cause, the remedy, the logs; and the signals that stop a run."""

import os
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

from recipe.spin.common.settings import ConfigError
from recipe.spin.main_spin import _check_by_verl
from recipe.spin.run import failure, signals
from recipe.spin.run.failure import CannotGoOn, RunFailed, explained

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ray_logs(tmp_path, monkeypatch) -> Path:
    logs = tmp_path / "ray"
    logs.mkdir()
    monkeypatch.setattr(failure, "ray_logs", lambda: logs)
    monkeypatch.setattr(failure, "job_id", lambda: "01000000")
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


TRAINING = "00000003-00000001"
HELD_OUT = "0b5c8f0e-6a57-4d0c-9a46-1f2f3c1d2e4a"
SCORING_FAILED = "step 3: 7 of 8 prompts have responses, 7 of them all 2: generating or scoring the others failed"
HELD_OUT_FAILED = "step 4: 2 of 8 held-out answers failed, and trainer.max_failed_validation=0.1 is the share that may"
NOTHING_LEFT = "Sync replay buffer selected terminal groups with no materializable trajectories."


def remote(message: str) -> RayTaskError:
    """An exception of the task runner, as the driver gets it."""
    return RayTaskError("run", f"Traceback\n  File x\nRuntimeError: {message}", RuntimeError(message))


def log(folder: Path, error: str, uid: str, *, job: str = "01000000", worker: str = "a", second: int = 0) -> None:
    """Adds what the agent loop's worker says of a prompt that failed, in Ray's name for its file."""
    time = f"2026-11-25 03:20:{second:02},554"
    with open(folder / f"worker-{worker}-{job}-17.err", "a") as file:
        file.write(f"ERROR:{time}:Error in _run_prompt for uid={uid}\n  File y\n{error}\nWARNING:{time}:more\n")


@pytest.mark.parametrize(
    ("mode", "begins"),
    [
        ("auto", "goes on from the last checkpoint."),
        ("resume_path", "begins at trainer.resume_from_path again; trainer.resume_mode=auto goes on from the last"),
        ("disable", "begins anew; trainer.resume_mode=auto goes on from the last checkpoint."),
    ],
)
def test_what_the_same_command_does_is_said_as_it_is(tmp_path, ray_logs, mode, begins):
    with pytest.raises(RunFailed, match=begins), explained(tmp_path, go_on=failure.same_command(mode)):
        raise ValueError("n is 1")


@pytest.mark.parametrize("message", [SCORING_FAILED, NOTHING_LEFT])
def test_what_the_agent_loop_logged_is_the_cause_and_only_of_this_run(tmp_path, ray_logs, message):
    older = tmp_path / "run" / "logs"
    older.mkdir(parents=True)
    log(older, "KeyError: 'an older run'", TRAINING)
    assert refusal(older, remote(message))[0] == f"RuntimeError: {message}"
    log(ray_logs, "a.b.MyError: in a.b: it", TRAINING)
    assert refusal(older, remote(message))[0] == "MyError: in a.b: it"


@pytest.mark.parametrize("message", [SCORING_FAILED, HELD_OUT_FAILED, NOTHING_LEFT])
def test_where_to_look_for_why_prompts_failed_on_another_node(tmp_path, ray_logs, monkeypatch, message):
    assert len(refusal(tmp_path, remote(message))) == 3  # of one machine
    monkeypatch.setattr(failure, "has_other_nodes", lambda: True)
    lines = refusal(tmp_path, remote(message))
    assert len(lines) == 4 and lines[1].endswith(f"there: grep -rA 30 'Error in _run_prompt' {ray_logs}")
    log(ray_logs, "ValueError: here", HELD_OUT if message == HELD_OUT_FAILED else TRAINING)
    assert len(refusal(tmp_path, remote(message))) == 3


def test_ray_is_not_asked_about_nodes_when_it_may_be_what_died(tmp_path, ray_logs, monkeypatch):
    monkeypatch.setattr(failure, "has_other_nodes", lambda: pytest.fail("a dead control service answers nobody"))
    died = CannotGoOn("Ray's control service (gcs_server) (process 7) died")
    assert refusal(tmp_path, died)[0] == str(died)


def test_the_whole_error_holds_what_the_users_code_raised(tmp_path, ray_logs):
    log(ray_logs, "ValueError: in the user's reward", TRAINING)
    refusal(tmp_path, remote(SCORING_FAILED))
    assert (tmp_path / "error.txt").read_text().endswith("  File y\nValueError: in the user's reward\n")
    refusal(tmp_path, remote("CUDA out of memory"))
    assert "ValueError" not in (tmp_path / "error.txt").read_text()


def test_of_the_jobs_on_a_cluster_the_runs_own_is_told(tmp_path, ray_logs, monkeypatch):
    monkeypatch.setattr(failure, "job_id", lambda: "0f000000")
    log(ray_logs, "KeyError: 'another job'", TRAINING, job="03000000")
    assert refusal(tmp_path, remote(SCORING_FAILED))[0] == f"RuntimeError: {SCORING_FAILED}"
    log(ray_logs, "ValueError: its own", TRAINING, job="0f000000", worker="b", second=9)
    assert refusal(tmp_path, remote(SCORING_FAILED))[0] == "ValueError: its own"


def test_a_held_out_prompt_that_was_let_pass_is_not_the_cause_of_what_fails_later(tmp_path, ray_logs):
    log(ray_logs, "KeyError: 'let pass'", HELD_OUT)
    assert refusal(tmp_path, remote("CUDA out of memory"))[0] == "RuntimeError: CUDA out of memory"
    assert refusal(tmp_path, remote(SCORING_FAILED))[0] == f"RuntimeError: {SCORING_FAILED}"
    log(ray_logs, "ValueError: first", TRAINING, worker="b", second=1)
    log(ray_logs, "ValueError: second", TRAINING, second=2)
    assert refusal(tmp_path, remote(SCORING_FAILED))[0] == "ValueError: first"


def test_held_out_answers_that_failed_are_told_by_the_last(tmp_path, ray_logs):
    log(ray_logs, "KeyError: 'let pass'", HELD_OUT, worker="b", second=1)
    log(ray_logs, "KeyError: 'too many'", HELD_OUT, worker="a", second=2)
    log(ray_logs, "ValueError: of training", TRAINING, worker="c", second=3)
    assert refusal(tmp_path, remote(HELD_OUT_FAILED))[0] == "KeyError: 'too many'"


def test_an_error_of_the_agent_loop_that_names_no_prompt_counts(tmp_path, ray_logs):
    (ray_logs / "worker-a-01000000-17.err").write_text(
        "ERROR:2026-11-25 03:20:03,554:Error in _run_prompt: away\n  File y\nConnectionError: away\n"
    )
    assert refusal(tmp_path, remote(SCORING_FAILED))[0] == "ConnectionError: away"


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
from recipe.spin import verl_patches
from recipe.spin.run import signals
signal.signal(int(sys.argv[1]), signal.SIG_DFL)  # whatever the tests' own parent ignores
signals.honor()
import ray
with verl_patches.sigterm_kept_from_ray():
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"cleaned up [{int(number)}]\n" and done.returncode == 0, done.stderr


def test_no_signal_cuts_what_cleans_up_and_afterwards_they_stop_again():
    before = signal.signal(signal.SIGTERM, signals._stop)
    try:
        with signals.held_off():
            os.kill(os.getpid(), signal.SIGTERM)
        assert not signals.received and signal.getsignal(signal.SIGTERM) == signals._stop
    finally:
        signal.signal(signal.SIGTERM, before)


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
