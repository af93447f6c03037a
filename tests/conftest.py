import os
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkable_run import Run, hub_without_network
from fake_checkout import Checkout, copy_checkout
from whole_runs import write_task
from worker_harness import ROOT, ranks_by_number

from benchmarks.tiny_models import ARCHITECTURES, save_tiny_model
from recipe.spin.checks import model_files
from recipe.spin.run import cluster

os.environ.setdefault(cluster.LOG_LEVEL, "WARNING")  # as a run's processes have it


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, str]:
    """Folders of the tiny models by architecture."""
    folder = tmp_path_factory.mktemp("tiny_models")
    return {name: str(save_tiny_model(folder / name, name)) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny_llama(tiny_models) -> Path:
    return Path(tiny_models["llama"])


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Path:
    """What whole runs train on, and their reward."""
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny products are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """The hub cannot be asked for names that it has."""
    monkeypatch.setattr(huggingface_hub, "model_info", hub_without_network)
    model_files._is_on_hub.cache_clear()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes that a process of its own sees in a namespace of its own, as no root is needed.

    Returns the command that starts others there, the folder as they see it, and as this process does.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=8m tmpfs {folder} && echo mounted && exec cat"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if holder.stdout.readline() != "mounted\n":
        pytest.skip("this machine lets nobody mount a file system")
    within = ("nsenter", "--user", "--mount", "--preserve-credentials", f"--target={holder.pid}", f"--wd={ROOT}")
    yield within, folder, Path(f"/proc/{holder.pid}/root{folder}")
    holder.communicate()


@pytest.fixture
def run(tmp_path, tiny_models) -> Run:
    """A run that could start."""
    return Run(tmp_path, tiny_models["llama"])


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    """The scripts in a folder of their own, with a stand-in for Python."""
    return copy_checkout(tmp_path)


@pytest.fixture(scope="session")
def ranks():
    """Processes for the real worker by their number."""
    with ranks_by_number() as worlds:
        yield worlds
