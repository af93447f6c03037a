"""The memory that a run's processes need, as against what they could do without."""

from collections.abc import Iterable
from pathlib import Path

import psutil

# All mappings of a process summed up; kernels before 4.14 and some sandboxes have only the list of them
SMAPS = "smaps_rollup" if Path("/proc/self/smaps_rollup").exists() else "smaps"


def needed_memory(processes: Iterable[psutil.Process]) -> int:
    """Bytes: proportional set sizes, less what the processes have offered to the system (MADV_FREE).

    Pages that n processes share count as a n-th for each; processes that have ended count nothing. The kernel walks
    through all pages for it, a tenth of a second of a core's time for the ten processes of a run.
    """
    return sum(_needed(process.pid) for process in processes)


def _needed(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/{SMAPS}").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0
    sizes = {"Pss": 0, "LazyFree": 0}
    for line in lines:
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] += 1024 * int(value.split()[0])
    return sizes["Pss"] - sizes["LazyFree"]
