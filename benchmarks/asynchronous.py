"""The default run with weights that are behind: prompts answered ahead of the steps, and weights pushed every 4 steps.

    .venv/bin/python -m benchmarks.asynchronous [ARM ...] [--seeds 1 2 3] [--runs outputs/asynchronous]

Each arm trains on as many prompts in as many steps; held-out accuracy is the mean over seeds beside its spread. What a
run gave is kept beside its folder, and the run not repeated. Writes benchmarks/results/DATE-asynchronous.json; on two
cores a run takes 4.5 minutes. The seconds say nothing of GPUs: responses of 16 tokens leave no stragglers that would be
worth stopping.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.losses import summarize, train
from benchmarks.machine import ROOT, provenance, write_result

ASYNC = ["trainer.v1.trainer_mode=colocate_async"]
EVERY_4 = ["trainer.rollout_sync_freq=4", "actor_rollout_ref.rollout.free_cache_engine=False"]
ARMS = {
    "sync": [],
    "colocate_async": ASYNC,
    "sync, weights every 4 steps": EVERY_4,
    "colocate_async, weights every 4 steps": ASYNC + EVERY_4,
}


def run(arm: str, seed: int, folder: Path) -> dict:
    """One run of an arm, or what it gave before: accuracies before and after, staleness, seconds of a step."""
    file = folder.with_suffix(".json")
    if file.exists():
        return json.loads(file.read_text())
    seeds = [f"data.seed={seed}", f"actor_rollout_ref.rollout.seed={seed}"]
    history, _ = train([*ARMS[arm], *seeds], folder)
    steps = [one for one in history if "staleness/mean" in one]
    found = summarize(history) | {
        "staleness_mean": statistics.mean(one["staleness/mean"] for one in steps),
        "staleness_max": max(one["staleness/max"] for one in steps),
    }
    file.write_text(json.dumps(found))
    return found


def over_seeds(runs: dict[str, dict]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over the seeds of an arm's accuracies after training."""
    found = {}
    for way in next(iter(runs.values()))["after"]:
        values = [one["after"][way] for one in runs.values()]
        found[way] = (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The default run with weights that are behind.")
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(ARMS)} (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "outputs" / "asynchronous", help="where the runs' folders go"
    )
    options = parser.parse_args()
    unknown = set(options.arms) - set(ARMS)
    if unknown:
        parser.error(f"no arm is called {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    found = {}
    for arm in options.arms or ARMS:
        found[arm] = {}
        for seed in options.seeds:
            sys.stderr.write(f"[benchmark] {arm}, seed {seed} ...\n")
            name = arm.replace(", ", "-").replace(" ", "-")
            found[arm][str(seed)] = run(arm, seed, options.runs.resolve() / f"{name}-{seed}")
            print(f"{arm}, seed {seed}: {found[arm][str(seed)]}", flush=True)
        print(f"{arm}: {over_seeds(found[arm])}", flush=True)
    print(write_result("asynchronous", provenance() | {"runs": found}))


if __name__ == "__main__":
    main()
