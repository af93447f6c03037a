"""What `pip install` takes along."""

from pathlib import Path

import pytest

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
