"""A run that failed, for its user: the cause, the remedy and where to read on."""

import contextlib
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipe.spin.common.settings import ConfigError
from recipe.spin.run_folder import nearest_existing

WHOLE_ERROR = "error.txt"  # among the logs
FULL_BYTES = 10_000_000
MOST_RECORDS = 20  # of failed prompts that a file tells
# What a run's error says when generating or scoring failed; the second is verl's, of a step without any response
HELD_OUT_FAILED = "held-out answers failed"
PROMPTS_FAILED = ("generating or scoring", "no materializable trajectories")
FAILED_PROMPT = "Error in _run_prompt"  # as verl's agent loop logs it
LOG_RECORD = re.compile(r"^[A-Z]+:(?=\d{4}-\d\d-\d\d )", re.MULTILINE)  # by level, before its time
# In the log: a training prompt is called by its step and number, a held-out one by a random id
TRAINING_PROMPT = re.compile(rf"{FAILED_PROMPT} for uid=[0-9]{{8}}-[0-9]{{8}}$", re.MULTILINE)
HELD_OUT_PROMPT = re.compile(
    rf"{FAILED_PROMPT} for uid=[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}$", re.MULTILINE
)
FROM_LAST_CHECKPOINT = "goes on from the last checkpoint"  # what the same command does, given once more


def same_command(mode: str) -> str:
    """In words, where the same command, given once more, begins."""
    auto = f"trainer.resume_mode=auto {FROM_LAST_CHECKPOINT}"
    anew = {"disable": f"begins anew; {auto}", "resume_path": f"begins at trainer.resume_from_path again; {auto}"}
    return anew.get(mode, FROM_LAST_CHECKPOINT)


class RunFailed(RuntimeError):
    """A run that had started and could not go on; the message is for its user."""


class CannotGoOn(RuntimeError):
    """The run could not go on: a process died, or it has not got on for too long. The message says which."""


@contextmanager
def explained(logs: Path, workers_logs: str | None = None, go_on: str = FROM_LAST_CHECKPOINT) -> Iterator[None]:
    """Turns an exception that ends a run into a RunFailed, and writes the whole of it to a file in `logs`.

    The message says where the workers' logs are, by default there too, and what the same command will do.
    To be left before Ray is shut down, whose files hold a cause that reaches nobody else.
    """
    try:
        yield
    except (RunFailed, ConfigError):
        raise
    except Exception as error:
        records = _failed_prompts_of(error)
        lines = [
            cause_of(error, records),
            *_told_elsewhere(error, records),
            *full_disks(logs),
            f"When the cause is removed the same command {go_on}.",
            f"logs: {workers_logs or logs} (the whole error: {logs / WHOLE_ERROR})",
        ]
        try:
            logs.mkdir(parents=True, exist_ok=True)
            (logs / WHOLE_ERROR).write_text(_whole(error, records))
        except OSError as unwritable:
            lines[-1] = f"logs: none, {logs} cannot be written ({unwritable})"
        raise RunFailed("\n".join(lines)) from error


def cause_of(error: Exception, records: list[str]) -> str:
    """The line that says why a run failed, the last words of a process that died below it.

    Of prompts that failed the workers' records tell; else it is the innermost exception.
    """
    import ray

    if isinstance(error, CannotGoOn):
        return str(error)
    if isinstance(error, ray.exceptions.RayError):
        return _last_exception(records[0] if records else str(error))
    return "".join(traceback.format_exception_only(error)).strip()


def _whole(error: Exception, records: list[str]) -> str:
    """An error with its traceback, and what the workers logged of the prompts behind it, a user's reward among it."""
    told = [f"\n{record.strip()}\n" for record in records[:MOST_RECORDS]]
    return "".join([*traceback.format_exception(error), *told])


def ray_logs() -> Path | None:
    """Where the Ray that runs writes the logs of this machine's processes."""
    from ray._private import worker

    return Path(worker._global_node.get_logs_dir_path()) if worker._global_node else None


def job_id() -> str:
    """What Ray calls this run, in the names of its workers' logs too; "*" where Ray does not run."""
    import ray
    from ray._private import worker

    return worker.global_worker.current_job_id.hex() if ray.is_initialized() else "*"


def _failed_prompts_of(error: Exception) -> list[str]:
    """What this machine's workers logged of the prompts that a run's error tells of; the one that counts first.

    verl's agent loop logs the exception of a failed prompt and goes on, so it stands in the workers' logs alone. A
    training prompt that fails ends the run, so the first counts; of held-out ones, of which some may fail
    (`trainer.max_failed_validation`), the last. None of another error.
    """
    logs, held_out = ray_logs(), _tells_of(error, HELD_OUT_FAILED)
    if logs is None or not (held_out or _tells_of(error, *PROMPTS_FAILED)):
        return []
    others = TRAINING_PROMPT if held_out else HELD_OUT_PROMPT
    records = [record for record in _failed_prompts(logs, job_id()) if not others.search(record)]
    return records[::-1] if held_out else records


def _told_elsewhere(error: Exception, records: list[str]) -> list[str]:
    """Where to look for why prompts failed that were answered on another node of a cluster, whose logs are there."""
    # Nodes are asked for last: of other errors Ray's own processes may be the dead ones, and would not answer
    if records or not _tells_of(error, HELD_OUT_FAILED, *PROMPTS_FAILED) or not has_other_nodes():
        return []
    return [f"Why stands in the logs of another node; there: grep -rA 30 '{FAILED_PROMPT}' {ray_logs()}"]


def has_other_nodes() -> bool:
    """Whether the Ray that runs is a cluster of several nodes."""
    import ray

    return ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) > 1


def _tells_of(error: Exception, *words: str) -> bool:
    said = _last_exception(str(error))
    return any(one in said for one in words)


def _failed_prompts(logs: Path, job: str) -> list[str]:
    """What the job's workers on this machine logged of prompts that failed, in the order of time."""
    records: list[str] = []
    for file in logs.glob(f"worker-*-{job}-*"):  # on a joined cluster other jobs' and earlier runs' stand beside them
        records += LOG_RECORD.split(file.read_text(errors="replace"))
    failed = [record for record in records if FAILED_PROMPT in record.partition("\n")[0]]
    return sorted(failed)  # each begins with its time


def _last_exception(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line and not line.startswith((" ", "\t", "During handling"))]
    return re.sub(r"^(\w+\.)+(?=\w+: )", "", lines[-1]) if lines else text  # less the exception's module


def full_disks(run_folder: Path) -> list[str]:
    """A line for each place that the run writes to and that has no room left: torch, for one, does not say so."""
    lines = []
    for place in (nearest_existing(run_folder), tempfile.gettempdir(), "/dev/shm"):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(place).free
            if free < FULL_BYTES:
                lines.append(f"No space is left on the disk of {place} ({free / 1e6:.0f} MB): make room there.")
    return lines
