"""Whether a run gets on: its processes may all live, and wait for each other or for one that hangs."""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

import psutil

STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)  # by a signal, by a debugger


class Stall:
    """Notices that a run has been doing the same for too long.

    What it does is what the trainer tells of itself: the last finished step, the phase of the next, and how many
    prompts wait for an answer.
    """

    def __init__(self, limit: float | None):
        """limit: `trainer.stall_timeout_s`, seconds; None: none."""
        self._limit = limit
        self._doing: tuple | None = None
        self._since = time.monotonic()

    def see(self, progress: dict | None) -> None:
        """Takes the TaskRunner's progress; None before there is any, and when it does not answer."""
        doing = progress and tuple(progress.get(name) for name in ("step", "doing", "phase", "answering"))
        if doing is not None and doing != self._doing:
            self._doing, self._since = doing, time.monotonic()

    def what(self, processes: Iterable[psutil.Process]) -> str | None:
        """What a run that has not got on for the limit's time was doing, and which of its processes here are stopped.

        None for any other run.
        """
        seconds = time.monotonic() - self._since
        if self._limit is None or seconds < self._limit:
            return None
        doing = self._in_words() + "".join(_stopped(processes))
        return (
            f"the run has not got on for {seconds:.0f} s: {doing}. Where that really takes so long raise "
            f"trainer.stall_timeout_s={self._limit:g}, or set null"
        )

    def _in_words(self) -> str:
        if self._doing is None:
            return "starting"
        step, doing, phase, answering = self._doing
        within = f" ({phase})" if phase and doing == "training" else ""
        waiting = f", {answering} prompts waiting for answers" if answering else ""
        return f"{doing}{within} after step {step}{waiting}"


def _stopped(processes: Iterable[psutil.Process]) -> Iterator[str]:
    for process in processes:
        with suppress(psutil.Error):  # it has ended meanwhile
            if process.status() in STOPPED:
                yield f"; process {process.pid} ({process.name()}) is stopped"
