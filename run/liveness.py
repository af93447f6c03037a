"""Whether the processes of a run live, and get on: what asks a dead one often waits for ever, and the run would too."""

import _thread
import contextlib
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray.core.generated.common_pb2 import ActorDiedErrorContext

from recipe.spin.run.failure import CannotGoOn, ray_logs
from recipe.spin.run.monitor import TASK_RUNNER
from recipe.spin.run.worker_forks import WorkerForks

LOOK_SECONDS = 2.0
GRACE_SECONDS = 10.0  # in which a run that noticed by itself ends by itself, its loggers told
LAST_LINES = 6
LINE_LENGTH = 240
# Empty lines, those by which Ray marks whose log it is, and Python's about shared memory of processes that were killed
NO_WORDS = re.compile(r"\s*$|:\w+:|.*resource_tracker|\s*warnings\.warn\(")

OWN_END = re.compile(r"(ended with|exit) code [1-9]")  # by an error, not a signal
MEMORY = " A process that just ends was often killed for want of memory (dmesg tells)"

# An actor that ended for another reason was meant to, or failed by an exception that whoever called it gets
UNEXPECTED = (ActorDiedErrorContext.WORKER_DIED, ActorDiedErrorContext.NODE_DIED)
FORK_SERVER = "the process that workers are forked from"
RAYS_PROCESSES = {"gcs_server": "Ray's control service (gcs_server)", "raylet": "Ray's node manager (raylet)"}
COMPONENTS = {
    "WorkerDict": "the trainer's rank {number}",
    "RolloutServer": "vLLM's server {number}",
    "ModelServer": "the reward model's server {number}",
    "vLLMHttpServer": "vLLM's server {number}",
    "RolloutWorker": "agent loop worker {number}",
    "RewardWorker": "reward worker {number}",
    "TransferQueueController": "TransferQueue's controller",
    "SimpleStorageUnit": "TransferQueue's storage {number}",
}


@dataclass(frozen=True)
class Lost:
    """A process of the run that died before the run ended."""

    component: str  # in words
    pid: int
    how: str  # what Ray knows of its end
    last_words: str  # the end of its log, lines; empty where the log is another machine's

    def __str__(self) -> str:
        said = f"; its last words:\n{self.last_words}" if self.last_words else ""
        memory = "" if OWN_END.search(self.how) else MEMORY
        return f"{self.component} (process {self.pid}) died: {self.how}{memory}{said}"


class Liveness:
    """Context manager around a run in the driver's main thread; a thread of its own looks at Ray's table of actors.

    A run that has not ended by itself a while after the death of one of its processes is interrupted, and so is one
    that does not get on. What it ends by, if one of its processes died before or it did not get on, is a CannotGoOn.

    Attributes:
        lost: the first process found dead.
        stalled: what the run was doing that did not get on.
    """

    def __init__(self, forks: WorkerForks | None = None, stalled: Callable[[], str | None] = lambda: None):
        """forks: what Ray's workers come from, if not from Ray. stalled: the monitor's."""
        self.lost: Lost | None = None
        self.stalled: str | None = None
        self._forks = forks
        self._ask_whether_stalled = stalled
        self._found = self._patience = 0.0
        self._interrupted = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

    def __enter__(self) -> "Liveness":
        self._thread.start()
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * LOOK_SECONDS)  # Ray's dead control service lets a question wait
        if exception_type is None or (issubclass(exception_type, KeyboardInterrupt) and not self._interrupted):
            return
        if self.lost is None:
            self._look()
        if self.lost or self.stalled:
            raise CannotGoOn(str(self.lost or self.stalled)) from exception

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            if self.lost is None:
                self._look()
                self.stalled = self._ask_whether_stalled()
            if self.stalled or (self.lost and time.monotonic() > self._found + self._patience):
                self._interrupted = True
                _thread.interrupt_main(signal.SIGTERM)  # which signals.py handles
                return

    def _look(self) -> None:
        self.lost = self._lost_process()
        if self.lost is None:
            self.lost = self._lost_actor()
            self._patience = GRACE_SECONDS
        self._found = time.monotonic()

    def _lost_process(self) -> Lost | None:
        """Of the fork server's, and of a Ray that this run started for itself."""
        if self._forks and self._forks.process.poll() is not None:
            return _ended(FORK_SERVER, self._forks.process, _last_words([self._forks.log]))
        node = ray_worker._global_node
        for name, process in node.dead_processes() if node else ():
            if name in RAYS_PROCESSES:
                return _ended(RAYS_PROCESSES[name], process, _last_words(ray_logs().glob(f"{name}.*")))
        return None

    def _lost_actor(self) -> Lost | None:
        actors = _actors_of_this_job()
        dead = [actor for actor in actors if actor["State"] == "DEAD" and _ending(actor)]
        if not dead:
            return None
        actor = min(dead, key=lambda actor: actor["EndTime"])  # others may have died of it
        node = ray_worker._global_node  # none while Ray ends
        here = node is not None and actor["Address"]["IPAddress"] == node.node_ip_address
        words = _last_words(ray_logs().glob(f"worker-*-{actor['Pid']}.*")) if here else ""
        return Lost(in_words(actor, actors), actor["Pid"], _ending(actor), words)


def _ended(component: str, process: subprocess.Popen, last_words: str) -> Lost:
    return Lost(component, process.pid, f"it ended with code {process.returncode}.", last_words)


def _last_words(logs: Iterable[Path]) -> str:
    """The last lines of the newest of these logs that says anything."""
    with contextlib.suppress(OSError):  # a log that went, or cannot be read; that the process died counts
        for file in sorted(logs, key=lambda file: file.stat().st_mtime, reverse=True):
            lines = [line[:LINE_LENGTH] for line in _end_of(file).splitlines() if not NO_WORDS.match(line)]
            if lines:
                return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
    return ""


def in_words(actor: dict, actors: list[dict]) -> str:
    """What an actor is to the run; of several of a class by their number."""
    if actor["Name"] == TASK_RUNNER:  # of a class of its own in a recipe built on this one
        return "the run's task runner"
    kind = class_of(actor)
    alike = sorted((other for other in actors if class_of(other) == kind), key=_place)
    number = [other["ActorID"] for other in alike].index(actor["ActorID"])
    return COMPONENTS.get(kind, f"{kind} {{number}}").format(number=number)


def class_of(actor: dict) -> str:
    """The name of an actor's class, without the function that verl may have defined it in."""
    return actor["ActorClassName"].rpartition(".")[2]


def _place(actor: dict) -> tuple:
    """Orders actors of a class by the numbers in their names (WorkerDict_1:0, vllm_server_2_0), or as they started."""
    return [int(number) for number in re.findall(r"\d+", actor["Name"].rpartition("Dict_")[2])], actor["StartTime"]


def _actors_of_this_job() -> list[dict]:
    """Ray's table; `ray.util.state` would ask a dashboard, which a run does without. Empty before Ray has started."""
    if not ray.is_initialized():
        return []
    try:
        return list(ray_state.actors(job_id=ray_worker.global_worker.current_job_id).values())
    except (ray.exceptions.RayError, RuntimeError):  # it starts, or ends; of its death its processes tell
        return []


def _ending(actor: dict) -> str | None:
    """How an actor ended that was not meant to; None for the others."""
    cause = actor["DeathCause"]
    if cause.HasField("oom_context"):
        return cause.oom_context.error_message
    if cause.HasField("actor_died_error_context") and cause.actor_died_error_context.reason in UNEXPECTED:
        return _first_sentences(cause.actor_died_error_context.error_message)
    return None


def _first_sentences(text: str) -> str:
    """Of Ray's message what happened, without the kinds before and the list of possible causes after it."""
    told = re.split(r"There are some potential root causes|Some common causes", text)[0]
    return " ".join(told.rpartition("Worker exit detail:")[2].split())


def _end_of(file: Path) -> str:
    with open(file, "rb") as log:
        log.seek(max(0, file.stat().st_size - 20_000))
        return log.read().decode(errors="replace")
