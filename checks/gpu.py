"""What a run needs of GPUs besides their memory: kernels, a driver that torch can use, and a compiler for Triton."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from recipe.spin.checks.finding import FAIL, OK, WARN, Finding

# The oldest driver for the CUDA that torch was built with, by its major version (NVIDIA's CUDA compatibility guide)
DRIVERS = {11: 450, 12: 525, 13: 580}
OLDEST_CAPABILITY = 8.0  # Ampere: vLLM's bf16 and flash attention
FLASHINFER_CAPABILITY = "10."  # Blackwell's for data centres
TOOLKIT = "/usr/local/cuda"
ATTENTION_BACKEND = "actor_rollout_ref.rollout.engine_kwargs.vllm.attention_backend"
NUMBER = re.compile(r"\d+\.\d+")
SECONDS = 60  # for nvidia-smi; without its persistence daemon it initializes every GPU first


@dataclass(frozen=True)
class Device:
    """A GPU that the run may use; bytes."""

    name: str
    driver: str
    total: float
    free: float


def ask(*fields: str, hidden: bool = False) -> list[list[str]] | None:
    """What nvidia-smi tells of the visible GPUs, or the hidden ones too, a row each: CUDA itself would take memory.

    [] where there is no nvidia-smi, or it knows no such fields; None where it takes too long.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) and not hidden:
        command += ["-i", visible]
    if shutil.which(command[0]) is None:
        return []
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None
    rows = [line.split(", ") for line in answer.stdout.splitlines()]
    return rows if answer.returncode == 0 and all(len(row) == len(fields) for row in rows) else []


def devices() -> list[Device] | None:
    """The visible GPUs; [] where nvidia-smi does not tell of their memory, None where it takes too long."""
    rows = ask("name", "driver_version", "memory.total", "memory.free")
    if rows is None:
        return None
    if not all(row[2].isdigit() for row in rows):
        return []  # a slice of a GPU (MIG), for one
    return [Device(name, driver, int(total) * 2**20, int(free) * 2**20) for name, driver, total, free in rows]


def check_devices(config: DictConfig, found: list[Device] | None) -> Finding:
    """Whether the GPUs have the kernels that a run takes; `found` is the answer of `devices`."""
    rows = None if found is None else ask("name", "compute_cap")
    if rows is None:
        text = (
            f"nvidia-smi gave no answer within {SECONDS} s, and the GPUs were not checked; if it hangs, CUDA may hang "
            "too: look for the driver's words in dmesg, or start the machine anew"
        )
        return Finding("GPUs", WARN, text)
    mine = rows[: config.trainer.n_gpus_per_node]  # Ray hands them out in order
    for name, capability in mine:
        if NUMBER.fullmatch(capability) and float(capability) < OLDEST_CAPABILITY:
            text = (
                f"the {name} has compute capability {capability}, and a run needs {OLDEST_CAPABILITY} (Ampere) or "
                "newer, for vLLM's bf16 and flash attention; use such GPUs (CUDA_VISIBLE_DEVICES chooses among "
                "several), or SPIN_PROFILE=cpu for a small model"
            )
            return Finding("GPUs", FAIL, text, {"GPUs": mine})
    if kinds := _numbered_otherwise(config.trainer.n_gpus_per_node):
        text = (
            f"this machine has different GPUs ({', '.join(kinds)}), of which CUDA numbers the fastest first, and "
            "nvidia-smi, by which they are checked, goes by their slots: the run may take others than those that were "
            "checked; export CUDA_DEVICE_ORDER=PCI_BUS_ID, so that both count alike"
        )
        return Finding("GPUs", WARN, text, {"GPUs": mine})
    told = ", ".join(f"{name} (compute capability {capability})" for name, capability in mine)
    return Finding("GPUs", OK, told or "nvidia-smi does not tell their compute capability", {"GPUs": mine})


def _numbered_otherwise(count: int) -> list[str]:
    """The kinds of GPUs of the machine where so many of them may be others for CUDA than for nvidia-smi, else []."""
    named = not re.fullmatch(r"[\d,\s]*", os.environ.get("CUDA_VISIBLE_DEVICES", ""))  # GPU-..., the same for both
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or named:
        return []
    names = [name for (name,) in ask("name", hidden=True) or []]
    kinds = sorted(set(names))
    return kinds if count < len(names) and len(kinds) > 1 else []


def check_system() -> Finding:
    """Whether processes can hand each other a GPU's memory, by which weights go to vLLM."""
    system = platform.release()
    if "microsoft" in system.lower():
        # https://github.com/sgl-project/sglang/issues/35385; NVIDIA's guides to WSL have said both
        text = (
            f"this is Linux within Windows (WSL2, kernel {system}), where CUDA IPC is reported not to work: weights "
            "go to vLLM by it, and the first that are sent would end the run, or keep it waiting; then use Linux itself"
        )
        return Finding("system", WARN, text)
    return Finding("system", OK, f"Linux {system}")


def check_driver(found: list[Device] | None) -> Finding:
    """Whether torch can use the GPUs, and if not, whether the driver is why; `found` is the answer of `devices`."""
    built = torch.version.cuda
    driver = next((device.driver for device in found or ()), None)
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
    text = f"torch for CUDA {built} can use no GPU here (driver {driver or 'not found'}{_cause()})"
    remedy = "`nvidia-smi` and CUDA_VISIBLE_DEVICES say which there are"
    if found:
        remedy += "; a machine with NVSwitch needs nvidia-fabricmanager of the driver's version to run"
    return Finding("driver", FAIL, f"{text}; {remedy}", figures)


def _cause() -> str:
    """What CUDA says to it."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        return f": {str(error).splitlines()[0]}"
    return ""


def check_toolkit(config: DictConfig, found: list[Device] | None) -> Finding:
    """Whether vLLM finds CUDA's own compiler where it compiles its attention; `found` is the answer of `devices`.

    vLLM 0.24 takes FlashInfer's first on capability 10, which is compiled as vLLM starts, and FlashInfer 0.6 looks for
    nvcc in these places alone. Read in their source; tried on no such GPU.
    """
    rows = None if found is None else ask("name", "compute_cap")
    fresh = [row for row in (rows or [])[: config.trainer.n_gpus_per_node] if row[1].startswith(FLASHINFER_CAPABILITY)]
    if not fresh or OmegaConf.select(config, ATTENTION_BACKEND):
        return Finding("CUDA toolkit", OK, "not needed")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin" / "nvcc" for home in (*homes, TOOLKIT) if home]
    if nvcc := shutil.which("nvcc") or next((str(place) for place in places if place.is_file()), None):
        return Finding("CUDA toolkit", OK, nvcc)
    name, capability = fresh[0]
    text = (
        f"on the {name} (compute capability {capability}) vLLM takes an attention that it compiles as it starts, and "
        f"there is no nvcc (CUDA_HOME, CUDA_PATH, PATH, {TOOLKIT}): install CUDA's toolkit, or add "
        f"+{ATTENTION_BACKEND}=FLASH_ATTN"
    )
    return Finding("CUDA toolkit", WARN, text)


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
