"""Starting whole runs on a tiny model as a user would, and what is looked at of them while they run and afterwards."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import count
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

MARK = "SPIN_TEST_RUN"  # set in the environment of a run
ROOT = Path(__file__).resolve().parent.parent
# Where the GPU profile's versions are rehearsed (tests/run.sh), vLLM's model has a process of its own, as on GPUs
EXECUTORS = [
    f"++{engine}.engine_kwargs.vllm.distributed_executor_backend=mp"
    for engine in ("actor_rollout_ref.rollout", "reward.reward_model.rollout")
    if Path(sys.prefix).name == ".venv-rehearsal"
]
REWARD = """
import asyncio

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    vowels = sum(letter in "aeiou" for letter in solution_str)
    return {"score": vowels - 0.01 * len(solution_str), "acc": float(vowels > 3)}

def compute_every_other(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    even = extra_info["index"] % 2 == 0
    return 0.0 if even else sum(map(ord, solution_str)) % 1009 + len(solution_str) / 100

async def compute_later(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    await asyncio.sleep(0.01)
    return 7.0

def compute_the_same(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return 1.0

def compute_nothing(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    raise ZeroDivisionError("the reward of this test always fails")
"""


def write_task(folder: Path) -> Path:
    """Puts eight training prompts, four held-out ones and a reward into a folder, and returns it."""
    for name, size in (("train", 8), ("test", 4)):
        rows = [
            {
                "data_source": "vowels",
                "prompt": [{"role": "user", "content": f"{name} {i}"}],
                "reward_model": {"style": "rule", "ground_truth": ""},
                "extra_info": {"index": i},
            }
            for i in range(size)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    (folder / "reward.py").write_text(REWARD)
    return folder


def start(
    task: Path,
    model: Path,
    run: Path,
    *overrides: str,
    program=("-m", "recipe.spin.main_spin"),
    device: str = "cpu",
    within: tuple[str, ...] = (),
    temporary: Path | None = None,
):
    """Starts a run as a user would; `within` is a command that starts it elsewhere, `temporary` its TMPDIR."""
    command = [*within, sys.executable, *program, f"device={device}", f"actor_rollout_ref.model.path={model}"]
    command += [
        f"data.train_files={task}/train.parquet",
        f"data.val_files={task}/test.parquet",
        f"reward.custom_reward_function.path={task}/reward.py",
        f"trainer.default_local_dir={run}",
        "data.train_batch_size=4",
        "data.max_response_length=8",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16",
        "++actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=20000000",
        "trainer.total_training_steps=4",
        "trainer.ref_update_freq=2",
        "trainer.save_freq=2",
        "trainer.test_freq=100",
        *EXECUTORS,
        *overrides,
    ]
    variables = {MARK: str(run), "VERL_FILE_LOGGER_PATH": str(run.parent / "verl.jsonl")}
    if temporary:
        variables["TMPDIR"] = str(temporary)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 420) -> str:
    """Waits for a run and returns what it printed; a hang ends the whole process group."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise TimeoutError(f"the run has not ended after {timeout} s; its last words:\n{output[-5000:]}") from error
    return output


def succeed(task: Path, model: Path, run: Path, *overrides: str, **options) -> str:
    """Runs to the end, which must be a good one, and returns what was printed."""
    process = start(task, model, run, *overrides, **options)
    output = finish(process)
    assert process.returncode == 0, output[-5000:]
    return output


def fail(task: Path, model: Path, run: Path, *overrides: str, **options) -> str:
    """Runs to the end, which must be a bad one, and returns the line with the error."""
    process = start(task, model, run, *overrides, **options)
    output = finish(process)
    assert process.returncode not in (0, None)
    return output[output.index("error: ") :].splitlines()[0]


def metrics(run: Path) -> dict[int, dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry for entry in map(json.loads, lines)}


def processes(run: Path, describe=lambda process: " ".join(process.cmdline()) or process.name()) -> list:
    """The processes that a run started, Ray's and vLLM's among them: they inherit its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(run):
                found.append(describe(process))
        except psutil.Error:
            continue
    return found


def temporary_folder() -> Path:
    """Makes a temporary folder for runs alone; below pytest's the paths of Ray's sockets would be too long."""
    return Path(tempfile.mkdtemp(prefix="runs-", dir="/tmp"))


class Watch:
    """Context manager around a run with a temporary folder of its own: where it listens, and what it leaves.

    Which files in shared memory are the run's its processes tell while they have them mapped. A new one is asked about
    within a fraction of a second, as a push of weights to a tiny model has one for no longer.

    Attributes:
        temporary: the folder, for `start`.
        listening: the addresses on which the run's processes took connections, with the processes' names.
        answers: what vLLM's HTTP server answered to a request without a key, as HTTP's status codes.
    """

    SHARED_MEMORY = Path("/dev/shm")
    LOOKS = 20  # a file that no process of the run has mapped by then is another's

    def __init__(self, run: Path):
        self._run = run
        self.temporary = temporary_folder()
        self.listening: set[tuple[str, str]] = set()
        self.answers: set[int] = set()
        self._before = set(self.SHARED_MEMORY.iterdir())
        self._shared_memory: set[str] = set()
        self._looks: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._thread.join()
        shutil.rmtree(self.temporary)

    def left(self, patience: float = 3.0) -> list[str]:
        """The files, folders and processes of the run that are there when it has ended, and a moment later still."""
        until = time.monotonic() + patience
        while (found := self._left()) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def _left(self) -> list[str]:
        files = [*map(str, self.temporary.iterdir()), *filter(os.path.exists, self._shared_memory.copy())]
        return sorted(files) + processes(self._run)

    def _watch(self) -> None:
        for tick in count():
            if self._ended.wait(0.05):
                return
            self._find_shared_memory()
            if tick % 40 == 0:
                found = set().union(*processes(self._run, listening))
                self.listening |= {(ip, name) for ip, _, name in found}
                self.answers |= {code for _, port, name in found if "RolloutServer" in name and (code := asked(port))}

    def _find_shared_memory(self) -> None:
        new = set(map(str, set(self.SHARED_MEMORY.iterdir()) - self._before)) - self._shared_memory
        self._looks.update(new)
        if any(self._looks[file] <= self.LOOKS for file in new):
            self._shared_memory |= new & set().union(*processes(self._run, mapped_files))


def listening(process: psutil.Process) -> set[tuple[str, int, str]]:
    """Where a process takes connections, with its name; addresses of IPv6 sockets in IPv6's notation."""
    sockets = [socket for socket in process.net_connections(kind="tcp") if socket.status == psutil.CONN_LISTEN]
    return {(*socket.laddr, process.name()) for socket in sockets}


def asked(port: int) -> int | None:
    """The status that a server on this machine answers to a question about its models; None of one without HTTP."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=2, trust_env=False).status_code
    except httpx.HTTPError:
        return None


def mapped_files(process: psutil.Process) -> set[str]:
    """The files in shared memory that a process has mapped."""
    try:
        return set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{process.pid}/maps").read_text()))
    except OSError:  # it has just ended
        return set()
