"""Around a run: its progress, the peak memory of its processes, a folder of its own, and nothing left behind."""

import getpass
import os
import re
import shutil
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import gettempdir

import psutil
import ray

from recipe.spin.rollout.validation_metrics import History
from recipe.spin.run import private_folder, signals
from recipe.spin.run.console import Console
from recipe.spin.run.drift import Drift
from recipe.spin.run.process_memory import NeededMemory, PeakMemory, PrivateMemory
from recipe.spin.run.stall import Stall
from recipe.spin.run.worker_forks import WorkerForks

TASK_RUNNER = "spin_task_runner"
POLL_SECONDS = 2.0
LOOKS = 5  # a file that no process of the run has mapped by then is another's
SHARED_MEMORY = re.compile(r"/dev/shm/(?:psm|verl_weights)_\w+")
NO_FILE_NAME = re.compile(r'[\\/:*?"<>|]')
LOGS_OF_A_CLUSTER = "on each node, in /tmp/ray/session_latest/logs (below --temp-dir where Ray was started with one)"


def _compiled_kernels() -> str:
    """Where torch keeps compiled kernels unless TMPDIR says otherwise; to ask its Inductor costs seconds of imports."""
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # a container's user without a name
        user = f"uid_{os.getuid()}"
    return f"{gettempdir()}/torchinductor_{NO_FILE_NAME.sub('_', user)}"


class RunMonitor:
    """Context manager around a run; a thread of the driver asks the TaskRunner how far it is.

    Gives Ray, vLLM and their workers one private folder for sockets and logs, and removes it when the run ends,
    together with the shared memory that vLLM's processes leave when Ray ends them. On a cluster that the run joins
    (`joins`) those processes are not the driver's: they have the cluster's folder, and their memory is not measured.

    Attributes:
        seconds: length of the run.
        logs: where the workers' logs are when the run has failed.
        peak_memory_gb: the most that this process and its descendants (Ray's and vLLM's among them) were seen to
            need, in 10^9 bytes (process_memory.py). None on a cluster that the run joins.
    """

    def __init__(
        self,
        log_folder: Path,
        device: str = "cpu",
        joins: bool = False,
        history: History | None = None,
        forks: WorkerForks | None = None,
        stall_seconds: float | None = None,
    ):
        """log_folder: gets Ray's logs if the run fails, in place of an older run's. device: what the run trains on.
        history: metrics of the run's earlier parts. forks: what Ray's workers come from, if not from Ray.
        stall_seconds: after which a run that does not get on is `stalled`."""
        self._joins = joins
        self._forks = forks
        self.logs = LOGS_OF_A_CLUSTER if joins else str(log_folder)
        self.seconds = 0.0
        self._stop = threading.Event()
        self._has_started = self._has_failed = False
        self._thread = threading.Thread(target=self._watch, name="run-monitor", daemon=True)
        self._console = Console()
        self._drift = Drift(history)
        self._stall = Stall(stall_seconds)
        self._log_folder = log_folder
        self._folder: Path | None = None
        self._not_of_the_run: set[psutil.Process] = set()
        self._alive: set[psutil.Process] = set()  # of the run; those whose parent died are in no tree any more
        self._shared_memory: set[str] = set()
        self._looks: Counter[str] = Counter()
        self._memory = PeakMemory(NeededMemory(), 20.0) if device == "cpu" else PeakMemory(PrivateMemory(), 10.0)

    @property
    def peak_memory_gb(self) -> float | None:
        return None if self._joins else self._memory.bytes / 1e9

    def __enter__(self) -> "RunMonitor":
        self._started = time.monotonic()
        self._not_of_the_run = set(process_tree())
        shutil.rmtree(self._log_folder, ignore_errors=True)
        with ExitStack() as if_it_fails:  # there is no __exit__ then
            if not self._joins:
                os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _compiled_kernels())  # they serve the next run too
                self._folder, self._lock = private_folder.make()
                if_it_fails.callback(self._remove_folder)
                # Ray reads RAY_TMPDIR, which Slurm's users often set, before TMPDIR
                os.environ.update(dict.fromkeys(("TMPDIR", "RAY_TMPDIR", "VLLM_RPC_BASE_PATH"), str(self._folder)))
                if self._forks:
                    self._forks.start(self._folder)
            self._thread.start()
            if_it_fails.pop_all()
        return self

    def stalled(self) -> str | None:
        """What a run was doing that has not got on for too long; None for any other."""
        return self._stall.what(self._alive)

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.seconds = time.monotonic() - self._started
        with signals.held_off():
            self._end(failed=exception_type is not None)

    def _end(self, failed: bool) -> None:
        self._stop.set()
        self._thread.join(timeout=3 * POLL_SECONDS)  # a question to a Ray that died is answered late or never
        progress = None if failed else _ask_task_runner()
        if progress is not None:
            self._warn_of_drift(progress)
        self._console.close(progress)
        if self._forks:
            self._forks.pause()
        processes = self._of_the_run()  # before the server ends, whose forks are then nobody's children
        if self._forks:
            self._forks.stop()
        ray.shutdown()
        _, alive = psutil.wait_procs(processes, timeout=10)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)
        if not self._joins:
            if failed:
                self._keep_logs()
            self._remove_folder()
        for file in self._shared_memory:
            Path(file).unlink(missing_ok=True)

    def _of_the_run(self) -> list[psutil.Process]:
        """The run's processes but for this one."""
        found = self._alive.union(process_tree()) - self._not_of_the_run
        self._alive = {process for process in found if process.is_running()}
        return list(self._alive)

    def _keep_logs(self) -> None:
        logs = self._folder / "ray" / "session_latest" / "logs"
        try:
            self._log_folder.mkdir(parents=True, exist_ok=True)
            if self._forks:
                shutil.copy(self._forks.log, self._log_folder)
            if logs.is_dir():
                shutil.copytree(logs, self._log_folder, dirs_exist_ok=True, ignore_dangling_symlinks=True)
        except OSError as error:  # a full disk, which must not hide what the run failed by
            self._console.warn(f"not all logs could be kept in {self._log_folder}: {str(error)[:200]}")

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                self._look()
            except Exception as error:  # of the monitor's own; without it no run could be seen to get on
                if not self._has_failed:
                    self._has_failed = True
                    self._console.warn(f"progress, warnings and memory may lack something: {error!r:.200}")

    def _look(self) -> None:
        progress = _ask_task_runner()
        self._stall.see(progress)
        processes = self._of_the_run()
        if not self._joins:
            self._memory.see([psutil.Process(), *processes])
        self._find_shared_memory(processes)
        if progress is not None:
            self._has_started = True
            self._show(progress)
        elif not self._has_started:
            self._console.waits_for("starting the task runner" if ray.is_initialized() else "starting Ray")

    def _show(self, progress: dict) -> None:
        self._console.show(progress)
        self._warn_of_drift(progress)

    def _warn_of_drift(self, progress: dict) -> None:
        for step, metrics in progress["finished"]:  # those seen before say nothing
            for warning in self._drift.see(step, metrics):
                self._console.warn(warning)

    def _find_shared_memory(self, processes: list[psutil.Process]) -> None:
        """Notes the files in shared memory that are this run's; asks the processes only while there are new ones."""
        unknown = set(filter(SHARED_MEMORY.fullmatch, map(str, Path("/dev/shm").iterdir()))) - self._shared_memory
        self._looks.update(unknown)
        if any(self._looks[file] <= LOOKS for file in unknown):
            known = len(self._shared_memory)
            self._shared_memory.update(*map(_shared_memory, processes))
            if self._folder and len(self._shared_memory) > known:
                self._note_shared_memory()

    def _note_shared_memory(self) -> None:
        try:
            private_folder.note_shared_memory(self._folder, set(filter(os.path.exists, self._shared_memory)))
        except OSError as error:  # a full disk: it matters to a run that is killed alone
            self._console.warn(f"{self._folder}: {error}; of a run that is killed /dev/shm would keep its files")


def _ask_task_runner() -> dict | None:
    """The TaskRunner's progress; None before it exists and after it has gone."""
    if not ray.is_initialized():
        return None
    try:
        return ray.get(ray.get_actor(TASK_RUNNER).progress.remote(), timeout=POLL_SECONDS)
    except (ValueError, ray.exceptions.RayError):
        return None


def process_tree() -> list[psutil.Process]:
    """This process and all its descendants."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _shared_memory(process: psutil.Process) -> set[str]:
    """The files in shared memory that a process has mapped, of the kinds that outlive a killed process."""
    try:
        return set(SHARED_MEMORY.findall(Path(f"/proc/{process.pid}/maps").read_text()))
    except OSError:
        return set()
