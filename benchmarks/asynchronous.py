"""The default run with weights that are behind: prompts answered ahead of the steps, and weights pushed every 4 steps.

    .venv/bin/python -m benchmarks.asynchronous [ARM ...] [--seeds 1 2 3] [--runs outputs/asynchronous]

Each arm trains on as many prompts in as many steps; held-out accuracy is the mean over seeds beside its spread. Every
run is added to benchmarks/results/asynchronous-MACHINE.json at once; one that stands there is skipped. On two cores a
run takes 4.5 minutes. The seconds say nothing of GPUs: responses of 16 tokens leave no stragglers that would be worth
stopping.
"""

import argparse
import re
import statistics
from pathlib import Path

from benchmarks.losses import summarize, train
from benchmarks.machine import ROOT, provenance, results_file, run_missing

ASYNC = ["trainer.v1.trainer_mode=colocate_async"]
EVERY_4 = ["trainer.rollout_sync_freq=4", "actor_rollout_ref.rollout.free_cache_engine=False"]
ARMS = {
    "sync": [],
    "colocate_async": ASYNC,
    "sync, weights every 4 steps": EVERY_4,
    "colocate_async, weights every 4 steps": ASYNC + EVERY_4,
}


def names_of(arms: list[str], seeds: list[int]) -> list[str]:
    return [f"{arm}, seed {seed}" for arm in arms for seed in seeds]


def run(name: str, runs: Path) -> dict:
    """One run of an arm with a seed: accuracies before and after, staleness, seconds of a step."""
    arm, _, seed = name.rpartition(", seed ")
    folder = runs.resolve() / re.sub(r"[^a-z0-9_]+", "-", name)
    history, _ = train([*ARMS[arm], f"data.seed={seed}", f"actor_rollout_ref.rollout.seed={seed}"], folder)
    steps = [one for one in history if "staleness/mean" in one]
    staleness = {
        "staleness_mean": statistics.mean(one["staleness/mean"] for one in steps),
        "staleness_max": max(one["staleness/max"] for one in steps),
    }
    return provenance() | summarize(history) | staleness


def over_seeds(found: dict[str, dict], arm: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over the seeds of an arm's accuracies after training."""
    after = [one["after"] for name, one in found.items() if name.rpartition(", seed ")[0] == arm]
    values = {way: [one[way] for one in after] for way in (after[0] if after else ())}
    return {
        way: (statistics.mean(ones), statistics.stdev(ones) if len(ones) > 1 else 0.0) for way, ones in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The default run with weights that are behind.")
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {'; '.join(ARMS)} (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "outputs" / "asynchronous", help="where the runs' folders go"
    )
    options = parser.parse_args()
    if unknown := set(options.arms) - ARMS.keys():
        parser.error(f"no such arm: {'; '.join(sorted(unknown))}; choose from: {'; '.join(ARMS)}")
    arms = options.arms or list(ARMS)
    wanted = names_of(arms, options.seeds)
    found = run_missing([], wanted, lambda name: run(name, options.runs), results_file("asynchronous"), "runs")
    for arm in arms:
        print(f"{arm}: {over_seeds(found, arm)}")


if __name__ == "__main__":
    main()
