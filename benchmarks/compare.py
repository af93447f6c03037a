"""Compares a run of benchmarks.step with the last recorded one on the same kind of machine, as ratios.

    .venv/bin/python -m benchmarks.compare [FILE]     (the newest file without one)

Exits with 1 when a figure got worse by more than its threshold. Figures are ratios within a run, so that a slower hour
of the machine falls on both sides; peak memory is compared as it is.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import FOLDER, recorded

# Name -> how to read it from a run (lower is better), and the most it may grow
FIGURES: dict[str, tuple[Callable[[dict], float], float]] = {
    "step to TRL's, same pairs": (lambda run: run["step_ratio_to_trl"], 1.10),
    "step to TRL's, ties dropped": (lambda run: run["ties_dropped"]["step_ratio_to_trl"], 1.10),
    "reference and update to plain PyTorch": (lambda run: run["ref_update_ratio_to_plain_per_operation"], 1.10),
    "generation to its arithmetic": (
        lambda run: run["ours"]["phases"]["gen"] / run["ours"]["floor_phases"]["gen"],
        1.20,
    ),
    "peak memory, GB": (lambda run: run["ours"]["peak_memory_gb"], 1.10),
}


def last_before(new: tuple[Path, dict], runs: list[tuple[Path, dict]]) -> tuple[Path, dict] | None:
    """The latest of the runs that is older than `new` and was made on the same kind of machine with its overrides."""

    def comparable(run: dict) -> bool:
        same = run["machine"]["kind"] == new[1]["machine"]["kind"] and run["overrides"] == new[1]["overrides"]
        return same and run["date"] < new[1]["date"]

    older = [(path, run) for path, run in runs if comparable(run)]
    return older[-1] if older else None


def compare(new: dict, old: dict) -> tuple[list[str], list[str]]:
    """Lines that tell every figure of both runs, and those that tell which got worse than allowed."""
    lines, worse = [], []
    for name, (read, allowed) in FIGURES.items():
        now, before = read(new), read(old)
        lines.append(f"{name}: {before:.2f} -> {now:.2f}, {now / before:.2f} times")
        if now > before * allowed:
            worse.append(f"{name} grew from {before:.2f} to {now:.2f}, by more than the {allowed - 1:.0%} allowed")
    return lines, worse


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares a run of benchmarks.step with the one before.")
    parser.add_argument("file", type=Path, nargs="?", help="the run to judge (the newest recorded one)")
    file = parser.parse_args().file
    runs = recorded()
    if file is None and not runs:
        sys.exit(f"error: no run is recorded in {FOLDER}; make one: python -m benchmarks.step")
    new = (file, json.loads(file.read_text())) if file else runs[-1]
    old = last_before(new, runs)
    if old is None:
        print(f"{new[0].name}: no earlier run on {new[1]['machine']['kind']} to compare with")
        return
    lines, worse = compare(new[1], old[1])
    print("\n".join([f"{old[0].name} -> {new[0].name}", *lines]))
    if worse:
        sys.exit("error: " + "; ".join(worse))


if __name__ == "__main__":
    main()
