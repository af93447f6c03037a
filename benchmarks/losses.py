"""What each loss learns on the arithmetic example in the default run's steps: accuracy held out, the failures too.

    .venv/bin/python -m benchmarks.losses [--runs outputs/losses] [NAME ...]

One seed and one run a loss, as `bash run_spin.sh` starts it on a CPU, with SETTINGS and those of ARMS. Every run is
added to benchmarks/results/losses.json at once; a loss that stands there is skipped, so that the command goes on where
it was stopped. NAMEs (of ARMS) are run, again if need be, and no others. Then the table of docs/losses.md is made anew.
A run takes 4.5 minutes on two cores, all of them about two hours.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.default_run import KINDS, markdown, recorded, seeded
from benchmarks.machine import ROOT, results_file, run_missing, slug
from benchmarks.scaling import fill

DOCUMENT = ROOT / "docs" / "losses.md"
# Half of the default's learning rate: with that, losses that work all end close to what the task allows
SETTINGS = [*seeded(1), "actor_rollout_ref.actor.optim.lr=1e-5"]
# beta as the default where a paper's scale is that of DPO, else near the paper's own: losses per token see log-ratios
# that are smaller by a response's length
ARMS: dict[str, tuple[str, ...]] = {
    "sigmoid (DPO, the default)": (),
    "sigmoid, label smoothing 0.1 (cDPO)": ("dpo_label_smoothing=0.1",),
    "[sigmoid, sft], 1 and 0.2 (RPO)": ("dpo_loss_type=[sigmoid,sft]", "dpo_loss_weights=[1.0,0.2]"),
    "hinge": ("dpo_loss_type=hinge",),
    "ipo": ("dpo_loss_type=ipo",),
    "ipo, means over tokens": ("dpo_loss_type=ipo", "dpo_average_log_prob=True"),
    "robust, label smoothing 0.1": ("dpo_loss_type=robust", "dpo_label_smoothing=0.1"),
    "exo_pair, label smoothing 0.001": ("dpo_loss_type=exo_pair", "dpo_label_smoothing=0.001"),
    "nca_pair": ("dpo_loss_type=nca_pair",),
    "bco_pair": ("dpo_loss_type=bco_pair",),
    "sppo_hard": ("dpo_loss_type=sppo_hard",),
    "aot": ("dpo_loss_type=aot",),
    "aot_unpaired": ("dpo_loss_type=aot_unpaired",),
    "apo_zero": ("dpo_loss_type=apo_zero",),
    "apo_down": ("dpo_loss_type=apo_down",),
    "discopop, tau 0.05": ("dpo_loss_type=discopop", "dpo_discopop_tau=0.05"),
    "discopop, tau 0.2": ("dpo_loss_type=discopop",),
    "sigmoid_norm, beta 5": ("dpo_loss_type=sigmoid_norm", "dpo_beta=5"),
    "sft": ("dpo_loss_type=sft",),
    "simpo, beta 2, gamma 1": ("dpo_loss_type=simpo", "dpo_beta=2", "dpo_simpo_gamma=1"),
    "dpop, lambda 50": ("dpo_loss_type=dpop",),
    "dpop, lambda 5": ("dpo_loss_type=dpop", "dpo_dpop_lambda=5"),
    "R-DPO, length penalty 0.02": ("dpo_length_penalty=0.02",),
    "LD-DPO, alpha 0.5": ("dpo_ld_alpha=0.5",),
    "WPO": ("dpo_use_weighting=True",),
    "f-DPO, forward KL": ("dpo_f_divergence_type=forward_kl",),
    "f-DPO, Jensen-Shannon": ("dpo_f_divergence_type=js_divergence",),
    "f-DPO, alpha-divergence 0.5": ("dpo_f_divergence_type=alpha_divergence",),
}


def table(found: dict[str, dict]) -> str:
    """Markdown: the losses by what they reached, their mean and worst, and those that failed."""
    if not found:
        return "Not measured yet: `.venv/bin/python -m benchmarks.losses` fills this table."
    done = {name: one for name, one in found.items() if "failed" not in one}
    head = ("loss", "sampled, after", "greedy, after", "log-prob a chosen token", "tokens a response", "warned of")
    lines = [head, ("---",) * len(head)]
    for name, one in sorted(done.items(), key=lambda item: -item[1]["after"]["sampled"]):
        logps, lengths = (f"{a:.2f} -> {b:.2f}" for a, b in (one["logp_per_chosen_token"], one["response_length"]))
        accuracies = (f"{one['after'][kind]:.3f}" for kind in KINDS)
        lines.append((name, *accuracies, logps, lengths, ", ".join(one["warnings"])))
    lines += [(name, "failed", "", "", "", one["failed"]) for name, one in found.items() if "failed" in one]
    if done:
        for label, pick in (("mean of all", statistics.mean), ("worst of all", min)):
            cells = (f"{pick(one['after'][kind] for one in done.values()):.3f}" for kind in KINDS)
            lines.append((f"**{label}**", *cells, "", "", ""))
    return markdown(lines, missing="; ".join(name for name in ARMS if name not in found))


def write_document(found: dict[str, dict], document: Path = DOCUMENT) -> None:
    document.write_text(fill(document.read_text(), {"sweep": table(found)}))


def sweep(names: list[str], runs: Path, file: Path) -> dict[str, dict]:
    """Runs the losses of these names, without names those that the file lacks; the file's losses with them."""

    def run_one(name: str) -> dict:
        folder = runs.resolve() / slug(name)
        return recorded([*SETTINGS, *(f"algorithm.{setting}" for setting in ARMS[name])], folder)

    return run_missing(names, ARMS, run_one, file, "losses")


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of every loss on the arithmetic example.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="losses to run (those that are missing)")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "losses", help="where the runs' folders go")
    options = parser.parse_args()
    if unknown := set(options.names) - ARMS.keys():
        parser.error(f"no such loss: {', '.join(unknown)}; choose from: {'; '.join(ARMS)}")
    found = sweep(options.names, options.runs, results_file("losses"))
    write_document(found)
    print(table(found))


if __name__ == "__main__":
    main()
