"""Runs with weights that are behind: prompts answered ahead of the steps, and weights pushed every 4 steps.

    .venv/bin/python -m benchmarks.asynchronous [ARM ...] [--seeds 1 2 3] [--runs outputs/asynchronous]

The first arms train on as many prompts in as many steps as the default, which benchmarks/defaults.py runs; the others
with half its learning rate in twice its steps, beside a synchronous arm of their own. Held-out accuracy is the mean
over seeds beside its spread. Every run is added to benchmarks/results/asynchronous.json at once; one that stands there
is skipped. On two cores a run takes 4.5 minutes, one of the others 8. The seconds say nothing of GPUs: responses of 16
tokens leave no stragglers that would be worth stopping.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.default_run import (
    arm_and_seed,
    arms_with_seeds,
    cell,
    over_seeds,
    seeded,
    summarize,
    train,
)
from benchmarks.machine import ROOT, provenance, results_file, run_missing, slug

ASYNC = ["trainer.v1.trainer_mode=colocate_async"]
SLOWER = ["actor_rollout_ref.actor.optim.lr=1e-5", "trainer.total_training_steps=24"]
EVERY_4 = ["trainer.rollout_sync_freq=4", "actor_rollout_ref.rollout.free_cache_engine=False"]
ARMS = {
    "colocate_async": ASYNC,
    "sync, weights every 4 steps": EVERY_4,
    "colocate_async, weights every 4 steps": ASYNC + EVERY_4,
    "sync, lr 1e-5, 24 steps": SLOWER,
    "colocate_async, lr 1e-5, 24 steps": SLOWER + ASYNC,
    "sync, weights every 4 steps, lr 1e-5, 24 steps": SLOWER + EVERY_4,
}


def run(name: str, runs: Path) -> dict:
    """One run of an arm with a seed: accuracies before and after, staleness, seconds of a step."""
    arm, seed = arm_and_seed(name)
    folder = runs.resolve() / slug(name)
    history, _ = train([*ARMS[arm], *seeded(seed)], folder)
    steps = [one for one in history if "staleness/mean" in one]
    staleness = {
        "staleness_mean": statistics.mean(one["staleness/mean"] for one in steps),
        "staleness_max": max(one["staleness/max"] for one in steps),
    }
    return provenance() | summarize(history) | staleness


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs with weights that are behind.")
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {'; '.join(ARMS)} (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "outputs" / "asynchronous", help="where the runs' folders go"
    )
    options = parser.parse_args()
    if unknown := set(options.arms) - ARMS.keys():
        parser.error(f"no such arm: {'; '.join(sorted(unknown))}; choose from: {'; '.join(ARMS)}")
    arms = options.arms or list(ARMS)
    wanted = arms_with_seeds(arms, options.seeds)
    found = run_missing([], wanted, lambda name: run(name, options.runs), results_file("asynchronous"), "runs")
    for arm in arms:
        print(f"{arm}: {', '.join(f'{kind} {cell(*one)}' for kind, one in over_seeds(found, arm).items())}")


if __name__ == "__main__":
    main()
