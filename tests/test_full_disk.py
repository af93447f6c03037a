"""A real full disk in each of the files that a run writes by itself: what stood there stays, and what is said names it.

Whole runs that meet one in a checkpoint, in a step's metrics and in the report: test_faults.py.
"""

import json
import subprocess
import sys

WRITES = """
import contextlib
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from recipe.spin import run_folder
from recipe.spin.run import report, resume
from recipe.spin.run.failure import explained

folder = Path(sys.argv[1])
run, big = folder / "run", {"trainer": 100_000 * "x"}
resume._store({"trainer": "as before"}, run)
run_folder.keep_answers(run, 0, [([], "as before")])
(run / "metrics").mkdir()
(run / "metrics" / "from_step_00000000.jsonl").write_text(json.dumps({"step": 1, "data": {"x": 1.0}}) + "\\\\n")
config = OmegaConf.create({"trainer": {"default_local_dir": str(run)}})
report.write(config, seconds=1.0, peak_memory_gb=None)
before = {str(path): path.read_text() for path in run.rglob("*") if path.is_file() and path.suffix != ".png"}

with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as filler:
    while True:
        filler.write(bytes(4096))


def fail():
    with explained(folder / "run" / "failure"):
        resume._store(big, run)


def write_unreadable():
    for _ in range(100):
        run_folder.keep_unreadable(run, {"text": 2000 * "x"})


said = []
for write in (
    lambda: resume._store(big, run),
    lambda: run_folder.keep_answers(run, 0, [([], 100_000 * "x")]),
    lambda: report.write(config, seconds=1.0, peak_memory_gb=None),
    write_unreadable,
    fail,
):
    try:
        write()
        said.append("nothing")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
after = {path: Path(path).read_text() for path in before}
unfinished = [path.name for path in run.rglob("*.tmp")]
changed = [path for path in before if before[path] != after[path]]
print(json.dumps({"said": said, "kept": len(before), "changed": changed, "unfinished": unfinished}))
"""


def test_what_stood_there_stays_and_what_is_said_names_the_disk(small_disk):
    within, folder, _ = small_disk
    command = [*within, sys.executable, "-c", WRITES, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    *refused, failure = found["said"]
    assert refused == ["OSError: [Errno 28] No space left on device"] * 4
    assert failure.startswith("RunFailed: ") and f"No space is left on the disk of {folder}/run (0 MB)" in failure
    assert f"logs: none, {folder}/run/failure cannot be written" in failure
    assert (found["kept"], found["changed"], found["unfinished"]) == (5, [], [])
