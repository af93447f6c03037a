"""Learning curves of this recipe and of TRL's OnlineDPOTrainer on the arithmetic example, side by side.

    .venv/bin/python -m benchmarks.learning_curves [--seeds 1 2 3] [--output outputs/learning_curves]

Runs what is missing under the output folder, one run after the other, then draws docs/learning_curves.png and prints
the table of docs/learning_curves.md. Needs the tests' packages (bash tests/run.sh installs them); twelve runs take
about two and a half hours on two cores. A run that exists is taken as it is; delete its folder to repeat it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import default_run
from benchmarks.default_run import markdown, seeded, spread
from benchmarks.inputs import DATA, MODEL, make_missing
from recipe.spin.rollout.validation_metrics import held_out_accuracy

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "learning_curves.png"
STEPS, EVERY = 12, 4

POINT = ("greedy", "sampled", "score", "seconds")
Curve = dict[int, dict[str, float]]  # step -> what POINT names, where it was measured


def run_trl(folder: Path, seed: int) -> None:
    """One run of TRL's trainer, in a process of its own."""
    unfinished = folder / "unfinished.jsonl"
    command = [sys.executable, "-m", "benchmarks.trl_online_dpo", "--seed", str(seed)]
    make_missing()
    command += ["--model", MODEL, "--data", str(DATA), "--output", str(unfinished)]
    command += ["--steps", str(STEPS), "--every", str(EVERY)]
    subprocess.run(command, check=True, env=os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"}, cwd=ROOT)
    unfinished.rename(folder / "metrics.jsonl")


def run_ours(*overrides: str) -> Callable[[Path, int], None]:
    """A function that makes one run of the recipe with these overrides, as a user would start it."""

    def run(folder: Path, seed: int) -> None:
        length = [f"trainer.total_training_steps={STEPS}", f"trainer.test_freq={EVERY}", "trainer.save_freq=-1"]
        environment = os.environ | {"RUN_DIR": str(folder), "SPIN_PROFILE": "cpu"}
        subprocess.run(
            ["bash", str(ROOT / "run_spin.sh"), *seeded(seed), *length, *overrides],
            check=True,
            env=environment,
            cwd=ROOT,
        )

    return run


LEARNING_RATE = "actor_rollout_ref.actor.optim.lr=1e-5"  # that of trl_online_dpo.py, in all arms
TRL_SETTINGS = ("actor_rollout_ref.rollout.n=2", "trainer.ref_update_freq=0", LEARNING_RATE)
# As TRL's process: no recomputation of activations, and micro-batches that memory beyond the profile's 10 GB allows
TRL_MEMORY = (
    "actor_rollout_ref.model.enable_gradient_checkpointing=False",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=1024",
)
# Folder, and how it is called and run. TRL last: the recipe's runs make the model and the data where they are missing
ARMS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "defaults": ("SPIN for verl, its defaults", run_ours(LEARNING_RATE)),
    "trl_settings": ("SPIN for verl, TRL's settings", run_ours(*TRL_SETTINGS)),
    "trl_ties": (
        "SPIN for verl, TRL's settings and ties",
        run_ours(*TRL_SETTINGS, *TRL_MEMORY, "algorithm.dpo_tie_policy=first"),
    ),
    "trl": ("TRL OnlineDPOTrainer", run_trl),
}


def read(folder: Path) -> Curve:
    """The curve of a finished run, TRL's or ours."""
    curve: Curve = {}
    for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        ours = {"score": entry.get("score/mean"), "seconds": entry.get("timing_s/step")} | held_out_accuracy(entry)
        point = ours | entry  # TRL's lines have the curve's names already
        curve[entry["step"]] = {name: point[name] for name in POINT if point.get(name) is not None}
    return curve


def mean_and_spread(curves: list[Curve], step: int, name: str) -> tuple[float, float]:
    values = [curve[step][name] for curve in curves]
    return statistics.mean(values), spread(values)


def steps_with(curves: list[Curve], name: str) -> list[int]:
    return [step for step, point in sorted(curves[0].items()) if name in point]


def table(arms: dict[str, list[Curve]]) -> str:
    """Markdown: sampled accuracy over steps, greedy accuracy at the end, the median step's seconds."""
    measured = sorted({step for curves in arms.values() for step in steps_with(curves, "sampled")})
    head = ["", *(f"step {step}" for step in measured), f"greedy, step {measured[-1]}", "seconds a step, median"]
    lines = [head, ["---"] * len(head)]
    for label, curves in arms.items():
        cells = [cell(curves, step, "sampled") for step in measured]
        seconds = statistics.median(p["seconds"] for curve in curves for p in curve.values() if "seconds" in p)
        lines.append([label, *cells, cell(curves, measured[-1], "greedy"), f"{seconds:.0f}"])
    return markdown(lines)


def cell(curves: list[Curve], step: int, name: str) -> str:
    if step not in steps_with(curves, name):
        return ""
    return default_run.cell(*mean_and_spread(curves, step, name), len(curves))


def draw(arms: dict[str, list[Curve]], path: Path) -> None:
    """Draws held-out and training accuracy over steps, the mean over seeds within its standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), sharey=True)
    titles = {
        "sampled": "Held-out prompts, sampled",
        "greedy": "Held-out prompts, greedy",
        "score": "Training batch, before its update",
    }
    for panel, (name, title) in zip(axes, titles.items(), strict=True):
        for label, curves in arms.items():
            steps = steps_with(curves, name)
            points = [mean_and_spread(curves, step, name) for step in steps]
            means = [mean for mean, _ in points]
            panel.plot(steps, means, "o-", markersize=3, label=label)
            low, high = ([mean + sign * spread for mean, spread in points] for sign in (-1, 1))
            panel.fill_between(steps, low, high, alpha=0.2)
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning curves of this recipe and of TRL's OnlineDPOTrainer.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "learning_curves")
    options = parser.parse_args()

    arms: dict[str, list[Curve]] = {label: [] for label, _ in ARMS.values()}
    for seed in options.seeds:  # the arms in turn, so that a noisy hour falls on all of them
        for name, (label, run) in ARMS.items():
            folder = options.output / f"{name}-seed{seed}"
            if not (folder / "metrics.jsonl").exists():
                folder.mkdir(parents=True, exist_ok=True)
                run(folder.resolve(), seed)
            arms[label].append(read(folder))
    draw(arms, PICTURE)
    print(table(arms))


if __name__ == "__main__":
    main()
