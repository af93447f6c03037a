"""Imports run one way: what stands on what, from the entry point down to functions of tensors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "recipe.spin."
# Each folder or module with what it may import of the recipe beside itself, inside functions too
MAY_IMPORT = {
    "common": set(),
    "losses": set(),
    "core_algos": {"losses"},
    "run_folder": set(),
    "verl_patches": {"common"},
    "engine": {"core_algos"},
    "preferences": {"common", "core_algos", "engine", "run_folder"},
    "rollout": {"common", "core_algos", "engine", "preferences", "run_folder", "verl_patches"},
    "dp_actor": {"core_algos", "engine"},
    "dpo_update": {"core_algos", "dp_actor", "engine"},
    "fsdp_workers": {"dp_actor", "rollout", "verl_patches"},
    "spin_trainer": {
        "core_algos", "dpo_update", "engine", "fsdp_workers", "preferences", "rollout", "run_folder", "verl_patches",
    },
    "async_trainer": {"rollout", "spin_trainer"},
    "checks": {"common", "core_algos", "engine", "losses", "preferences", "run_folder"},
    "run": {"checks", "common", "rollout", "run_folder", "verl_patches"},
}  # fmt: skip


def imported(file: Path) -> set[str]:
    """The recipe's folders and modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            of_the_package = f"{node.module}." == PACKAGE
            names = [f"{PACKAGE}{alias.name}" for alias in node.names] if of_the_package else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix(PACKAGE).split(".")[0] for name in names if name.startswith(PACKAGE)}
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    files = sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]
    found = {file.name: more for file in files if (more := imported(file) - MAY_IMPORT[room] - {room})}
    assert found == {}


def test_nothing_but_tests_and_benchmarks_stands_on_an_example():
    free = {"benchmarks", "examples", "tests", "recipe", "pythonpath"}  # the last two hold links to the root
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    files = [file for file in files if file.relative_to(ROOT).parts[0] not in free]
    assert len(files) > 50 and [str(file) for file in files if "examples" in imported(file)] == []


def test_an_import_is_seen_wherever_it_stands(tmp_path):
    (tmp_path / "a.py").write_text(
        "import recipe.spin.checks.check\nfrom recipe.spin import verl_patches\n"
        "def late():\n    from recipe.spin.tools.doctor import main\n    import torch, json\n"
    )
    assert imported(tmp_path / "a.py") == {"checks", "verl_patches", "tools"}
