"""The memory that a run's processes need, as against what they could do without."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

HIGHER = 1.02  # times the most that was taken before: so much more is looked at closely
PAGE = os.sysconf("SC_PAGE_SIZE")
USED_AGAIN = 0.05  # of what a process had offered; less is what any process does while it waits
# All mappings of a process summed up; kernels before 4.14 and some sandboxes have only the list of them
SMAPS = "smaps_rollup" if Path("/proc/self/smaps_rollup").exists() else "smaps"


class NeededMemory:
    """Adds up what processes need: proportional set sizes, less what they have offered to the system (MADV_FREE).

    A process that uses again what it had offered counts with all of it: between two looks it may have needed as much.
    The kernel walks through all pages for a look, a tenth of a second of a core's time for the ten processes of a run.
    """

    def __init__(self):
        self._offered: dict[int, int] = {}  # by process, when last looked at

    def total(self, processes: Iterable[psutil.Process]) -> int:
        """Bytes, pages that n processes share counted as a n-th for each. Processes that have ended count nothing."""
        return sum(self._of(process.pid) for process in processes)

    def _of(self, pid: int) -> int:
        try:
            lines = Path(f"/proc/{pid}/{SMAPS}").read_text().splitlines()
        except OSError:  # it has ended meanwhile
            return 0
        held, offered = _sum_of(lines, "Pss"), _sum_of(lines, "LazyFree")
        before, self._offered[pid] = self._offered.get(pid, 0), offered
        return held if offered < (1 - USED_AGAIN) * before else held - offered


class PrivateMemory:
    """Adds up what processes have in memory for themselves, from counters that the kernel keeps anyhow.

    For runs on GPUs, whose processes map terabytes: the walk of NeededMemory would go through all of it. What processes
    share (libraries, Ray's object store) is left out.
    """

    def total(self, processes: Iterable[psutil.Process]) -> int:
        """Bytes. Processes that have ended count nothing."""
        return sum(map(_private, (process.pid for process in processes)))


class PeakMemory:
    """The most that processes were seen to need.

    To be asked often. It looks closely, by `memory`, when the machine has less memory left than at any look before,
    which is cheap to ask, and otherwise every `seconds`: a close look keeps a core from its work.

    Attributes:
        bytes: the most so far.
    """

    def __init__(self, memory: NeededMemory | PrivateMemory, seconds: float):
        self.bytes = 0
        self._memory = memory
        self._seconds = seconds
        self._taken = 0  # of the machine's memory, at most; what is offered counts as available
        self._next_look = 0.0

    def see(self, processes: Iterable[psutil.Process]) -> None:
        machine = psutil.virtual_memory()
        taken = machine.total - machine.available
        if taken > HIGHER * self._taken or time.monotonic() >= self._next_look:
            self._taken = max(taken, self._taken)
            self._next_look = time.monotonic() + self._seconds
            self.bytes = max(self.bytes, self._memory.total(processes))


def _private(pid: int) -> int:
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except OSError:  # it has ended meanwhile
        return 0
    return (resident - shared) * PAGE


def _sum_of(lines: list[str], name: str) -> int:
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
