"""A run folder is one command's at a time: two would overwrite each other's checkpoints."""

from pathlib import Path

from filelock import FileLock, Timeout

from recipe.spin.common.settings import ConfigError

LOCK = ".lock"

_held: list[FileLock] = []


def hold_run_folder(folder: str | Path) -> None:
    """Makes the run folder and keeps other commands out of it until this process ends, however it ends.

    Raises:
        ConfigError: when another command holds it, or the folder cannot be locked.
    """
    folder = Path(folder).absolute()
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"trainer.default_local_dir={str(folder)!r}: another command is training in this folder; wait for its end, "
            "or give this one a folder of its own (RUN_DIR=... with run_spin.sh)"
        ) from error
    except (OSError, NotImplementedError) as error:  # another user's file, a full disk, a file system without locks
        raise ConfigError(
            f"trainer.default_local_dir={str(folder)!r}: its file {LOCK} cannot be locked ({error}); remove that file "
            "if it is another user's and no command trains there, or name another folder (RUN_DIR=... with run_spin.sh)"
        ) from error
    _held.append(lock)
