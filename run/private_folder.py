"""The folder of a run's sockets and logs under the machine's temporary one, and what killed runs left there.

A run holds a lock on a file in its folder. The lock ends with the process, however that ends: a folder whose lock can
be had belongs to nobody, whatever process has the owner's number by now.
"""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from pathlib import Path

PREFIX = "spin-"
OWNER = "owner"  # holds the owner's process id, and the lock
SHARED_MEMORY = "shared_memory"  # lists the files there that only the owner would have removed
SOCKET_PATH_LIMIT = 107  # of the kernel
BELOW = len("/spin-abcdefgh/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


def make() -> tuple[Path, int]:
    """Makes a folder and takes its lock; removes those of runs that were killed.

    Returns the folder and the open file that holds the lock.
    """
    base = base_folder()
    remove_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    unnamed = folder / f"{OWNER}.tmp"
    with contextlib.ExitStack() as if_it_fails:  # as on a full disk; without its owner's file nobody would remove it
        if_it_fails.callback(shutil.rmtree, folder, ignore_errors=True)
        lock = os.open(unnamed, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        if_it_fails.callback(os.close, lock)
        os.write(lock, f"{os.getpid()}\n".encode())
        if_it_fails.pop_all()
    with contextlib.suppress(OSError):  # a file system without locks: nobody will remove the folder of a killed run
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(folder / OWNER)  # other runs see the file with the lock on it
    return folder, lock


def base_folder() -> Path:
    """RAY_TMPDIR or the temporary folder; /tmp in place of one whose path leaves too little room for sockets' names."""
    named = os.environ.get("RAY_TMPDIR", "")
    base = Path(named if os.path.isdir(named) else tempfile.gettempdir())
    if len(str(base)) + BELOW <= SOCKET_PATH_LIMIT:
        return base
    sys.stderr.write(f"[spin] {base} is too long a path for Ray's sockets; /tmp takes its place\n")
    return Path("/tmp")


def note_shared_memory(folder: Path, files: set[str]) -> None:
    """Says which files in shared memory are to be removed with the folder."""
    (folder / SHARED_MEMORY).write_text("".join(f"{file}\n" for file in sorted(files)))


def remove_abandoned(base: Path) -> None:
    """Removes the folders, and the shared memory, of runs whose process is gone."""
    for owner in base.glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError):  # just removed by another run
            if owner.parent.is_symlink() or owner.parent.stat().st_uid != os.getuid():
                continue
            lock = os.open(owner, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(owner.parent)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    listed = folder / SHARED_MEMORY
    for file in listed.read_text().splitlines() if listed.exists() else ():
        if file.startswith("/dev/shm/"):
            Path(file).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
