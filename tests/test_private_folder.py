"""The folder of a run, and those that killed runs left."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from recipe.spin.run import private_folder

ROOT = Path(__file__).resolve().parent.parent
OWNER = """
import sys
from recipe.spin.run import private_folder
folder, lock = private_folder.make()
private_folder.note_shared_memory(folder, {sys.argv[1]})
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def base(tmp_path_factory, monkeypatch) -> Path:
    base = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short, as Ray's sockets stand below
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(private_folder.tempfile, "tempdir", str(base))
    yield base
    subprocess.run(["rm", "-rf", str(base)], check=True)


def test_a_folder_that_cannot_be_marked_as_owned_is_removed(base, monkeypatch):
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(private_folder.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        private_folder.make()
    assert list(base.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == files


def start(base: Path, shared: Path) -> tuple[subprocess.Popen, Path]:
    """A run in another process, and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(shared)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(base)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, Path(process.stdout.readline().strip())


def test_a_killed_runs_folder_is_removed_and_a_live_runs_is_not(base):
    shared = Path(f"/dev/shm/psm_test{os.getpid()}")
    shared.write_text("")
    process, folder = start(base, shared)
    try:
        assert folder.parent == base
        private_folder.remove_abandoned(base)
        assert (folder / private_folder.OWNER).read_text() == f"{process.pid}\n" and shared.exists()
    finally:
        process.kill()
        process.communicate()
    own, lock = private_folder.make()
    assert not folder.exists() and not shared.exists() and own.is_dir()
    os.close(lock)


def test_folders_without_an_owner_are_left_alone(base):
    (base / "spin-others").mkdir()
    private_folder.remove_abandoned(base)
    assert (base / "spin-others").is_dir()


def test_only_shared_memory_is_removed_with_a_folder(base):
    kept = base / "kept"
    kept.write_text("")
    process, folder = start(base, kept)
    process.kill()
    process.communicate()
    private_folder.remove_abandoned(base)
    assert not folder.exists() and kept.exists()


def test_rays_own_temporary_folder_goes_before_everybodys(base, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(base / "ray"))
    assert private_folder.base_folder() == base  # it is not there
    (base / "ray").mkdir()
    assert private_folder.base_folder() == base / "ray"


def test_a_long_temporary_folder_gives_way(base, monkeypatch, capsys):
    assert private_folder.base_folder() == base
    monkeypatch.setattr(private_folder.tempfile, "tempdir", "/tmp/" + "x" * 40)
    assert private_folder.base_folder() == Path("/tmp") and "too long" in capsys.readouterr().err
