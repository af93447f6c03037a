"""What a run leaves for its user: metrics.jsonl, summary.json, a plot, and a few lines on the console."""

import json
from pathlib import Path

from omegaconf import DictConfig

from recipe.spin.rollout.validation_metrics import (
    HELD_OUT_FAULTS,
    History,
    held_out_accuracy,
    held_out_faults,
    held_out_measure,
    in_words,
    is_finite,
)
from recipe.spin.run_folder import checkpoints, read_history, tracked_step, write_whole

PLOT = "learning_curve.png"


def write(config: DictConfig, seconds: float, peak_memory_gb: float | None) -> dict:
    """Writes the report of a finished run into its folder, prints it and returns the summary.

    `seconds` and `peak_memory_gb` are those of this process; a resumed run adds up the seconds of its parts. No peak is
    known of a run on a cluster that it joined.
    """
    folder = Path(config.trainer.default_local_dir)
    history, unreadable = read_history(folder)
    lines = [json.dumps({"step": step, **metrics}) for step, metrics in history.items()]
    write_whole(folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
    summary = summarize(history) | {
        "seconds": round(seconds, 1),
        "peak_memory_gb": peak_memory_gb and round(peak_memory_gb, 2),
        "checkpoint": latest_checkpoint(folder),
        "unreadable_metrics_lines": unreadable,
    }
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")  # it marks a finished run
    print_summary(summary, folder, picture=_draw(history, folder / PLOT))
    return summary


def _draw(history: History, path: Path) -> str:
    """Where the plot is, or why there is none: a picture is no reason to fail a run that is finished."""
    try:
        plot(history, path)
    except Exception as error:
        return f"none could be made ({type(error).__name__}: {error})"
    return str(path)


def summarize(history: History) -> dict:
    """The held-out `measure` before the first step and at the last validation after it, the steps, and faults.

    The measure is accuracy, the score or the win rate (`held_out_measure`).

    `held_out_faults` has the validations in which answers failed or responses had no score, by step.
    """
    held_out = {step: accuracy for step, metrics in history.items() if (accuracy := held_out_accuracy(metrics))}
    return {
        "measure": held_out_measure(history),
        "before": held_out.pop(0, {}),
        "after": held_out[max(held_out)] if held_out else {},
        "steps": max(history, default=0),
        "held_out_faults": {step: found for step, metrics in history.items() if (found := held_out_faults(metrics))},
    }


def latest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in the Hugging Face format, None when none was saved."""
    newest = checkpoints(folder).get(tracked_step(folder))
    model = newest and newest / "actor" / "huggingface"
    return str(model) if model and any(model.glob("*.safetensors")) else None


def plot(history: History, path: Path) -> None:
    """Draws the held-out measure and its like on training prompts, and the implicit reward margin, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))

    def curve(axes, values: dict[int, float | None], label: str, style: str) -> None:
        values = {step: value for step, value in values.items() if is_finite(value)}
        if values:
            axes.plot(list(values), list(values.values()), style, label=label)

    def metric(name: str) -> dict[int, float | None]:
        return {step: metrics[name] for step, metrics in history.items() if name in metrics}

    held_out = {step: held_out_accuracy(metrics) for step, metrics in history.items()}
    measure = held_out_measure(history)
    if measure != "win rate":  # in training a response meets others to its prompt, and half of them win
        curve(left, metric("score/accuracy") or metric("score/mean"), "training prompts, sampled", "-")
    for kind, style in (("sampled", "o--"), ("greedy", "s--")):
        curve(left, {step: a[kind] for step, a in held_out.items() if kind in a}, f"held-out prompts, {kind}", style)
    left.set(title=measure.capitalize(), xlabel="step")
    curve(right, metric("rewards/margins"), "implicit reward margin", "-")
    curve(right, metric("actor/loss"), "DPO loss", "-")
    right.set(title="Preference pairs", xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_summary(summary: dict, folder: Path, picture: str) -> None:
    """Prints what the run reached and where its files lie; `picture` is the plot's path, or why there is none."""
    lines = [f"SPIN: {summary['steps']} steps in {summary['seconds'] / 60:.1f} minutes"]
    before, after = summary["before"], summary["after"]
    for kind in before | after:
        values = f"{_shown(before, kind)} before, {_shown(after, kind)} after"
        lines.append(f"  held-out {summary['measure']}, {kind + ':':9} {values}")
    lines += _faults_told(summary["held_out_faults"])
    if summary["peak_memory_gb"] is not None:
        lines.append(f"  peak memory of all processes: {summary['peak_memory_gb']} GB")
    lines += [
        f"  checkpoint (from_pretrained): {summary['checkpoint'] or 'none was saved (trainer.save_freq)'}",
        f"  metrics: {folder / 'metrics.jsonl'}",
        f"  plot:    {picture}",
        f"  summary: {folder / 'summary.json'}",
    ]
    if unreadable := summary["unreadable_metrics_lines"]:
        lines.append(f"  {unreadable} lines in {folder / 'metrics'} are no metrics and left out")
    print("\n".join(lines), flush=True)  # noqa: T201 - the report is the run's output


def _faults_told(by_step: dict[int, dict[str, float]]) -> list[str]:
    """A line for each kind of fault that validations had: the worst, and how many had it."""
    lines = []
    for name in HELD_OUT_FAULTS:
        found = {step: faults[name] for step, faults in by_step.items() if name in faults}
        if found:
            worst = max(found, key=found.get)
            others = f", or fewer at {len(found) - 1} other validations" if len(found) > 1 else ""
            lines.append(f"  {in_words({name: found[worst]})} at step {worst}{others}")
    return lines


def _shown(accuracy: dict[str, float | None], kind: str) -> str:
    if kind not in accuracy:
        return "not measured"
    return "not a number" if accuracy[kind] is None else f"{accuracy[kind]:.3f}"
