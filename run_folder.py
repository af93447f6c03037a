"""The folder of a run: its checkpoints and its metrics by step, of which a stopped run's next part goes on."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"  # verl writes it last: the step of the newest complete checkpoint
CHECKPOINT = re.compile(r"global_step_(0|[1-9][0-9]*)")
ANSWERS = re.compile(r"step_([0-9]{8})\.jsonl")
UNREADABLE = "judge_unreadable.jsonl"  # answers of judges
FAILURE = "failure"  # of the latest start, if it failed: the whole error, and the workers' logs
METRICS = re.compile(r"from_step_([0-9]{8})(?:-([0-9]+))?\.jsonl")


def nearest_existing(folder: Path) -> Path:
    """The folder, or while it is not there the first above it that is; a link that leads nowhere counts as there."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def write_whole(file: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, whenever the process may be killed."""
    unfinished = file.with_name(f"{file.name}.tmp")
    try:
        unfinished.write_text(text)
        unfinished.rename(file)
    except OSError:  # a full disk, which what was written of it would keep full
        unfinished.unlink(missing_ok=True)
        raise


def checkpoints(folder: Path) -> dict[int, Path]:
    """The folders that verl names as checkpoints, complete or not, by step."""
    return _by_step(filter(Path.is_dir, folder.glob("global_step_*")), CHECKPOINT)


def _by_step(paths: Iterable[Path], name: re.Pattern[str]) -> dict[int, Path]:
    """Those of the paths whose names tell a step, in its order. Other names are the user's."""
    found = {int(match[1]): path for path in paths if (match := name.fullmatch(path.name))}
    return dict(sorted(found.items()))


def is_complete(checkpoint: Path) -> bool:
    """Whether a save came to its end; the place in the data is written after the models."""
    return (checkpoint / "data.pt").exists()


def tracked_step(folder: Path) -> int | None:
    """The step that the tracker names; None without one, or where a kill cut it off or a hand changed it."""
    tracker = folder / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.exists() else ""
    return int(text) if re.fullmatch("[0-9]+", text) else None


def prune(folder: Path, step: int, keep: int | None) -> None:
    """Removes all but the newest `keep` checkpoints up to `step`; none where keep is None or below 1.

    The one that the tracker names stays in any case, and so do links and those above `step`, which are not this run's.
    """
    if keep is None or keep < 1:
        return
    tracked = tracked_step(folder)
    past = {number: path for number, path in checkpoints(folder).items() if number <= step}
    for number in sorted(past)[:-keep]:
        if number != tracked and not past[number].is_symlink():
            shutil.rmtree(past[number])


def metrics_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The metrics that the run's parts wrote, by the step they began at and their number of those that began there."""
    found = {}
    for path in (folder / "metrics").glob("from_step_*.jsonl"):
        name = METRICS.fullmatch(path.name)
        if name:
            found[int(name[1]), int(name[2] or 1)] = path
    return dict(sorted(found.items()))


def next_metrics_file(folder: Path, step: int) -> Path:
    """A file that is not there yet for the metrics of a part that begins at `step`; verl would empty one that is."""
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    number = 1 + max((number for start, number in metrics_files(folder) if start == step), default=0)
    return folder / "metrics" / (f"from_step_{step:08d}" + (f"-{number}" if number > 1 else "") + ".jsonl")


def answers_files(folder: Path) -> dict[int, Path]:
    """The held-out answers that were kept, by the step after which they were given."""
    return _by_step((folder / "held_out").glob("step_*.jsonl"), ANSWERS)


def keep_answers(folder: Path, step: int, answers: list[tuple[list[dict], str]]) -> None:
    """Keeps the answers to held-out prompts, each a list of messages, that were given after `step`."""
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in answers]
    (folder / "held_out").mkdir(parents=True, exist_ok=True)
    write_whole(folder / "held_out" / f"step_{step:08d}.jsonl", "".join(f"{line}\n" for line in lines))


def copy_answers(origin: Path, folder: Path, step: int) -> None:
    """Brings the held-out answers of the run in `origin` up to a step along, for one that goes on elsewhere."""
    for given, file in answers_files(origin).items():
        if given <= step:
            (folder / "held_out").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / "held_out" / file.name)


def first_answers(folder: Path) -> list[tuple[list[dict], str]] | None:
    """The prompts and answers that later ones are compared with: of the first validation that had such prompts.

    The newest that were kept, as new ones are only where no prompt was among the earlier ones; None where none were.
    """
    files = list(answers_files(folder).values())
    if not files:
        return None
    rows = map(json.loads, files[-1].read_text().splitlines())
    return [(row["prompt"], row["answer"]) for row in rows]


def keep_unreadable(folder: Path, answer: dict) -> None:
    """Adds an answer of a judge that could not be read to the run's, as a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / UNREADABLE, "a") as file:
        file.write(f"{json.dumps(answer)}\n")


def read_history(folder: Path) -> tuple[dict[int, dict[str, float | None]], int]:
    """Metrics by step from the files that the run's parts wrote, and the number of lines that are no metrics.

    What a resumed part repeated counts once. A kill leaves a line that is cut off; a metric that is no number is None.
    """
    history: dict[int, dict[str, float | None]] = {}
    unreadable = 0
    for (start, _), file in metrics_files(folder).items():
        history = {step: metrics for step, metrics in history.items() if step <= start}
        for line in file.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                step, metrics = int(entry["step"]), dict(entry["data"])
            except (ValueError, TypeError, KeyError, OverflowError):
                unreadable += 1
                continue
            history.setdefault(step, {}).update(metrics)
    return dict(sorted(history.items())), unreadable
