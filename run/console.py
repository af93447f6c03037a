"""What a person sees of a run while it goes on: what it waits for, with seconds, then a bar.

Where the output is no terminal (a file, a job's log), lines that stay: one for each thing waited for, one a step.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

from tqdm import tqdm

from recipe.spin.rollout.validation_metrics import in_words

SHOWN = {"accuracy": "score/accuracy", "score": "score/mean", "margin": "rewards/margins", "pairs": "pairs/used"}
STILL_SECONDS = 60.0  # between two lines about the same thing
UNWANTED = ("ray init kwargs:", "[validate_config] All configuration checks passed")  # verl prints these


class _Unheard:
    """A stream whose other end, a terminal or a pipe, may be closed: the run goes on, and cleans up, all the same."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


class Console:
    """Shows a run's progress as RunMonitor learns of it, every few seconds."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = _Unheard(stream or sys.stderr)
        self._terminal = self._stream.isatty()
        self._doing = ""
        self._since = self._told = 0.0
        self._step = 0  # the last one shown
        self._validated: int | None = None  # the step of the last validation that was looked at
        self._bar: tqdm | None = None

    def waits_for(self, doing: str) -> None:
        """What the run does before the first step, and between steps."""
        now = time.monotonic()
        if doing != self._doing:
            before = self._end_waiting()
            self._doing, self._since, self._told = doing, now, now
            self._stream.write(f"[spin] {before}{doing} ..." + ("" if self._terminal else "\n"))
        elif self._terminal:
            self._stream.write(f"\r[spin] {doing} ... {now - self._since:.0f} s")
        elif now - self._told >= STILL_SECONDS:
            self._told = now
            self._stream.write(f"[spin] still {doing}: {now - self._since:.0f} s\n")
        self._stream.flush()

    def show(self, progress: dict) -> None:
        """The TaskRunner's progress: `doing`, the last finished `step` of `total`, and its `metrics`.

        `finished` has the last few steps with their metrics, as several may have ended since the last look. After a
        validation also `validation`: its `step`, and what it had of a validation's faults (`held_out_faults`).
        """
        training = progress["doing"] == "training"
        if self._bar is None and not (training or self._step):
            self.waits_for(progress["doing"])
        elif self._terminal:
            self._draw(progress)
        else:
            self._write_steps(progress)
            if not (training and self._step):
                self.waits_for(progress["doing"])
        self._look_at_validation(progress)

    def _look_at_validation(self, progress: dict) -> None:
        validation = progress.get("validation")
        if validation and validation["step"] != self._validated:
            self._validated = validation["step"]
            if validation["faults"]:
                self.warn(f"step {validation['step']}: {in_words(validation['faults'])}")

    def warn(self, text: str) -> None:
        """Something to look at, on a line that stays."""
        if self._terminal and self._doing:
            self._stream.write("\n")
        tqdm.write(f"[spin] warning: {text}", file=self._stream)

    def close(self, progress: dict | None = None) -> None:
        """Ends with what the run reached, unless it failed."""
        if progress is not None and progress["step"]:
            self._draw(progress) if self._terminal else self._write_steps(progress)
            self._look_at_validation(progress)
        if self._bar is not None:
            self._bar.close()
        else:
            self._stream.write("\n" if self._terminal and self._doing else "")

    def _end_waiting(self) -> str:
        """The end of a line about what was waited for; on a terminal it ends the line there."""
        if not self._doing:
            return ""
        took = f"{time.monotonic() - self._since:.0f} s"
        if self._terminal:
            self._stream.write(f"\r[spin] {self._doing} ... {took}\n")
            return ""
        return f"{self._doing} took {took}; "

    def _draw(self, progress: dict) -> None:
        if self._bar is None:
            self._end_waiting()
            self._doing = ""
            options = {"unit": "step", "dynamic_ncols": True, "file": self._stream}
            self._bar = tqdm(total=progress["total"], initial=progress["step"], **options)
        self._bar.set_description(progress["doing"], refresh=False)
        self._bar.set_postfix(shown(progress["metrics"]), refresh=False)
        self._bar.update(progress["step"] - self._bar.n)
        self._bar.refresh()  # the clock goes on within a step

    def _write_steps(self, progress: dict) -> None:
        for step, metrics in progress["finished"]:
            if step > self._step:
                self._write_step(step, progress["total"], metrics)
        self._stream.flush()

    def _write_step(self, step: int, total: int, metrics: dict) -> None:
        self._step, self._doing = step, ""
        values = "".join(f", {label} {value}" for label, value in shown(metrics).items())
        seconds = metrics["timing_s/step"]
        left = f"{seconds:.1f} s, {seconds * (total - step) / 60:.0f} min left"
        self._stream.write(f"[spin] step {step} of {total}{values} ({left})\n")


def shown(metrics: dict) -> dict[str, str]:
    """The metrics that the console has room for."""
    return {label: f"{metrics[name]:.3g}" for label, name in SHOWN.items() if name in metrics}


@contextmanager
def without_chatter() -> Iterator[None]:
    """Keeps from the console what this process's libraries say that helps nobody there; warnings stay."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(_Filter(sys.stdout)):
            yield
    finally:
        logging.disable(disabled)
        sys.stdout.flush()  # a pipe would get it at the end, behind the cause of a failure on stderr


class _Filter:
    """A text stream less the lines that begin with UNWANTED."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._dropped = False  # the rest of the line too

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._dropped = self._dropped or line.startswith(UNWANTED)
            if not self._dropped:
                self._stream.write(line)
            if line.endswith("\n"):
                self._dropped = False
        return len(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)
