"""What is patched of other modules stands in two files, each patch with its reason: nobody looks for it elsewhere."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {"verl_patches.py", "verl_cpu/patches.py"}
LEFT_OUT = {"tests", "recipe", "pythonpath"}  # tests put back what they patch; the others hold links to the root


def leaves(target: ast.expr) -> Iterator[ast.expr]:
    """What is assigned to by itself, out of tuples and lists."""
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from leaves(part)
    else:
        yield target


def base(node: ast.expr) -> str | None:
    """The name `a` of `a.b.c`; None for what is called or looked up on the way."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def bindings(tree: ast.Module) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Names or attributes and what they become: by assignments, and by loops over what is listed there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                yield from zip(target.elts, node.value.elts, strict=False) if several else [(target, node.value)]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
            yield from ((node.target, one) for one in node.iter.elts)


def names_of_others(tree: ast.Module) -> set[str]:
    """Names of other modules and of what is theirs: imported, or taken from these by an attribute."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    known = 0
    while len(found) > known:  # names of names
        known = len(found)
        for target, value in bindings(tree):
            imports = isinstance(value, ast.Call) and ast.unparse(value.func).endswith("import_module")
            if isinstance(target, ast.Name) and (imports or base(value) in found):
                found.add(target.id)
    return found


def patches(file: Path) -> list[str]:
    """The statements of a file that change an attribute of another module, or of a class of its."""
    tree = ast.parse(file.read_text())
    foreign, found = names_of_others(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.Delete):
            changed = [one for target in node.targets for one in leaves(target)]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            changed = [node.target]
        elif isinstance(node, ast.Call) and base(node.func) in ("setattr", "delattr"):
            changed = [ast.Attribute(node.args[0], "any")]
        else:
            continue
        if any(isinstance(one, ast.Attribute) and base(one) in foreign for one in changed):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def modules() -> list[str]:
    files = [file.relative_to(ROOT) for pattern in ("*.py", "*/*.py", "*/*/*.py") for file in ROOT.glob(pattern)]
    return sorted(str(file) for file in files if file.parts[0] not in LEFT_OUT and file.parts[0][0] != ".")


def test_nothing_is_patched_elsewhere():
    assert set(modules()) > FILES
    found = {name: more for name in modules() if name not in FILES and (more := patches(ROOT / name))}
    assert found == {}, "a hook of the library's is better; without one the patch belongs into verl_patches.py"


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_patch_has_its_reason(name):
    assert patches(ROOT / name)
    functions = [node for node in ast.parse((ROOT / name).read_text()).body if isinstance(node, ast.FunctionDef)]
    takes_module = [node for node in functions if [argument.arg for argument in node.args.args] == ["module"]]
    public = [node for node in functions if not node.name.startswith("_")]
    assert [node.name for node in (*takes_module, *public) if not ast.get_docstring(node)] == []


PATCHES = """
trainer_base.Tracking = None
engine.part.table = {}
Base.run, found = None, 1
late = importlib.import_module("ray"); late.init = None
other = trainer_base.Trainer.step; del other.method
setattr(json, "dumps", None)
for side in (Base, found): side.send = None
Base.count += 1
verl.workers.limit: int = 3
"""
OTHERS = """
self.step = trainer_base.step
config.trainer.logger = []
engine.TABLE["mine"] = Base
Base(config).step = None
found = Base(); found.step = None
def step(json_file): json_file.name = "any"
"""


def test_a_patch_is_seen_in_whatever_form_it_has(tmp_path):
    imports = "import importlib, json, verl.workers\nimport verl.engine as engine\ndef late():\n"
    imports += "    from verl.trainer import trainer_base\n    from verl.workers import Worker as Base\n"
    (tmp_path / "patching.py").write_text(imports + PATCHES)
    assert len(patches(tmp_path / "patching.py")) == len(PATCHES.strip().splitlines())
    (tmp_path / "other.py").write_text(imports + OTHERS)
    assert patches(tmp_path / "other.py") == []
