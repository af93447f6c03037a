"""The default run with a reward model in place of the reward: held-out accuracy by the rule, which it never sees.

    .venv/bin/python -m benchmarks.reward_model [--runs outputs/reward_model]

The reward model (benchmarks/sum_classifier.py) is trained first, unless RUNS/classifier holds one, and served by verl's
reward loop. Writes benchmarks/results/DATE-reward-model.json; about fifteen minutes on two cores.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks import sum_classifier
from benchmarks.default_run import seeded, summarize, train
from benchmarks.inputs import MODEL, make_missing
from benchmarks.machine import ROOT, provenance, write_result
from recipe.spin.examples.arithmetic.reward import compute_score

UPDATES = 100
MADE = "made.json"  # beside a classifier that was saved: how it was made


def classifier(folder: Path) -> dict:
    """How the reward model in this folder was made; makes it where there is none."""
    made = folder / MADE
    if not made.exists():
        make_missing()
        made.write_text(json.dumps(sum_classifier.make(MODEL, folder, UPDATES)))
    return json.loads(made.read_text())


def run(reward_model: Path, folder: Path) -> dict:
    """One run that follows the reward model; accuracy by the rule, and the model's own scores."""
    answers = folder.parent / "answers"
    history, process = train(
        [
            *seeded(1),
            "reward.custom_reward_function.path=null",
            "reward.reward_model.enable=True",
            f"reward.reward_model.model_path={reward_model}",
            f"trainer.validation_data_dir={answers}",
        ],
        folder,
    )
    summary = summarize(history)
    scores = {name: summary.pop(name) for name in ("before", "after")}
    del summary["training_accuracy"]  # unknown: training answers have the model's scores alone
    before, after = (grade(answers / f"{step}.jsonl") for step in (0, history[-1]["step"]))
    return {"before": before, "after": after, "scores": scores, "process": asdict(process)} | summary


def grade(file: Path) -> dict[str, float | None]:
    """Of the held-out answers that verl wrote down: accuracy by the rule, greedy and sampled.

    `order` is the share of the pairs of a right and a wrong sample to one prompt that the scores put in the right
    order; None where there is no such pair.
    """
    prompts = defaultdict(list)
    for line in file.read_text().splitlines():
        answer = json.loads(line)
        right = compute_score("arithmetic", answer["output"], answer["gts"])["acc"]
        prompts[answer["uid"].rsplit("_", 2)[0]].append((right, answer["score"]))
    samples = [group for group in prompts.values() if len(group) > 1]  # a greedy answer has a uid of its own
    greedy = [group for group in prompts.values() if len(group) == 1]
    ordered = [good > bad for group in samples for right, good in group for other, bad in group if right > other]
    return {
        "sampled": _mean(right for group in samples for right, _ in group),
        "greedy": _mean(right for group in greedy for right, _ in group),
        "order": _mean(ordered) if ordered else None,
    }


def _mean(values: Iterable[float]) -> float:
    return round(statistics.fmean(values), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description="The default run with a reward model in place of the reward.")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "reward_model", help="where the folders go")
    folder = parser.parse_args().runs.resolve()
    made = classifier(folder / "classifier")
    sys.stderr.write(f"[benchmark] the reward model orders {made['order_held_out']:.3f} of held-out pairs\n")
    found = run(folder / "classifier", folder / "run")
    print(f"by the rule: {found['before']} before, {found['after']} after", flush=True)
    print(write_result("reward-model", provenance() | {"reward_model": made} | found))


if __name__ == "__main__":
    main()
