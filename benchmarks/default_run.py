"""The default run of a CPU with other settings: what a benchmark of many such runs asks of each."""

import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import ROOT, Finished, provenance, run_measured
from recipe.spin.rollout.validation_metrics import held_out_accuracy
from recipe.spin.run.drift import find_drift

KINDS = ("sampled", "greedy")


def seeded(seed: int) -> list[str]:
    """The settings of a run with this seed."""
    return [f"data.seed={seed}", f"actor_rollout_ref.rollout.seed={seed}"]


def arms_with_seeds(arms: list[str], seeds: list[int]) -> list[str]:
    """Names of the runs of these arms with each seed."""
    return [f"{arm}, seed {seed}" for seed in seeds for arm in arms]


def arm_and_seed(name: str) -> tuple[str, int]:
    """What a name of arms_with_seeds was made of."""
    arm, _, seed = name.rpartition(", seed ")
    return arm, int(seed)


def train(overrides: list[str], folder: Path) -> tuple[list[dict], Finished]:
    """The default run on a CPU with overrides, anew; its metrics step by step, and what its process took.

    Raises:
        RuntimeError: with the last words of a run that failed.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: it would be gone on with
    command = ["bash", str(ROOT / "run_spin.sh"), "trainer.save_freq=-1", *overrides]
    environment = os.environ | {"RUN_DIR": str(folder), "SPIN_PROFILE": "cpu", "PYTHON": sys.executable}
    process = run_measured(command, environment, folder.with_name(f"{folder.name}.log"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], process


def recorded(overrides: list[str], folder: Path) -> dict:
    """Trains; what came of it, or the last words of a run that failed, with where and when."""
    source = provenance() | {"overrides": overrides}
    try:
        history, process = train(overrides, folder)
    except RuntimeError as error:
        return source | {"failed": str(error).strip().splitlines()[-1]}
    return source | summarize(history) | {"process": asdict(process)}


def summarize(history: list[dict]) -> dict:
    """Held-out accuracy before and after, and what the last step looked like, from the lines of a metrics.jsonl."""
    held_out = {str(one["step"]): accuracy for one in history if (accuracy := held_out_accuracy(one))}
    accuracies = list(held_out.values())
    trained = [one for one in history if "logps/chosen_token" in one]
    last = trained[-1]
    warned = {kind for number in range(len(trained) + 1) for kind in find_drift(trained[:number])}
    return {
        "steps": history[-1]["step"],
        "held_out": held_out,
        "before": accuracies[0],
        "after": accuracies[-1],
        "training_accuracy": {str(one["step"]): one["score/accuracy"] for one in history if "score/accuracy" in one},
        "pairs": statistics.mean(one["pairs/used"] for one in trained),
        "logp_per_chosen_token": [trained[0]["logps/chosen_token"], last["logps/chosen_token"]],
        "response_length": [trained[0]["response_length/mean"], last["response_length/mean"]],
        "step_seconds": statistics.median(one["timing_s/step"] for one in trained),
        "warnings": sorted(warned),
    }


def runs_of(found: dict[str, dict], arm: str) -> list[dict]:
    """An arm's runs, one a seed, but for those that failed."""
    return [one for name, one in found.items() if arm_and_seed(name)[0] == arm and "failed" not in one]


def over_seeds(found: dict[str, dict], arm: str, when: str = "after") -> dict[str, tuple[float, float, int]]:
    """Of each of KINDS an arm's mean and standard deviation over seeds, and their number; failed runs are left out."""
    runs = [one[when] for one in runs_of(found, arm)]
    values = {kind: [one[kind] for one in runs if kind in one] for kind in KINDS}
    return {kind: (statistics.mean(ones), spread(ones), len(ones)) for kind, ones in values.items() if ones}


def spread(values: list[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def cell(mean: float, deviation: float, number: int) -> str:
    """How a mean over seeds is written in a table."""
    return f"{mean:.3f} ({deviation:.3f})" if number > 1 else f"{mean:.3f}"


def markdown(lines: list[Sequence[str]], missing: str = "") -> str:
    """A table of these lines, and below it the names of runs that it lacks."""
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return rows + (f"\n\nNot run yet: {missing}." if missing else "")
