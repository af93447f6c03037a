"""What a run needs of GPUs besides their memory: a driver that torch can use, and a compiler for Triton."""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from recipe.spin.run.finding import FAIL, OK, Finding

# The oldest driver for the CUDA that torch was built with, by its major version (NVIDIA's CUDA compatibility guide)
DRIVERS = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Device:
    """A GPU that the run may use; bytes."""

    name: str
    driver: str
    total: float
    free: float


def devices() -> list[Device]:
    """The visible GPUs, by nvidia-smi: CUDA itself would take memory of theirs. None where it has no answer."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free"]
    command += ["--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    if shutil.which(command[0]) is None:
        return []
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    rows = [line.split(", ") for line in answer.stdout.splitlines()]
    if answer.returncode != 0 or any(len(row) != 4 or not row[2].isdigit() for row in rows):
        return []  # a slice of a GPU (MIG), for one
    return [Device(name, driver, int(total) * 2**20, int(free) * 2**20) for name, driver, total, free in rows]


def check_driver() -> Finding:
    """Whether torch can use the GPUs, and if not, whether the driver is why."""
    built = torch.version.cuda
    driver = next((device.driver for device in devices()), None)
    figures = {"cuda": built, "driver": driver}
    if torch.cuda.is_available():
        return Finding("driver", OK, f"driver {driver or 'unknown'}, torch built for CUDA {built}", figures)
    if built is None:
        text = f"torch {torch.__version__} was built without CUDA; install the GPU profile (SPIN_PROFILE=gpu)"
        return Finding("driver", FAIL, text, figures)
    oldest = DRIVERS.get(int(built.split(".")[0]))
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        text = f"the NVIDIA driver is {driver}, and torch for CUDA {built} needs {oldest} or newer; install that driver"
        return Finding("driver", FAIL, text, figures)
    text = f"torch for CUDA {built} can use no GPU here (driver {driver or 'not found'})"
    return Finding("driver", FAIL, f"{text}; `nvidia-smi` and CUDA_VISIBLE_DEVICES say which there are", figures)


def check_compiler() -> Finding:
    """Triton compiles a small C program for every machine, against Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    missing = [] if compiler else ["a C compiler (gcc)"]
    missing += [] if headers.is_file() else [f"Python's headers ({headers})"]
    if missing:
        text = f"Triton needs {' and '.join(missing)}; install them (Debian, Ubuntu: apt-get install gcc {python}-dev)"
        return Finding("compiler", FAIL, text)
    return Finding("compiler", OK, f"{compiler}, {headers}")


def has_flash_attention_2() -> bool:
    """Whether flash-attn 2 is installed; version 4 has the same module's name and other functions."""
    try:
        return bool(find_spec("flash_attn")) and version("flash-attn").split(".")[0] == "2"
    except PackageNotFoundError:  # flash-attn-4
        return False
