"""What a run leaves for its user: metrics.jsonl, summary.json, a plot, and a few lines on the console."""

import json
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

PLOT = "learning_curve.png"


def write(config: DictConfig, seconds: float, peak_memory_gb: float) -> dict:
    """Writes the report of a finished run into its folder, prints it and returns the summary.

    `seconds` and `peak_memory_gb` are those of this process; a resumed run adds up the seconds of its parts.
    """
    folder = Path(config.trainer.default_local_dir)
    history = read_history(folder / "metrics")
    with open(folder / "metrics.jsonl", "w") as file:
        for step, metrics in history.items():
            file.write(json.dumps({"step": step, **metrics}) + "\n")
    summary = summarize(history) | {
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(peak_memory_gb, 2),
        "checkpoint": latest_checkpoint(folder),
    }
    if find_spec("matplotlib"):  # verl does not bring it
        plot(history, folder / PLOT)
    # Last and at once: the summary marks a finished run
    unfinished = folder / "summary.json.tmp"
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    unfinished.rename(folder / "summary.json")
    print_summary(summary, folder)
    return summary


def read_history(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics by step from the files that the run's parts wrote; what a resumed part repeated counts once."""
    history: dict[int, dict[str, float]] = {}
    for file in sorted(folder.glob("from_step_*.jsonl")):
        start = int(file.stem.removeprefix("from_step_"))
        history = {step: metrics for step, metrics in history.items() if step <= start}
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            history.setdefault(entry["step"], {}).update(entry["data"])
    return dict(sorted(history.items()))


def held_out_accuracy(metrics: dict[str, float]) -> dict[str, float]:
    """Greedy and sampled accuracy (the reward where there is none) of one step, averaged over data sources."""
    found = {}
    for name, prefix in (("greedy", "val-greedy-core/"), ("sampled", "val-core/")):
        values = [value for key, value in metrics.items() if key.startswith(prefix) and "/mean@" in key]
        if values:
            found[name] = sum(values) / len(values)
    return found


def summarize(history: dict[int, dict[str, float]]) -> dict:
    """Held-out accuracy at the first and the last validation, and the number of steps."""
    held_out = [accuracy for metrics in history.values() if (accuracy := held_out_accuracy(metrics))]
    return {
        "before": held_out[0] if held_out else {},
        "after": held_out[-1] if len(held_out) > 1 else {},
        "steps": max(history, default=0),
    }


def latest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in the Hugging Face format, None when none was saved."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return None
    model = folder / f"global_step_{tracker.read_text().strip()}" / "actor" / "huggingface"
    return str(model) if any(model.glob("*.safetensors")) else None


def plot(history: dict[int, dict[str, float]], path: Path) -> None:
    """Draws the accuracy on training and held-out prompts, and the implicit reward margin, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))

    def curve(axes, values: dict[int, float], label: str, style: str) -> None:
        if values:
            axes.plot(list(values), list(values.values()), style, label=label)

    def metric(name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in history.items() if name in metrics}

    held_out = {step: held_out_accuracy(metrics) for step, metrics in history.items()}
    training = metric("score/accuracy") or metric("score/mean")
    curve(left, training, "training prompts, sampled", "-")
    for kind, style in (("sampled", "o--"), ("greedy", "s--")):
        curve(left, {step: a[kind] for step, a in held_out.items() if kind in a}, f"held-out prompts, {kind}", style)
    left.set(title="Accuracy", xlabel="step")
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


def first_cause(error: str, logs: Path) -> str:
    """The one line that says why a run failed: the innermost exception, or what made prompts fail in the agent loop.

    verl's agent loop logs the exception of a failed prompt and goes on, so it stands in the workers' logs alone.
    """
    for file in sorted(logs.glob("worker-*")):
        _, found, block = file.read_text(errors="replace").partition("Error in _run_prompt")
        if found:
            return _last_exception(block.split("ERROR:")[0])
    return _last_exception(error)


def _last_exception(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line and not line.startswith((" ", "\t", "During handling"))]
    return lines[-1] if lines else text


def print_summary(summary: dict, folder: Path) -> None:
    """Prints what the run reached and where its files lie."""
    lines = [f"SPIN: {summary['steps']} steps in {summary['seconds'] / 60:.1f} minutes"]
    for kind in summary["before"]:
        before, after = summary["before"][kind], summary["after"].get(kind, float("nan"))
        lines.append(f"  held-out accuracy, {kind + ':':9} {before:.3f} before, {after:.3f} after")
    lines += [
        f"  peak memory of all processes: {summary['peak_memory_gb']} GB",
        f"  checkpoint (from_pretrained): {summary['checkpoint'] or 'none was saved (trainer.save_freq)'}",
        f"  metrics: {folder / 'metrics.jsonl'}",
        f"  plot:    {folder / PLOT if (folder / PLOT).exists() else 'none was drawn; pip install matplotlib'}",
        f"  summary: {folder / 'summary.json'}",
    ]
    print("\n".join(lines), flush=True)  # noqa: T201 - the report is the run's output
