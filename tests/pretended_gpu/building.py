"""Compiles device.cpp for the torch that is installed, once for each version of either."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

LIBRARY = "PRETENDED_GPU"  # the variable that names the library to a process
HERE = Path(__file__).resolve().parent
SOURCE = HERE / "device.cpp"
LANGUAGE = ["-std=c++20"]  # that torch's headers take


def missing() -> str:
    """Why there can be no pretended GPU here; empty where there can."""
    if torch.backends.cuda.is_built():
        return "this torch is made for real GPUs"
    compiler = shutil.which("c++")
    if compiler is None:
        return "there is no C++ compiler"
    tried = subprocess.run([compiler, *LANGUAGE, "-fsyntax-only", "-x", "c++", "-"], input=b"", capture_output=True)
    return "" if tried.returncode == 0 else f"{compiler} knows no {' '.join(LANGUAGE)}"


def build(folder: Path) -> Path:
    """The library, made where the folder does not hold it yet."""
    from torch.utils import cpp_extension  # with setuptools, for which every test's import would wait

    made_of = torch.__version__.encode() + SOURCE.read_bytes() + Path(__file__).read_bytes()
    key = hashlib.sha256(made_of).hexdigest()[:16]
    library = folder / f"pretended-gpu-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")  # another process may be at it
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        links = [f"-L{path}" for path in cpp_extension.library_paths()]
        options = [*LANGUAGE, "-O1", "-fPIC", "-shared", *includes, *links, "-ltorch_cpu", "-lc10"]
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
