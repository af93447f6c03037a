"""What the default run learns of other small tasks: held-out accuracy before and after its twelve steps.

    .venv/bin/python -m benchmarks.tasks [--seeds 1] [--runs outputs/tasks] [NAME ...]

Tasks of examples/tasks, each with every seed, as `bash run_spin.sh` starts it on a CPU. Every run is added to
benchmarks/results/tasks-MACHINE.json at once; one that stands there is skipped. NAMEs, such as "larger, seed 1", are
run, again if need be, and no others. Then the table of docs/tasks.md is made anew. A run takes 5 minutes on two cores.
"""

import argparse
import re
import statistics
from dataclasses import asdict
from pathlib import Path

from benchmarks.losses import summarize, train
from benchmarks.machine import ROOT, provenance, results_file, run_missing
from benchmarks.scaling import fill
from recipe.spin.examples.tasks.prepare import TASKS, prepare

DOCUMENT = ROOT / "docs" / "tasks.md"
REWARD = ROOT / "examples" / "tasks" / "reward.py"
SHOWN = {"sums": "What is 38 + 15?", "differences": "What is 17 - 9?", "larger": "Which number is larger, 59 or 63?"}
SHOWN |= {"opposites": "What is the opposite of hot?"}


def arms(seeds: list[int]) -> list[str]:
    return [f"{task}, seed {seed}" for seed in seeds for task in TASKS]


def overrides(name: str, data: Path) -> list[str]:
    """The settings of an arm's run whose data lies there."""
    _, seed = name.split(", seed ")
    return [
        f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/test.parquet",
        f"reward.custom_reward_function.path={REWARD}",
        f"data.seed={seed}",
        f"actor_rollout_ref.rollout.seed={seed}",
    ]


def run(name: str, folder: Path) -> dict:
    """Trains one arm; what came of it, or the last words of a run that failed."""
    data = folder.with_name(f"{folder.name}-data")
    prepare(name.split(",")[0], data)
    try:
        history, process = train(overrides(name, data), folder)
    except RuntimeError as error:
        return provenance() | {"failed": str(error).strip().splitlines()[-1]}
    return provenance() | summarize(history) | {"process": asdict(process)}


def table(found: dict[str, dict]) -> str:
    """Markdown: a line a task, the mean over its seeds; runs that failed stand below."""
    if not found:
        return "Not measured yet: `.venv/bin/python -m benchmarks.tasks` fills this table."
    head = ("task", "asked, for example", "seeds", "sampled before", "sampled after", "greedy before", "greedy after")
    lines = [head, ("---",) * len(head)]
    for task in TASKS:
        done = [one for name, one in found.items() if name.startswith(f"{task},") and "failed" not in one]
        if done:
            cells = (
                f"{statistics.mean(one[when][kind] for one in done):.3f}"
                for kind in ("sampled", "greedy")
                for when in ("before", "after")
            )
            lines.append((f"`{task}`", SHOWN[task], str(len(done)), *cells))
    lines += [(name, one["failed"], "failed", "", "", "", "") for name, one in found.items() if "failed" in one]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_document(found: dict[str, dict], document: Path = DOCUMENT) -> None:
    document.write_text(fill(document.read_text(), {"tasks": table(found)}))


def sweep(names: list[str], seeds: list[int], runs: Path, file: Path) -> dict[str, dict]:
    """Runs the arms of these names, without names those that the file lacks; the file's with them."""

    def run_one(name: str) -> dict:
        return run(name, runs.resolve() / re.sub(r"[^a-z0-9]+", "-", name))

    return run_missing(names, arms(seeds), run_one, file, "tasks")


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the default run on other small tasks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help='arms to run, such as "larger, seed 1" (the missing)')
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds to run every task with (1)")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "tasks", help="where the runs' folders go")
    options = parser.parse_args()
    if unknown := set(options.names) - set(arms(options.seeds)):
        parser.error(f"no such arm: {'; '.join(sorted(unknown))}; choose from: {'; '.join(arms(options.seeds))}")
    found = sweep(options.names, options.seeds, options.runs, results_file("tasks"))
    write_document(found)
    print(table(found))


if __name__ == "__main__":
    main()
