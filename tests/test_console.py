"""What stands on the console, on a terminal and in a file."""

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.spin.run import console as run_console
from recipe.spin.run.console import Console, without_chatter


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def lines(self) -> list[str]:
        """What a person ends up with: of a line that was written over, the last state."""
        return [line.rsplit("\r", 1)[-1].strip() for line in self.getvalue().split("\n") if line.strip()]


class Closed(Stream):
    """A terminal, or a pipe, that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self) -> None:
        raise OSError(errno.EIO, "Input/output error")


def progress(step: int, doing: str = "training") -> dict:
    metrics = {"score/accuracy": 0.25, "pairs/used": 12, "timing_s/step": 30.0, "other": 1.0}
    finished = tuple((number, metrics) for number in range(1, step + 1))
    return {"doing": doing, "step": step, "total": 4, "metrics": metrics if step else {}, "finished": finished}


@pytest.fixture
def clock(monkeypatch):
    now = {"s": 100.0}
    monkeypatch.setattr(run_console.time, "monotonic", lambda: now["s"])
    return now


def follow(console: Console, clock: dict) -> None:
    """A run of four steps with a validation before and after, seen every two seconds."""
    for _ in range(5):
        console.waits_for("starting Ray")
        clock["s"] += 2
    for doing in ["loading the model"] * 40 + ["answering the held-out prompts"] * 3:
        console.show(progress(0, doing))
        clock["s"] += 2
    for step in (0, 0, 1, 2, 2, 3):
        console.show(progress(step))
        clock["s"] += 2
    console.show(progress(3, "answering the held-out prompts"))


def test_without_a_terminal_a_line_a_step_stays(clock):
    stream = Stream(terminal=False)
    console = Console(stream)
    follow(console, clock)
    console.close(progress(4))
    assert stream.lines == [
        "[spin] starting Ray ...",
        "[spin] starting Ray took 10 s; loading the model ...",
        "[spin] still loading the model: 60 s",
        "[spin] loading the model took 80 s; answering the held-out prompts ...",
        "[spin] answering the held-out prompts took 6 s; training ...",
        "[spin] step 1 of 4, accuracy 0.25, pairs 12 (30.0 s, 2 min left)",
        "[spin] step 2 of 4, accuracy 0.25, pairs 12 (30.0 s, 1 min left)",
        "[spin] step 3 of 4, accuracy 0.25, pairs 12 (30.0 s, 0 min left)",
        "[spin] answering the held-out prompts ...",
        "[spin] step 4 of 4, accuracy 0.25, pairs 12 (30.0 s, 0 min left)",
    ]
    assert "\r" not in stream.getvalue()


def test_steps_that_end_between_two_looks_have_their_lines(clock):
    stream = Stream(terminal=False)
    console = Console(stream)
    for step in (0, 3, 3):
        console.show(progress(step))
    console.close(progress(4))
    assert [line[: len("[spin] step 1")] for line in stream.lines[1:]] == [
        f"[spin] step {step}" for step in (1, 2, 3, 4)
    ]


def test_on_a_terminal_the_bar_ends_full(clock):
    stream = Stream(terminal=True)
    console = Console(stream)
    follow(console, clock)
    console.close(progress(4))
    assert stream.lines[0] == "[spin] starting Ray ... 10 s"
    assert stream.lines[1] == "[spin] loading the model ... 80 s"
    assert stream.lines[2].startswith("[spin] answering the held-out prompts ... 6 s")
    assert "4/4" in stream.lines[-1] and "100%" in stream.lines[-1] and "accuracy=0.25" in stream.lines[-1]


def test_a_failed_run_leaves_the_bar_where_it_was(clock):
    stream = Stream(terminal=True)
    console = Console(stream)
    follow(console, clock)
    console.close()
    assert "3/4" in stream.lines[-1]


def test_a_run_that_ends_before_its_first_step_shows_no_bar(clock):
    stream = Stream(terminal=True)
    console = Console(stream)
    console.waits_for("starting Ray")
    console.close()
    assert stream.getvalue() == "[spin] starting Ray ...\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_what_failed_in_a_validation_is_said_once(clock, terminal):
    stream = Stream(terminal)
    console = Console(stream)
    faults = {"val-failed/answers": 0.031, "val-aux/prompts_without_score": 2}
    answering, validated = "answering the held-out prompts", {"validation": {"step": 0, "faults": faults}}
    console.show(progress(0, answering))
    console.show(progress(0, answering) | validated)
    for step in (0, 1):
        console.show(progress(step) | validated)
    console.show(progress(2) | {"validation": {"step": 2, "faults": {}}})
    console.close(progress(4) | {"validation": {"step": 4, "faults": {"val-failed/answers": 0.5}}})
    warnings = [line for line in stream.lines if "warning" in line]
    assert warnings == [
        "[spin] warning: step 0: 3.1% of the held-out answers failed; "
        "2 held-out prompts have a response without a score",
        "[spin] warning: step 4: 50.0% of the held-out answers failed",
    ]


def test_chatter_is_dropped_and_everything_else_stays(capsys):
    with without_chatter():
        print("ray init kwargs: {'num_cpus': 4}")
        print("[validate_config] All configuration checks passed successfully!")
        print("WARNING: val_batch_size is deprecated.")
        print("ray init", end=" ")
        print("said something")
        logging.getLogger("verl").info("Platform override")
        logging.getLogger("verl").warning("of use")
    assert capsys.readouterr().out == "WARNING: val_batch_size is deprecated.\nray init said something\n"
    assert not logging.root.manager.disable


FAILS = """
import sys
from recipe.spin.run.console import without_chatter
with without_chatter():
    print("(raylet) A worker died")
sys.exit("error: the cause")
"""


def test_what_libraries_say_stands_before_the_cause_of_a_failure_in_a_file_too():
    """Whose standard output is buffered, and whose last lines are to be the cause."""
    command, root = [sys.executable, "-c", FAILS], Path(__file__).parents[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=root, env=buffered, text=True, timeout=300, **pipes)
    assert done.stdout == "(raylet) A worker died\nerror: the cause\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_where_nobody_reads_any_more_the_run_goes_on_and_cleans_up(terminal):
    console = Console(Closed(terminal))
    console.waits_for("starting Ray")
    console.warn("look at this")
    console.show(progress(2))
    console.close(progress(4))
