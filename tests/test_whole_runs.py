"""The watch over a whole run finds what the run leaves, and nothing of what runs beside it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from whole_runs import MARK, Watch

# Makes a file in shared memory, as one that is killed does: nobody removes it
MAKER = """
import sys
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *args: None
memory = shared_memory.SharedMemory(create=True, size=8)
print(memory.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def make():
    """Starts a process that makes a file, and returns it and the file."""
    made = []

    def start(**variables: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-c", MAKER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, env=os.environ | variables, text=True, **pipes)
        made.append((process, f"/dev/shm/{process.stdout.readline().strip()}"))
        return made[-1]

    yield start
    for process, file in made:
        process.kill()
        process.wait()
        Path(file).unlink(missing_ok=True)


def test_what_a_run_leaves_is_found_and_no_others(make, tmp_path):
    with Watch(tmp_path / "run") as watch:
        processes = [make(**variables) for variables in ({MARK: str(tmp_path / "run")}, {MARK: "another"}, {})]
        _, file = processes[0]
        deadline = time.monotonic() + 60
        while file not in watch.left(patience=0) and time.monotonic() < deadline:
            time.sleep(0.05)
        found = watch.left(patience=0)
        assert len(found) == 2 and found[0] == file and MAKER in found[1]
        for process, _ in processes:
            process.stdin.close()
            process.wait()
        (watch.temporary / "socket").touch()
        assert watch.left(patience=0) == [file, str(watch.temporary / "socket")]
        (watch.temporary / "socket").unlink()
        Path(file).unlink()
        assert watch.left(patience=0) == []
    assert not watch.temporary.exists()
