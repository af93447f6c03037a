"""What the default run on a CPU learns with settings changed: the sweep that its defaults are chosen by.

    .venv/bin/python -m benchmarks.defaults [ARM ...] [--seeds 1] [--runs outputs/defaults]

Each arm (of ARMS) differs from `bash run_spin.sh` in the settings that its name says. Every run is added to
benchmarks/results/defaults.json at once; one that stands there is skipped. Then the table of docs/defaults.md
is made anew. A run takes 4.5 minutes on two cores, with 8 responses more.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.default_run import (
    KINDS,
    arm_and_seed,
    arms_with_seeds,
    cell,
    markdown,
    over_seeds,
    recorded,
    runs_of,
    seeded,
)
from benchmarks.machine import ROOT, results_file, run_missing, slug
from benchmarks.scaling import fill

DOCUMENT = ROOT / "docs" / "defaults.md"
OPTIMIZER = "actor_rollout_ref.actor.optim"
BEFORE = f"{OPTIMIZER}.lr=1e-5"  # the default when the sweep began
SETTINGS = [
    [],
    [BEFORE],
    [f"{OPTIMIZER}.lr=3e-5"],
    ["actor_rollout_ref.rollout.n=2"],
    ["actor_rollout_ref.rollout.n=8"],
    ["algorithm.dpo_pairing=all"],
    ["algorithm.dpo_beta=0.03"],
    ["algorithm.dpo_beta=0.3"],
    ["trainer.ref_update_freq=1"],
    ["trainer.ref_update_freq=0"],
    [f"+{OPTIMIZER}.override_optimizer_config.eps=1e-4"],
    [BEFORE, "actor_rollout_ref.rollout.n=2"],
    [BEFORE, "trainer.ref_update_freq=1"],
    [BEFORE, "algorithm.dpo_beta=0.3"],
]


def name_of(settings: list[str]) -> str:
    """An arm's name: its settings without their sections."""
    pairs = (setting.split("=") for setting in settings)
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in pairs) or "default"


ARMS = {name_of(settings): settings for settings in SETTINGS}


def table(found: dict[str, dict]) -> str:
    """Markdown: a line an arm, those that reach most first; runs that failed stand below."""
    if not found:
        return "Not measured yet: `.venv/bin/python -m benchmarks.defaults` fills this table."
    head = ("changed", "seeds", "sampled, after", "greedy, after", "pairs a step")
    lines = [head, ("---",) * len(head)]
    reached = {arm: over_seeds(found, arm) for arm in ARMS}
    for arm in sorted((arm for arm in ARMS if reached[arm]), key=lambda arm: -reached[arm]["sampled"][0]):
        title = arm if arm == "default" else f"`{arm}`"
        cells = (cell(*reached[arm][kind]) for kind in KINDS)
        pairs = statistics.mean(one["pairs"] for one in runs_of(found, arm))
        lines.append((title, str(reached[arm]["sampled"][2]), *cells, f"{pairs:.0f}"))
    lines += [(name, "failed", one["failed"], "", "") for name, one in found.items() if "failed" in one]
    return markdown(lines, missing=", ".join(f"`{arm}`" for arm in ARMS if not reached[arm]))


def write_document(found: dict[str, dict], document: Path = DOCUMENT) -> None:
    document.write_text(fill(document.read_text(), {"sweep": table(found)}))


def sweep(arms: list[str], seeds: list[int], runs: Path, file: Path) -> dict[str, dict]:
    """Runs these arms, all without any, with each seed that the file lacks; the file's runs with them."""

    def run_one(name: str) -> dict:
        arm, seed = arm_and_seed(name)
        return recorded([*seeded(seed), *ARMS[arm]], runs.resolve() / slug(name))

    return run_missing([], arms_with_seeds(arms or list(ARMS), seeds), run_one, file, "runs")


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the default run with settings changed.")
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(ARMS)} (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds to run each with (1)")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "defaults", help="where the runs' folders go")
    options = parser.parse_args()
    if unknown := set(options.arms) - ARMS.keys():
        parser.error(f"no such arm: {', '.join(sorted(unknown))}; choose from: {', '.join(ARMS)}")
    found = sweep(options.arms, options.seeds, options.runs, results_file("defaults"))
    write_document(found)
    print(table(found))


if __name__ == "__main__":
    main()
