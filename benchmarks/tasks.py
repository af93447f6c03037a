"""What the default run learns of other small tasks: held-out accuracy before and after its twelve steps.

    .venv/bin/python -m benchmarks.tasks [--seeds 1] [--runs outputs/tasks] [NAME ...]

Tasks of examples/tasks, each with every seed, as `bash run_spin.sh` starts it on a CPU. Every run is added to
benchmarks/results/tasks.json at once; one that stands there is skipped. NAMEs, such as "larger, seed 1", are
run, again if need be, and no others. Then the table of docs/tasks.md is made anew. A run takes 5 minutes on two cores.
"""

import argparse
from pathlib import Path

from benchmarks.default_run import KINDS, arm_and_seed, arms_with_seeds, cell, markdown, over_seeds, recorded, seeded
from benchmarks.machine import ROOT, results_file, run_missing, slug
from benchmarks.scaling import fill
from recipe.spin.examples.tasks.prepare import TASKS, prepare

DOCUMENT = ROOT / "docs" / "tasks.md"
REWARD = ROOT / "examples" / "tasks" / "reward.py"
SHOWN = {"sums": "What is 38 + 15?", "differences": "What is 17 - 9?", "larger": "Which number is larger, 59 or 63?"}
SHOWN |= {"opposites": "What is the opposite of hot?"}


def overrides(name: str, data: Path) -> list[str]:
    """The settings of an arm's run whose data lies there."""
    files = [f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet"]
    return [*files, f"reward.custom_reward_function.path={REWARD}", *seeded(arm_and_seed(name)[1])]


def run(name: str, folder: Path) -> dict:
    """Trains one arm; what came of it, or the last words of a run that failed."""
    data = folder.with_name(f"{folder.name}-data")
    prepare(arm_and_seed(name)[0], data)
    return recorded(overrides(name, data), folder)


def table(found: dict[str, dict]) -> str:
    """Markdown: a line a task, mean and standard deviation over its seeds; runs that failed stand below."""
    if not found:
        return "Not measured yet: `.venv/bin/python -m benchmarks.tasks` fills this table."
    head = ("task", "asked, for example", "seeds", "sampled before", "sampled after", "greedy before", "greedy after")
    lines = [head, ("---",) * len(head)]
    for task in TASKS:
        before, after = (over_seeds(found, task, when) for when in ("before", "after"))
        if after:
            cells = (cell(*accuracy[kind]) for kind in KINDS for accuracy in (before, after))
            lines.append((f"`{task}`", SHOWN[task], str(after["sampled"][2]), *cells))
    lines += [(name, one["failed"], "failed", "", "", "", "") for name, one in found.items() if "failed" in one]
    return markdown(lines)


def write_document(found: dict[str, dict], document: Path = DOCUMENT) -> None:
    document.write_text(fill(document.read_text(), {"tasks": table(found)}))


def sweep(names: list[str], seeds: list[int], runs: Path, file: Path) -> dict[str, dict]:
    """Runs the arms of these names, without names those that the file lacks; the file's with them."""

    def run_one(name: str) -> dict:
        return run(name, runs.resolve() / slug(name))

    return run_missing(names, arms_with_seeds(list(TASKS), seeds), run_one, file, "tasks")


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the default run on other small tasks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help='arms to run, such as "larger, seed 1" (the missing)')
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds to run every task with (1)")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "tasks", help="where the runs' folders go")
    options = parser.parse_args()
    known = arms_with_seeds(list(TASKS), options.seeds)
    if unknown := set(options.names) - set(known):
        parser.error(f"no such arm: {'; '.join(sorted(unknown))}; choose from: {'; '.join(known)}")
    found = sweep(options.names, options.seeds, options.runs, results_file("tasks"))
    write_document(found)
    print(table(found))


if __name__ == "__main__":
    main()
