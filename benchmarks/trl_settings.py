"""TRL's fastest setting on this machine: prompts a micro-batch, and settings of the memory allocator.

    .venv/bin/python -m benchmarks.trl_settings [--batches 4 8 16 32] [--allocators none recipe keep keep+huge]

Every setting trains on the same 32 pairs a step, in a process of its own; the first step warms up and does not count,
and the shortest of the others does.
Each is added to one file, benchmarks/results/trl-settings-MACHINE.json, at once; one that stands there is skipped.
step.py takes the fastest from it. All sixteen take 40 minutes on two cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks.inputs import DATA, MODEL, make_missing
from benchmarks.machine import (
    allocator_settings,
    describe,
    plain_environment,
    provenance,
    results_file,
    run_measured,
    run_missing,
    slug,
)

BATCHES = (4, 8, 16, 32)
PHASES = ("gen", "ref", "update", "optimizer")


def run_trl(model: str, data: Path, steps: int, batch: int, allocator: str, folder: Path) -> dict:
    """Trains with TRL for a number of steps and one to warm up; returns the steps, their medians and the memory."""
    output = folder / "trl.jsonl"
    command = [sys.executable, "-m", "benchmarks.trl_online_dpo", "--model", model, "--data", str(data)]
    command += ["--output", str(output), "--steps", str(steps + 1), "--every", "0", "--in-order"]
    command += ["--batch", str(batch), "--optimizer", "adamw_torch_fused"]
    environment = plain_environment(TRL_EXPERIMENTAL_SILENCE="1", **allocator_settings()[allocator])
    process = run_measured(command, environment, folder / "trl.log")
    _, *counted = map(json.loads, output.read_text().splitlines())
    medians = {phase: statistics.median(step[phase] for step in counted) for phase in PHASES}
    return {
        "step_seconds": statistics.median(step["seconds"] for step in counted),
        "phases": medians,
        "response_tokens": statistics.median(step["response_tokens"] for step in counted),
        "process": asdict(process),
        "steps": counted,
    }


def settings_file() -> Path:
    """Where the settings that were tried on this kind of machine stand."""
    return results_file(f"trl-settings-{slug(describe()['kind'])}")


def try_missing(model: str, data: Path, steps: int, settings: list[tuple[int, str]], file: Path) -> list[dict]:
    """Runs the settings (prompts a micro-batch, allocator) that the file lacks; all that stand there then."""
    named = {f"{batch} prompts, allocator {allocator}": (batch, allocator) for batch, allocator in settings}

    def run_one(name: str) -> dict:
        batch, allocator = named[name]
        with tempfile.TemporaryDirectory() as folder:
            found = run_trl(model, data, steps, batch, allocator, Path(folder))
        return {"batch": batch, "allocator": allocator} | found

    source = provenance() | {"allocators": allocator_settings()}
    return list(run_missing([], named, run_one, file, "tried", **source).values())


def best_step(setting: dict) -> float:
    """The shortest of its steps: what other programs on the machine do only makes a step longer."""
    return min(step["seconds"] for step in setting["steps"])


def fastest(tried: Iterable[dict]) -> dict:
    """The setting with the shortest step."""
    return min(tried, key=best_step)


def table(tried: list[dict]) -> str:
    columns = ("prompts a micro-batch", "allocator", "shortest step, s", "median", *PHASES, "peak memory, GB")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for one in sorted(tried, key=best_step):
        phases = " | ".join(f"{one['phases'][phase]:.1f}" for phase in PHASES)
        memory = one["process"]["peak_memory_gb"]
        steps = f"{best_step(one):.1f} | {one['step_seconds']:.1f}"
        lines.append(f"| {one['batch']} | {one['allocator']} | {steps} | {phases} | {memory:.1f} |")
    return "\n".join(lines)


def main() -> None:
    allocators = allocator_settings()
    parser = argparse.ArgumentParser(description="TRL's fastest setting on this machine.")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--allocators", nargs="+", choices=allocators, default=list(allocators))
    parser.add_argument("--steps", type=int, default=2, help="steps of each that count (2)")
    options = parser.parse_args()
    make_missing(options.model, options.data)

    settings = [(batch, allocator) for batch in options.batches for allocator in options.allocators]
    print(table(try_missing(options.model, options.data, options.steps, settings, settings_file())))


if __name__ == "__main__":
    main()
