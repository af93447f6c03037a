"""A long run of a tiny model: what each process holds at an early step and at the end.

    .venv/bin/python -m benchmarks.soak [--steps 300] [--early 50]

Memory, open files and sockets of every process of the run; what grows with steps is a leak. Writes
benchmarks/results/DATE-soak.json; five minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from benchmarks.machine import ROOT, provenance, write_result
from benchmarks.scaling import save_model

POLL_SECONDS = 0.5


def last_step(metrics: Path) -> int:
    """The last step in the run's metrics; -1 before there is one."""
    lines = [line for file in sorted(metrics.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else -1


def held(process: psutil.Process) -> dict[str, float]:
    """What a process holds, by name; empty if it ended meanwhile."""
    try:
        memory = process.memory_info()
        return {
            "processes": 1,
            "memory_mb": (memory.rss - memory.shared) / 1e6,
            "files": process.num_fds(),
            "sockets": len(process.net_connections("all")),
            "threads": process.num_threads(),
        }
    except psutil.Error:
        return {}


def title(process: psutil.Process) -> str:
    """A process's name without its numbers: Ray's workers have their class in it."""
    try:
        words = process.cmdline() or [process.name()]
    except psutil.Error:
        return "ended"
    name = words[0] if words[0].startswith(("ray::", "VLLM")) else Path(words[0]).name
    return name.split(".")[0].split("[")[0].strip()


def look(root: psutil.Process) -> dict[str, dict[str, float]]:
    """What the processes below `root` hold, those of one title added up."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for process in [root, *root.children(recursive=True)]:
        for name, value in held(process).items():
            found[title(process)][name] += round(value, 1)
    return {name: dict(values) for name, values in sorted(found.items())}


def soak(steps: int, early: int, folder: Path) -> dict[str, dict]:
    """One run; what was held in its step `early` and shortly before its end."""
    model = save_model("tiny", folder / "model")
    environment = os.environ | {"RUN_DIR": str(folder / "run"), "MODEL_PATH": model, "SPIN_PROFILE": "cpu"}
    quiet = ["trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=50"]
    command = ["bash", str(ROOT / "run_spin.sh"), f"trainer.total_training_steps={steps}", *quiet]
    command += ["data.train_batch_size=8", "algorithm.dpo_tie_policy=first"]
    looks = {early: None, steps - 5: None}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment | {"PYTHON": sys.executable}, stdout=log, stderr=log)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            step = last_step(folder / "run" / "metrics")
            for wanted in [one for one, seen in looks.items() if seen is None and step >= one]:
                looks[wanted] = {"step": step, "held": look(root)}
            time.sleep(POLL_SECONDS)
    if process.returncode or None in looks.values():
        raise RuntimeError((folder / "log").read_text()[-2000:])
    return {"early": looks[early], "late": looks[steps - 5]}


def table(found: dict[str, dict]) -> str:
    """Markdown: memory, files, sockets and threads by process, early -> late."""
    columns = ("memory_mb", "files", "sockets", "threads")
    lines = [f"| process | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    early, late = (found[when]["held"] for when in ("early", "late"))
    for name in sorted(early.keys() | late.keys()):
        cells = (f"{early.get(name, {}).get(one, 0):.0f} -> {late.get(name, {}).get(one, 0):.0f}" for one in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the processes of a long run hold, early and late.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--early", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = soak(options.steps, options.early, Path(temporary))
    path = write_result("soak", provenance() | {"steps": options.steps, **found})
    print(f"{table(found)}\n\n{path}")


if __name__ == "__main__":
    main()
