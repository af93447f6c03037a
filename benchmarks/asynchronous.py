"""The default run with weights that are behind: prompts answered ahead of the steps, and weights pushed every 4 steps.

    .venv/bin/python -m benchmarks.asynchronous [ARM ...] [--seeds 1 2 3] [--runs outputs/asynchronous]

Each arm trains on as many prompts in as many steps as the default, which benchmarks/defaults.py runs, or on twice as
many as its own synchronous arm does; held-out accuracy is the mean over seeds beside its spread. Every run is added to
benchmarks/results/asynchronous.json at once; one that stands there is skipped. On two cores a run of 12 steps takes 4.5
minutes. The seconds say nothing of GPUs: responses of 16 tokens
leave no stragglers that would be worth stopping.
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


def ahead(batches: float) -> list[str]:
    return ["trainer.v1.trainer_mode=colocate_async", f"trainer.v1.colocate_async.num_warmup_batches={batches:g}"]


def every(steps: int) -> list[str]:
    return [f"trainer.rollout_sync_freq={steps}", "actor_rollout_ref.rollout.free_cache_engine=False"]


LONGER = ["trainer.total_training_steps=24"]
SLOWER = [*LONGER, "actor_rollout_ref.actor.optim.lr=1e-5"]
ARMS = {
    "sync, 24 steps, lr 1e-5": SLOWER,
    "colocate_async, a quarter of a batch ahead, 24 steps, lr 1e-5": ahead(0.25) + SLOWER,
    "sync, weights every 4 steps, 24 steps, lr 1e-5": every(4) + SLOWER,
    "sync, 24 steps": LONGER,
    "colocate_async, a quarter of a batch ahead, 24 steps": ahead(0.25) + LONGER,
    "sync, weights every 4 steps, 24 steps": every(4) + LONGER,
    "colocate_async": ahead(1),
    "colocate_async, a quarter of a batch ahead": ahead(0.25),
    "sync, weights every 4 steps": every(4),
    "colocate_async, weights every 4 steps": ahead(1) + every(4),
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
    wanted = arms_with_seeds(arms, options.seeds)
    found = run_missing([], wanted, lambda name: run(name, options.runs), results_file("asynchronous"), "runs")
    for arm in arms:
        print(f"{arm}: {', '.join(f'{kind} {cell(*one)}' for kind, one in over_seeds(found, arm).items())}")


if __name__ == "__main__":
    main()
