"""What the user sees of a run while it lasts: a progress bar, and the peak memory of its processes."""

import threading
import time

import psutil
import ray
from tqdm import tqdm

TASK_RUNNER = "spin_task_runner"
POLL_SECONDS = 2.0


class RunMonitor:
    """Context manager around a run; a thread of the driver asks the TaskRunner how far it is.

    Attributes:
        seconds: length of the run.
        peak_memory_gb: highest sum of the proportional set sizes of this process and its descendants (Ray's and
            vLLM's among them), in 10^9 bytes.
    """

    def __init__(self):
        self.peak_memory_gb = 0.0
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="run-monitor", daemon=True)
        self._bar: tqdm | None = None

    def __enter__(self) -> "RunMonitor":
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.seconds = time.monotonic() - self._started
        self._stop.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.peak_memory_gb = max(self.peak_memory_gb, tree_memory_gb())
            progress = _ask_task_runner()
            if progress and progress["total"]:
                self._show(progress)

    def _show(self, progress: dict) -> None:
        if self._bar is None:
            self._bar = tqdm(total=progress["total"], initial=progress["step"], desc="training", unit="step")
        metrics = progress["metrics"]
        shown = {"accuracy": "score/accuracy", "score": "score/mean", "margin": "rewards/margins", "pairs": "pairs/used"}
        self._bar.set_postfix({label: f"{metrics[name]:.3g}" for label, name in shown.items() if name in metrics})
        self._bar.update(progress["step"] - self._bar.n)


def _ask_task_runner() -> dict | None:
    """The TaskRunner's progress; None before it exists and after it has gone."""
    if not ray.is_initialized():
        return None
    try:
        return ray.get(ray.get_actor(TASK_RUNNER).progress.remote(), timeout=POLL_SECONDS)
    except (ValueError, ray.exceptions.RayError):
        return None


def tree_memory_gb() -> float:
    """Proportional set size of this process and all its descendants: shared pages count once, in 10^9 bytes."""
    processes = [psutil.Process()]
    processes += processes[0].children(recursive=True)
    return sum(map(_proportional_set_size, processes)) / 1e9


def _proportional_set_size(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it ended meanwhile
        return 0
