"""What a run's processes need: not what they share twice, not what they offered, and nothing once they have ended."""

import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from recipe.spin.run.monitor import RunMonitor
from recipe.spin.run.process_memory import NeededMemory, PeakMemory, PrivateMemory

SIZE = 64 << 20
# A process that does with a block of memory what it is told
SUBJECT = """
import mmap
block, page = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), b"1" * (1 << 20)
print("ready", flush=True)
while order := input():
    if order == "offer":
        block.madvise(mmap.MADV_FREE)
    else:
        block.seek(0)
        for _ in range(int(order.split()[1])):
            block.write(page)
    print("done", flush=True)
"""


@pytest.fixture
def subject():
    command = [sys.executable, "-c", SUBJECT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        process.stdout.readline()

        def tell(order: str) -> None:
            process.stdin.write(f"{order}\n")
            process.stdout.readline()

        yield SimpleNamespace(tell=tell, process=psutil.Process(process.pid))
        process.stdin.write("\n")


def test_memory_that_is_offered_is_not_needed_until_it_is_used_again(subject):
    """All of it counts again as soon as a part is used: how much more was, between two looks, nobody knows."""
    memory = NeededMemory()
    before, more = memory.total([subject.process]), []
    for order in ("use 64", "offer", "use 16", "use 0", "use 64", "use 0"):
        subject.tell(order)
        more.append(memory.total([subject.process]) - before)
    assert more == pytest.approx([SIZE, 0, SIZE, SIZE / 4, SIZE, SIZE], abs=SIZE / 10)


def test_memory_that_two_processes_share_counts_once():
    """A forked child has the parent's pages."""
    block, (theirs, ours) = bytearray(b"1" * SIZE), multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=theirs.recv)
    child.start()
    try:
        processes = [psutil.Process(), psutil.Process(child.pid)]
        resident = sum(process.memory_info().rss for process in processes)
        assert NeededMemory().total(processes) < resident - 0.9 * len(block)
    finally:
        ours.send("end")
        child.join()


def test_on_gpus_what_a_process_has_for_itself_is_read_without_a_walk_through_its_pages(subject, monkeypatch, tmp_path):
    """Every 10 s, unless the machine has less left than before; and not what it shares."""
    seen, read = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: seen.append(path.name) or read(path))
    monitor = RunMonitor(tmp_path, device="cuda")
    assert monitor._memory._seconds == 10
    monitor._memory._seconds = 0.0
    monitor._memory.see([subject.process])
    before = monitor.peak_memory_gb
    subject.tell("use 64")
    monitor._memory.see([subject.process])
    assert 1e9 * (monitor.peak_memory_gb - before) == pytest.approx(SIZE, abs=SIZE / 10)
    assert 1e9 * before < subject.process.memory_info().rss - SIZE - subject.process.memory_info().shared / 2
    assert set(seen) == {"statm"}


class Looks(NeededMemory):
    """Sees the processes need what it is told, and counts how often it was asked."""

    def __init__(self, *gigabytes: int):
        self.left = list(gigabytes)

    def total(self, processes) -> int:
        return self.left.pop(0) * 10**9


def test_the_peak_is_the_most_that_was_seen(subject):
    peak = PeakMemory(Looks(1, 3, 2), seconds=0.0)
    for _ in range(3):
        peak.see([subject.process])
    assert peak.bytes == 3e9


def test_it_is_looked_closely_where_less_is_available_than_ever(monkeypatch):
    looks, left = Looks(1, 3, 2), []
    peak = PeakMemory(looks, seconds=1e6)
    for available in (60, 60, 50, 55, 49.5):
        machine = SimpleNamespace(total=100e9, available=available * 1e9)
        monkeypatch.setattr(psutil, "virtual_memory", lambda machine=machine: machine)
        peak.see([])
        left.append(len(looks.left))
    assert left == [2, 2, 1, 1, 1] and peak.bytes == 3e9


@pytest.mark.parametrize("kind", [NeededMemory, PrivateMemory])
def test_a_process_that_has_ended_needs_nothing(subject, kind):
    with subprocess.Popen(["true"]) as child:  # waits for it at the end, so that psutil sees it before
        gone = psutil.Process(child.pid)
    assert kind().total([gone]) == 0 < kind().total([gone, subject.process])
