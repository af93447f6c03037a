"""A copy of the scripts to call, with a stand-in for Python, so that nothing is installed and nothing trains."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Answers for a Python that has verl: notes how main_spin is called, and makes the files that the makers would.
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c "*) exit ${FAKE_HAS_VERL:-0} ;;
    */main_spin.py\\ *)
        shift
        printf '%s\\n' "$@" >"$FAKE_OUT/arguments"
        env >"$FAKE_OUT/environment"
        echo $$ >"$FAKE_OUT/pid"
        exit ${FAKE_EXIT:-0}
        ;;
    *embedded_model.py*) mkdir -p "$3" ;;
    *prepare.py*) [[ -z "${FAKE_PREPARE_FAILS:-}" ]] && mkdir -p "$3" && touch "$3/train.parquet" "$3/test.parquet" ;;
    *) exit 99 ;;
esac
"""
FAKE_NVIDIA_SMI = """#!/bin/bash
for i in 0 1 2 3; do echo "GPU $i: NVIDIA H200 (UUID: GPU-$i)"; done
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@dataclass
class Run:
    """What a call of run_spin.sh did."""

    code: int
    stdout: str
    stderr: str
    overrides: dict[str, str]
    extra: list[str]
    environment: dict[str, str]


@dataclass
class Checkout:
    """A copy of the scripts in a folder with a space and a quote in its name, and the PATH to call them with."""

    root: Path
    bin: Path
    out: Path
    elsewhere: Path
    driver: Path  # what a machine has where an NVIDIA driver is loaded

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.elsewhere),
            "FAKE_OUT": str(self.out),
            "SPIN_DRIVER_FILES": str(self.driver),  # the machine that runs the tests may have GPUs
            **variables,
        }

    def spin(self, *arguments: str, **variables: str) -> Run:
        for file in self.out.iterdir():
            file.unlink()
        result = subprocess.run(
            ["bash", str(self.root / "run_spin.sh"), *arguments],
            cwd=self.elsewhere,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )
        called = (self.out / "arguments").exists()
        passed = (self.out / "arguments").read_text().splitlines() if called else []
        lines = (self.out / "environment").read_text().splitlines() if called else []
        overrides = dict(line.split("=", 1) for line in passed if "=" in line)
        return Run(
            code=result.returncode,
            stdout=result.stdout,
            stderr=result.stderr,
            overrides={key: value.removeprefix("'").removesuffix("'") for key, value in overrides.items()},
            extra=passed,
            environment=dict(line.split("=", 1) for line in lines if "=" in line),
        )

    def function(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in a shell that has sourced scripts/env.sh."""
        return subprocess.run(
            ["bash", "-c", f'set -euo pipefail; source "$0"; {command}', str(self.root / "scripts/env.sh")],
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def add_gpus(self) -> None:
        write_program(self.bin / "nvidia-smi", FAKE_NVIDIA_SMI)

    def data(self, name: str = "mine") -> Path:
        folder = self.elsewhere / name
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.parquet").touch()
        return folder


def copy_checkout(folder: Path) -> Checkout:
    """The scripts' copy in a folder, with stand-ins for all that they would find on the machine."""
    root = folder / "a check'out"
    for name in ("run_spin.sh", "scripts", "examples", "constraints"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            root.mkdir()
            shutil.copy(source, root / name)
    result = Checkout(root, folder / "bin", folder / "out", folder / "elsewhere", folder / "driver")
    result.out.mkdir()
    result.elsewhere.mkdir()
    write_program(result.bin / "python", FAKE_PYTHON)
    # The machine that runs the tests may have GPUs
    write_program(result.bin / "nvidia-smi", "#!/bin/bash\nexit 9\n")
    return result
