"""Workers as forks: what asks for one gets a process as Python would have started it, but for the imports."""

import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf
from worker_harness import compose, cpu_environment

from recipe.spin.main_spin import IMPORTED_AT_ONCE, IMPORTED_WITH_RAY
from recipe.spin.run.worker_forks import SCRIPTS, WorkerForks

WAIT_SECONDS = 60.0
NOTES = "import os\nnoted = (os.getpid(), os.environ.get('JOB'))\n"
WORKER = """
import atexit, json, multiprocessing, os, random, resource, signal, sys
import numpy
import early, late
atexit.register(lambda: print("ended as Python does"))
print(json.dumps({
    "name": __name__, "arguments": sys.argv, "paths": sys.path, "folder": os.getcwd(), "job": os.environ["JOB"],
    "pid": os.getpid(), "parent": os.getppid(),
    "leads_its_group": os.getpgid(0) == os.getpid(), "early": early.noted, "late": late.noted,
    "children_are_told_of": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
    "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "ended_first": int(open("/proc/self/oom_score_adj").read()),
    "numbers": [random.random(), numpy.random.rand()], "files": sorted(map(int, os.listdir("/proc/self/fd"))),
}))
sys.stderr.write(sys.stdin.read())
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def forks(tmp_path, monkeypatch):
    """A server that imports `early` at once and `late` with the first request."""
    for name in ("early", "late"):
        (tmp_path / f"{name}.py").write_text(NOTES)
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("JOB", "none yet")
    made = WorkerForks(OmegaConf.create({"runtime_env": {}}), ["early"], ["late"])
    made.start(tmp_path)
    yield made
    made.stop()
    made.process.wait(WAIT_SECONDS)


def client(forks: WorkerForks, *command: str) -> list[str]:
    return [*shlex.split(forks._ray_init.runtime_env.py_executable), *command]


def as_ray_starts_workers() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    Path("/proc/self/oom_score_adj").write_text("900")


def ask(forks: WorkerForks, folder: Path, code: int = 0, job: str = "7", said: str = "") -> tuple[dict, str, str]:
    """What a worker tells of itself, what it writes after that, and its errors; once it has ended."""
    (folder / "input").write_text(said)
    command = client(forks, str(folder / "worker.py"), str(code))
    options = {"env": {"JOB": job, "PATH": os.environ["PATH"]}, "cwd": folder, "preexec_fn": as_ray_starts_workers}
    with open(folder / "input") as given, open(folder / "out", "w") as out, open(folder / "err", "w") as errors:
        subprocess.run(command, stdin=given, stdout=out, stderr=errors, check=True, **options)
    deadline = time.monotonic() + WAIT_SECONDS
    while "ended as" not in (text := (folder / "out").read_text()):
        assert time.monotonic() < deadline, (folder / "err").read_text()
        time.sleep(0.01)
    told, rest = text.split("\n", 1)
    return json.loads(told), rest, (folder / "err").read_text()


def test_a_fork_is_as_python_would_have_started_it(forks, tmp_path):
    worker, rest, errors = ask(forks, tmp_path, said="through standard input to standard error")
    assert worker["name"] == "__main__" and worker["arguments"] == [str(tmp_path / "worker.py"), "0"]
    assert worker["paths"][0] == worker["folder"] == str(tmp_path) and worker["job"] == "7"
    assert str(SCRIPTS) not in worker["paths"]
    assert worker["leads_its_group"] and worker["children_are_told_of"]
    assert worker["open_files"] == 300 and worker["ended_first"] == 900
    assert worker["files"][:3] == [0, 1, 2] and len(worker["files"]) <= 4  # the last is that of the listing
    assert (rest, errors) == ("ended as Python does\n", "through standard input to standard error")


def test_what_workers_need_is_imported_once_and_in_the_environment_of_the_first(forks, tmp_path):
    first, second = (ask(forks, tmp_path, job=job)[0] for job in ("7", "8"))
    server = forks.process.pid
    assert first["parent"] == second["parent"] == server
    assert first["early"] == second["early"] == [server, "none yet"]
    assert first["late"] == second["late"] == [server, "7"] and second["job"] == "8"


def test_forks_draw_numbers_of_their_own(forks, tmp_path):
    first, second = (ask(forks, tmp_path)[0]["numbers"] for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]


def test_a_worker_that_fails_leaves_no_process_and_the_server_goes_on(forks, tmp_path):
    ask(forks, tmp_path, code=3)
    ask(forks, tmp_path)
    assert not [child for child in psutil.Process(forks.process.pid).children() if child.status() == "zombie"]
    assert forks.process.poll() is None


def test_a_client_that_was_ended_before_it_had_asked_does_no_harm(forks, tmp_path):
    for said in (b"", b'.{"command": ["worker'):
        with socket.socket(socket.AF_UNIX) as hasty:
            hasty.connect(str(tmp_path / "workers"))
            hasty.sendall(said)
    assert ask(forks, tmp_path)[0]["parent"] == forks.process.pid


def test_the_server_forks_no_more_when_it_is_paused_and_its_forks_go_on_when_it_has_ended(forks, tmp_path):
    (tmp_path / "worker.py").write_text("import time\ntime.sleep(600)\n")
    sleeper = client(forks, str(tmp_path / "worker.py"))
    subprocess.run(sleeper, stdout=subprocess.DEVNULL, check=True)
    forks.pause()
    (worker,) = psutil.Process(forks.process.pid).children()
    with subprocess.Popen(sleeper, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        forks.stop()
        assert waiting.wait(WAIT_SECONDS) == 1 and "the process that workers are forked from" in waiting.stderr.read()
    assert forks.process.wait(WAIT_SECONDS) == -signal.SIGKILL and worker.is_running()
    assert forks._ray_init.runtime_env.py_executable is None
    worker.kill()


def test_the_server_ends_with_a_driver_that_was_killed(tmp_path):
    driver = (
        "import os, signal, pathlib, sys\nfrom omegaconf import OmegaConf\n"
        "from recipe.spin.run.worker_forks import WorkerForks\n"
        "forks = WorkerForks(OmegaConf.create({'runtime_env': {}}), ['json'], ['json'])\n"
        "forks.start(pathlib.Path(sys.argv[1]))\nprint(forks.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", driver, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + WAIT_SECONDS
    while is_alive(int(ended.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_module_that_cannot_be_imported_ends_the_server_with_its_name(forks, tmp_path):
    (tmp_path / "late.py").write_text("import no_such_module\n")
    command = client(forks, str(tmp_path / "worker.py"), "0")
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert asked.returncode == 1 and "the process that workers are forked from has ended" in asked.stderr
    assert forks.process.wait(WAIT_SECONDS) == 1
    assert forks.log.read_text().endswith("ModuleNotFoundError: No module named 'no_such_module'\n")


WAITS = """
import os, time
open("{folder}/begun", "w")
while not os.path.exists("{folder}/go"):
    time.sleep(0.01)
"""


def test_no_fork_is_made_for_a_client_that_was_ended_while_it_waited(forks, tmp_path):
    """Ray ends one when its patience does, and would refuse the worker."""
    (tmp_path / "late.py").write_text(WAITS.format(folder=tmp_path) + NOTES)
    command = client(forks, str(tmp_path / "worker.py"), "0")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as impatient:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        impatient.kill()
    (tmp_path / "go").touch()
    worker, _, _ = ask(forks, tmp_path)
    said = forks.log.read_text()
    assert "a client was ended while it waited" in said and said.count("forked ") == 1
    assert f"forked {worker['pid']}" in said


@pytest.mark.parametrize(
    ("changed", "fit"),
    [
        ([], True),
        (["+ray_kwargs.ray_init.address=10.0.0.1:6379"], False),
        (["trainer.device=cuda"], False),
        (["ray_kwargs.ray_init.runtime_env.py_executable=uv run"], False),
        (["+ray_kwargs.ray_init.runtime_env.env_vars.OMP_NUM_THREADS='1'"], False),
        (["actor_rollout_ref.rollout.full_determinism=True"], False),
    ],
)
def test_workers_are_forks_without_gpus_on_a_ray_of_the_runs_own_in_the_commands_environment(changed, fit):
    assert WorkerForks.fit(compose(*changed)) == fit


IMPORTS_AND_FORKS = f"""
import {", ".join(IMPORTED_AT_ONCE)}
import os, sys, threading
print("ray" in sys.modules)
import {", ".join(IMPORTED_WITH_RAY)}
print("ray" in sys.modules, len(os.listdir("/proc/self/task")), flush=True)
import ray

def tell():
    print("drawn", ray.ObjectID.from_random().hex(), flush=True)

for _ in range(2):
    if os.fork() == 0:
        tell()
        thread = threading.Thread(target=tell)
        thread.start()
        thread.join()
        os._exit(0)
    os.wait()
"""


def test_ray_is_imported_with_the_first_worker_and_forks_share_neither_threads_nor_ids():
    """Ray takes the numbers of its job and of its node from the environment when it is imported.

    A fork would wait for ever for a lock of a thread that it does not have. Ray's generator of ids would go on in every
    fork where it was: two workers' objects would have the same names.
    """
    command = [sys.executable, "-c", IMPORTS_AND_FORKS]
    environment = cpu_environment() | {"OMP_NUM_THREADS": "2"}  # else some libraries would start no threads anyway
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = found.stdout.splitlines()
    assert "False" in lines and "True 1" in lines
    drawn = [line for line in lines if line.startswith("drawn ")]
    assert len(set(drawn)) == len(drawn) == 4
