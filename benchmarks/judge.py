"""A run with a judge in place of the reward: one that knows the rule, and the same turned round.

All else is as in the default run.

    .venv/bin/python -m benchmarks.judge [--runs outputs/judge]

The judge (benchmarks/rule_judge.py) takes 0.2 s an answer, 5% of which hold no verdict. The reward function is for the
reports alone. Writes benchmarks/results/DATE-judge.json, with what tells likelihood and length of every step
(run/drift.py); ten minutes on two cores.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.default_run import seeded, summarize, train
from benchmarks.machine import ROOT, provenance, write_result
from benchmarks.rule_judge import Rule, RuleJudge, is_no_sum, is_sum
from recipe.spin.run.drift import READ

DELAY, UNREADABLE = 0.2, 0.05
STEPS = {"knows the rule": 12, "turned round": 5}


def run(rule: Rule, steps: int, folder: Path) -> dict:
    """One run against a judge with this rule."""
    with RuleJudge(rule, delay=DELAY, unreadable=UNREADABLE) as judge:
        source = ["algorithm.preference_source=judge", f"algorithm.judge.servers=[{judge.address}]"]
        history, _ = train([*seeded(1), *source, f"trainer.total_training_steps={steps}"], folder)
    steps_judged = [one for one in history if "judge/asked" in one]
    means = {
        name: sum(one[f"judge/{name}"] for one in steps_judged) / len(steps_judged)
        for name in ("asked", "tie_rate", "unreadable_rate", "first_rate", "seconds_per_prompt")
    }
    by_step = {one["step"]: {name: one[name] for name in READ} for one in history if READ[0] in one}
    return summarize(history) | {"judge": means, "by_step": by_step}


def main() -> None:
    parser = argparse.ArgumentParser(description="The default run with a judge in place of the reward.")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "judge", help="where the runs' folders go")
    options = parser.parse_args()
    found = {}
    for (name, steps), rule in zip(STEPS.items(), (is_sum, is_no_sum), strict=True):
        sys.stderr.write(f"[benchmark] a judge: {name} ...\n")
        found[name] = run(rule, steps, options.runs.resolve() / name.replace(" ", "-"))
        print(f"{name}: {found[name]['before']} before, {found[name]['after']} after", flush=True)
    print(write_result("judge", provenance() | {"delay": DELAY, "unreadable": UNREADABLE, "runs": found}))


if __name__ == "__main__":
    main()
