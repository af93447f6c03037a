"""What `pip install` takes along, and whether the sources are as ruff has them."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from recipe.spin.tools.doctor import pins

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {"tests", "benchmarks", "recipe", "pythonpath"}  # the last two hold links to the root


def test_an_installation_holds_every_module():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads pyproject.toml")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        file.parent.relative_to(ROOT) for pattern in ("*.py", "*/*.py", "*/*/*.py") for file in ROOT.glob(pattern)
    }
    ours = {folder.parts for folder in folders if not any(part in LEFT_OUT or part[0] == "." for part in folder.parts)}
    names = {".".join(parts if parts[:1] == ("verl_cpu",) else ("recipe", "spin", *parts)) for parts in ours}
    assert names - listed == {"recipe.spin.config"}  # its files are data of recipe.spin


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_finds_nothing(command):
    pytest.importorskip("ruff", reason="pip install ruff")
    pinned = pins((ROOT / "constraints" / "cpu.txt").read_text())["ruff"]
    if version("ruff") != pinned:
        pytest.skip(f"ruff is {version('ruff')}, and others than {pinned} may format otherwise")
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    result = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
