"""Workers as forks: what asks for one gets a process as Python would have started it, but for the imports."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from recipe.spin.main_spin import IMPORTED_AT_ONCE
from recipe.spin.run.worker_forks import WorkerForks

WAIT_SECONDS = 60.0
NOTES = "import os\nnoted = (os.getpid(), os.environ.get('JOB'))\n"
WORKER = """
import atexit, json, multiprocessing, os, random, signal, sys
import numpy
import early, late
atexit.register(lambda: print("ended as Python does"))
print(json.dumps({
    "name": __name__, "arguments": sys.argv, "first_path": sys.path[0], "folder": os.getcwd(), "job": os.environ["JOB"],
    "parent": os.getppid(), "leads_its_group": os.getpgid(0) == os.getpid(), "early": early.noted, "late": late.noted,
    "children_are_told_of": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
    "numbers": [random.random(), numpy.random.rand()], "files": sorted(map(int, os.listdir("/proc/self/fd"))),
}))
sys.stderr.write(sys.stdin.read())
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def forks(tmp_path):
    """A server that imports `early` at once and `late` with the first request."""
    for name in ("early", "late"):
        (tmp_path / f"{name}.py").write_text(NOTES)
    (tmp_path / "worker.py").write_text(WORKER)
    variables = {"PYTHONPATH": str(tmp_path), "JOB": "none yet"}
    made = WorkerForks(OmegaConf.create({"env_vars": variables, "py_executable": None}), ["early"], ["late"])
    made.start(tmp_path)
    yield made
    made.stop()
    made.process.wait(WAIT_SECONDS)


def ask(forks: WorkerForks, folder: Path, code: int = 0, job: str = "7", said: str = "") -> tuple[dict, str, str]:
    """What a worker tells of itself, what it writes after that, and its errors; once it has ended."""
    (folder / "input").write_text(said)
    command = [*shlex.split(forks._runtime_env.py_executable), str(folder / "worker.py"), str(code)]
    with open(folder / "input") as given, open(folder / "out", "w") as out, open(folder / "err", "w") as errors:
        environment = {"JOB": job, "PATH": os.environ["PATH"]}
        subprocess.run(command, env=environment, cwd=folder, stdin=given, stdout=out, stderr=errors, check=True)
    deadline = time.monotonic() + WAIT_SECONDS
    while "ended" not in (text := (folder / "out").read_text()):
        assert time.monotonic() < deadline, (folder / "err").read_text()
        time.sleep(0.01)
    told, rest = text.split("\n", 1)
    return json.loads(told), rest, (folder / "err").read_text()


def test_a_fork_is_as_python_would_have_started_it(forks, tmp_path):
    worker, rest, errors = ask(forks, tmp_path, said="through standard input to standard error")
    assert worker["name"] == "__main__" and worker["arguments"] == [str(tmp_path / "worker.py"), "0"]
    assert worker["first_path"] == worker["folder"] == str(tmp_path) and worker["job"] == "7"
    assert worker["leads_its_group"] and worker["children_are_told_of"]
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


def test_the_server_ends_when_it_is_told_to_and_its_forks_go_on(forks, tmp_path):
    (tmp_path / "worker.py").write_text("import sys, time\nprint('ended', flush=True)\ntime.sleep(600)\n")
    forks_command = [*shlex.split(forks._runtime_env.py_executable), str(tmp_path / "worker.py")]
    subprocess.run(forks_command, env=os.environ | {"JOB": "7"}, stdout=subprocess.DEVNULL, check=True)
    (worker,) = psutil.Process(forks.process.pid).children()
    forks.stop()
    assert forks.process.wait(WAIT_SECONDS) == 0 and worker.is_running()
    worker.kill()


def test_the_server_ends_with_a_driver_that_was_killed(tmp_path):
    driver = (
        "import os, signal, pathlib, sys\nfrom omegaconf import OmegaConf\n"
        "from recipe.spin.run.worker_forks import WorkerForks\n"
        "forks = WorkerForks(OmegaConf.create({'env_vars': {}}), ['json'], ['json'])\n"
        "forks.start(pathlib.Path(sys.argv[1]))\nprint(forks.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", driver, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + WAIT_SECONDS
    while psutil.pid_exists(int(ended.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_module_that_cannot_be_imported_ends_the_server_with_its_name(forks, tmp_path):
    (tmp_path / "late.py").write_text("import no_such_module\n")
    command = [*shlex.split(forks._runtime_env.py_executable), str(tmp_path / "worker.py"), "0"]
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert asked.returncode == 1 and "the process that workers are forked from has ended" in asked.stderr
    assert forks.process.wait(WAIT_SECONDS) == 1
    assert forks.log.read_text().endswith("ModuleNotFoundError: No module named 'no_such_module'\n")


@pytest.mark.parametrize(
    ("device", "joins", "runtime_env", "fit"),
    [
        ("cpu", False, {"py_executable": None}, True),
        ("cpu", True, {"py_executable": None}, False),
        ("cuda", False, {"py_executable": None}, False),
        ("cpu", False, {"py_executable": "uv run"}, False),
        ("cpu", False, {"pip": ["emoji"]}, False),
    ],
)
def test_workers_are_forks_without_gpus_on_one_machine_in_its_own_environment(device, joins, runtime_env, fit):
    environment = {"env_vars": {"A": "1"}, **runtime_env}
    config = OmegaConf.create({"trainer": {"device": device}, "ray_kwargs": {"ray_init": {"runtime_env": environment}}})
    assert WorkerForks.fit(config, joins) == fit


def test_what_is_imported_at_once_does_without_ray():
    """Ray takes the numbers of its job and of its node from the environment when it is imported."""
    imports = f"import {', '.join(IMPORTED_AT_ONCE)}, sys, threading\n"
    told = "print('ray' in sys.modules, 'verl' in sys.modules, threading.active_count())"
    found = subprocess.run([sys.executable, "-c", imports + told], stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "False False 1\n"
