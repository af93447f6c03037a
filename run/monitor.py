"""Around a run: a progress bar, the peak memory of its processes, a folder of its own, and nothing left behind."""

import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import ray
from tqdm import tqdm

TASK_RUNNER = "spin_task_runner"
POLL_SECONDS = 2.0
MEMORY_STEP = 1.005
MEMORY_SECONDS = 10.0
LOOKS = 5  # a file that no process of the run has mapped by then is another's
SHOWN = {"accuracy": "score/accuracy", "score": "score/mean", "margin": "rewards/margins", "pairs": "pairs/used"}
SHARED_MEMORY = re.compile(r"/dev/shm/(?:psm|verl_weights)_\w+")
LOGS_OF_A_CLUSTER = "on each node, in /tmp/ray/session_latest/logs (below --temp-dir where Ray was started with one)"


class RunMonitor:
    """Context manager around a run; a thread of the driver asks the TaskRunner how far it is.

    Gives Ray, vLLM and their workers one private folder for sockets and logs, and removes it when the run ends,
    together with the shared memory that vLLM's processes leave when Ray ends them. On a cluster that the run joins
    (`joins`) those processes are not the driver's: they have the cluster's folder, and their memory is not measured.

    Attributes:
        seconds: length of the run.
        logs: where the workers' logs are when the run has failed.
        peak_memory_gb: highest sum of the proportional set sizes of this process and its descendants (Ray's and
            vLLM's among them), in 10^9 bytes. Measured when their resident memory is half a percent higher than ever,
            and now and then: the kernel walks through all pages for it, every two seconds a tenth of a core's time.
            None on a cluster that the run joins.
    """

    def __init__(self, log_folder: Path, joins: bool = False):
        self._joins = joins
        self.peak_memory_gb: float | None = None if joins else 0.0
        self.logs = LOGS_OF_A_CLUSTER if joins else str(log_folder)
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="run-monitor", daemon=True)
        self._bar: tqdm | None = None
        self._told = ""
        self._log_folder = log_folder
        self._shared_memory: set[str] = set()
        self._looks: Counter[str] = Counter()
        self._peak_resident = 0
        self._measured = 0.0

    def __enter__(self) -> "RunMonitor":
        self._started = time.monotonic()
        if not self._joins:
            self._folder = Path(tempfile.mkdtemp(prefix="spin-"))
            os.environ.update(TMPDIR=str(self._folder), VLLM_RPC_BASE_PATH=str(self._folder))
        self._thread.start()
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.seconds = time.monotonic() - self._started
        self._stop.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()
        processes = process_tree()[1:]
        ray.shutdown()
        _, alive = psutil.wait_procs(processes, timeout=10)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)
        if not self._joins:
            if exception_type is not None:
                self._keep_logs()
            shutil.rmtree(self._folder, ignore_errors=True)
        for file in self._shared_memory:
            Path(file).unlink(missing_ok=True)

    def _keep_logs(self) -> None:
        logs = self._folder / "ray" / "session_latest" / "logs"
        if logs.is_dir():
            shutil.copytree(logs, self._log_folder, dirs_exist_ok=True, ignore_dangling_symlinks=True)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            processes = process_tree()
            if not self._joins:
                self._measure_memory(processes)
            self._find_shared_memory(processes)
            progress = _ask_task_runner()
            if progress is None:
                self._tell("starting Ray")
            else:
                self._show(progress)

    def _measure_memory(self, processes: list[psutil.Process]) -> None:
        resident = sum(map(_own_resident, processes))
        if resident > MEMORY_STEP * self._peak_resident or time.monotonic() > self._measured + MEMORY_SECONDS:
            self.peak_memory_gb = max(self.peak_memory_gb, sum(map(_proportional_set_size, processes)) / 1e9)
            self._peak_resident = max(resident, self._peak_resident)
            self._measured = time.monotonic()

    def _find_shared_memory(self, processes: list[psutil.Process]) -> None:
        """Notes the files in shared memory that are this run's; asks the processes only while there are new ones."""
        unknown = set(filter(SHARED_MEMORY.fullmatch, map(str, Path("/dev/shm").iterdir()))) - self._shared_memory
        self._looks.update(unknown)
        if any(self._looks[file] <= LOOKS for file in unknown):
            self._shared_memory.update(*map(_shared_memory, processes))

    def _show(self, progress: dict) -> None:
        if self._bar is None:
            if progress["doing"] != "training":
                self._tell(progress["doing"])
                return
            self._bar = tqdm(total=progress["total"], initial=progress["step"], unit="step", dynamic_ncols=True)
        self._bar.set_description(progress["doing"], refresh=False)
        metrics = progress["metrics"]
        shown = {label: f"{metrics[name]:.3g}" for label, name in SHOWN.items() if name in metrics}
        self._bar.set_postfix(shown, refresh=False)
        if progress["step"] > self._bar.n:
            self._bar.update(progress["step"] - self._bar.n)
        elif sys.stderr.isatty():  # the clock goes on within a step
            self._bar.refresh()

    def _tell(self, doing: str) -> None:
        if doing != self._told:
            self._told = doing
            sys.stderr.write(f"[spin] {doing} ...\n")


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


def _own_resident(process: psutil.Process) -> int:
    """Bytes of memory that a process has for itself, which the kernel keeps count of; 0 if it ended meanwhile."""
    try:
        memory = process.memory_info()
        return memory.rss - memory.shared
    except psutil.Error:
        return 0


def _proportional_set_size(process: psutil.Process) -> int:
    """Bytes of memory of a process, pages shared by n processes counted as a n-th; 0 if it ended meanwhile."""
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def _shared_memory(process: psutil.Process) -> set[str]:
    """The files in shared memory that a process has mapped, of the kinds that outlive a killed process."""
    try:
        return set(SHARED_MEMORY.findall(Path(f"/proc/{process.pid}/maps").read_text()))
    except OSError:
        return set()
