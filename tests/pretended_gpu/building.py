"""Compiles device.cpp for the torch that is installed, once a version of either."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

LIBRARY = "PRETENDED_GPU"  # the variable that names the library to a process
HERE = Path(__file__).resolve().parent
SOURCE = HERE / "device.cpp"


def missing() -> str:
    """Why there can be no pretended GPU here; empty where there can."""
    if torch.backends.cuda.is_built():
        return "this torch is made for real GPUs"
    return "" if shutil.which("c++") else "there is no C++ compiler"


def build(folder: Path) -> Path:
    """The library, made where the folder does not hold it yet."""
    from torch.utils import cpp_extension  # with setuptools, for which every test's import would wait

    key = hashlib.sha256(torch.__version__.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = folder / f"pretended-gpu-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")  # another process may be at it
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        links = [f"-L{path}" for path in cpp_extension.library_paths()]
        options = ["-std=c++20", "-O1", "-fPIC", "-shared", *includes, *links, "-ltorch_cpu", "-lc10"]
        subprocess.run(["c++", str(SOURCE), "-o", str(made), *options], check=True, timeout=600)
        made.rename(library)
    return library


def environment(library: Path) -> dict[str, str]:
    """What a process of the tests is started with that is to have the device: verl's own settings for NVIDIA's."""
    return {
        LIBRARY: str(library),
        "PYTHONPATH": f"{HERE}:{HERE.parent}",
        "VERL_PLATFORM": "nvidia",
        "VERL_USE_EXTERNAL_MODULES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
