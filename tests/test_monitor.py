"""What RunMonitor measures of a run's processes, and how seldom it asks for what costs much."""

import os
import subprocess
import sys
import tempfile
import types
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest
from ray._common.utils import get_default_ray_temp_dir
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from recipe.spin.run import monitor as run_monitor
from recipe.spin.run.monitor import RunMonitor


@pytest.fixture
def monitor(tmp_path) -> RunMonitor:
    return RunMonitor(tmp_path)


def test_a_run_is_watched_from_its_start_and_one_on_a_joined_cluster_is_not(tmp_path, monkeypatch):
    for joins in (False, True):
        monitor, waits = RunMonitor(tmp_path, joins=joins), []

        def wait(doing: str, monitor=monitor, waits=waits) -> None:
            waits.append(doing)
            if len(waits) == 5:
                monitor._stop.set()

        monkeypatch.setattr(run_monitor, "POLL_SECONDS", 0.0)
        monkeypatch.setattr(run_monitor, "process_tree", lambda: [])
        monkeypatch.setattr(run_monitor, "_ask_task_runner", lambda: None)
        monitor._find_shared_memory = lambda processes: None
        monitor._console = types.SimpleNamespace(waits_for=wait)
        monitor._watch()
        assert set(waits) == {"starting Ray"}
        assert monitor.peak_memory_gb is None if joins else monitor.peak_memory_gb > 0.01


def test_a_look_that_fails_is_told_once_and_the_run_is_seen_to_get_on(monitor, monkeypatch):
    """Else a run would be ended for a fault of its monitor's, as one that has come to a stop."""
    told, seen = [], []

    def see(progress: dict) -> None:
        seen.append(progress)
        if len(seen) == 3:
            monitor._stop.set()

    monkeypatch.setattr(run_monitor, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(run_monitor, "process_tree", lambda: [])
    monkeypatch.setattr(run_monitor, "_ask_task_runner", lambda: {"finished": None})
    monitor._stall = types.SimpleNamespace(see=see)
    monitor._console = types.SimpleNamespace(show=lambda progress: None, warn=told.append)
    monitor._watch()
    assert len(seen) == 3 and len(told) == 1 and "TypeError" in told[0]


@pytest.mark.parametrize("user", ["ann", "DOMAIN\\ann", None])
def test_compiled_kernels_are_where_torch_has_them(monkeypatch, user):
    def getuser() -> str:
        if user is None:
            raise KeyError("uid not found")
        return user

    monkeypatch.setattr("getpass.getuser", getuser)
    try:
        expected = default_cache_dir()
    except KeyError:  # torch 2.11, of the GPU profile, knows users with names alone
        expected = f"{tempfile.gettempdir()}/torchinductor_uid_{os.getuid()}"
    assert run_monitor._compiled_kernels() == expected


@pytest.mark.parametrize(("set_by_user", "joins"), [(None, False), ("/mine", False), (None, True)])
def test_compiled_kernels_outlive_the_run(tmp_path, monkeypatch, set_by_user, joins):
    """torch keeps them below TMPDIR, which is the run's own folder and goes with it."""
    environment = {} if set_by_user is None else {"TORCHINDUCTOR_CACHE_DIR": set_by_user}
    monkeypatch.setattr(run_monitor.os, "environ", environment)
    monkeypatch.setattr(RunMonitor, "_watch", lambda self: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    expected = default_cache_dir()
    monkeypatch.setattr(run_monitor.private_folder, "base_folder", lambda: tmp_path)
    with RunMonitor(tmp_path / "logs", joins=joins):
        kept = None if joins else expected
        assert environment.get("TORCHINDUCTOR_CACHE_DIR") == (set_by_user or kept)
        assert joins or environment["TMPDIR"].startswith(f"{tmp_path}/spin-")


@pytest.mark.parametrize("joins", [False, True])
def test_the_runs_own_ray_has_its_files_in_the_runs_folder(tmp_path, monkeypatch, joins):
    """Whatever folder the user's environment names: they would stay there, and a failed run's logs not be found."""
    environment = {"RAY_TMPDIR": "/scratch/me"}
    monkeypatch.setattr(run_monitor.os, "environ", environment)
    monkeypatch.setattr(RunMonitor, "_watch", lambda self: None)
    monkeypatch.setattr(run_monitor.private_folder, "base_folder", lambda: tmp_path)
    with RunMonitor(tmp_path / "logs", joins=joins):
        where = Path(get_default_ray_temp_dir())
        assert where.parent.parent == (Path("/scratch") if joins else tmp_path)


def test_processes_end_with_the_run_and_those_from_before_it_do_not(tmp_path, monkeypatch):
    sleeper = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    monkeypatch.setattr(RunMonitor, "_watch", lambda self: None)
    wait = psutil.wait_procs
    monkeypatch.setattr(psutil, "wait_procs", lambda processes, timeout: wait(processes, 0.1 if timeout == 10 else 60))
    with subprocess.Popen(sleeper, stdin=subprocess.PIPE) as before:
        with RunMonitor(tmp_path / "logs", joins=True):
            during = subprocess.Popen(sleeper, stdin=subprocess.PIPE)
        with during:
            assert not psutil.pid_exists(during.pid)
        assert before.poll() is None


def test_a_start_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def start(folder: Path) -> None:
        assert folder.is_dir()
        raise OSError("No space left on device")

    monkeypatch.setattr(run_monitor.os, "environ", {})
    monkeypatch.setattr(run_monitor.private_folder, "base_folder", lambda: tmp_path)
    forks = types.SimpleNamespace(start=start)
    with pytest.raises(OSError, match="No space left"), RunMonitor(tmp_path / "logs", forks=forks):
        pytest.fail("it did not start")
    assert not list(tmp_path.glob("spin-*"))


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_process_whose_parent_died_ends_with_the_run_too(tmp_path, monkeypatch):
    """As workers whose fork server was killed: they are no descendants of the command any more."""
    monkeypatch.setattr(RunMonitor, "_watch", lambda self: None)
    wait = psutil.wait_procs
    monkeypatch.setattr(psutil, "wait_procs", lambda processes, timeout: wait(processes, 0.1 if timeout == 10 else 60))
    with RunMonitor(tmp_path / "logs", joins=True) as monitor:
        with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
            orphan = psutil.Process(int(parent.stdout.readline()))
            monitor._of_the_run()
            parent.kill()
        assert orphan.is_running()
    assert not orphan.is_running()


@pytest.fixture
def shared_file():
    """A file as vLLM's processes leave it, which this process has mapped."""
    memory = shared_memory.SharedMemory(create=True, size=4096)  # psm_...
    yield f"/dev/shm/{memory.name.lstrip('/')}"
    memory.close()
    memory.unlink()


def test_shared_memory_of_the_run_is_noted_though_mapped_after_it_was_made(monitor, shared_file):
    monitor._find_shared_memory([])
    assert shared_file not in monitor._shared_memory
    monitor._find_shared_memory([psutil.Process()])
    assert shared_file in monitor._shared_memory


def test_processes_are_not_asked_for_ever_about_anothers_files(monitor, shared_file, monkeypatch):
    asked = []
    monkeypatch.setattr(run_monitor, "_shared_memory", lambda process: asked.append(process) or set())
    for _ in range(20):
        monitor._find_shared_memory(["a"])
    assert len(asked) == run_monitor.LOOKS
