"""The reward: the file with its function, read but not run, and the reward model."""

import ast
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recipe.spin.checks.model_files import check_reward_model
from recipe.spin.common.settings import ConfigError, Settings
from recipe.spin.losses import is_number
from recipe.spin.preferences.weighted import check_names

KEY = "reward.custom_reward_function"
# What verl calls the reward with, by keyword
ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
OF_A_MODEL = ("reward_router_address", "reward_model_tokenizer")  # besides, where it serves a reward model
WEIGHTED = Path(__file__).resolve().parent.parent / "preferences" / "weighted.py"
PARTS = f"{KEY}.reward_kwargs.functions"
PART_KEYS = ("path", "name", "weight")
PART = "{path: FILE, name: FUNCTION (compute_score), weight: NUMBER (1)}"


def check_reward(settings: Settings) -> None:
    """The file must define a function that can be called as verl does, and import what is there."""
    settings.run(check_reward_model)
    path, arguments = settings[f"{KEY}.path"], dict(settings[f"{KEY}.reward_kwargs"] or {})
    if path is None:
        return
    if settings["reward.reward_model.enable"]:
        arguments |= dict.fromkeys(OF_A_MODEL)
    parts = _parts(arguments) if Path(path).resolve() == WEIGHTED else {}
    _check_function(settings, KEY, path, settings[f"{KEY}.name"], arguments)
    more = {name: value for name, value in arguments.items() if name != "functions"}
    settings.run(*(partial(_check_part, key=f"{PARTS}.{name}", part=part, more=more) for name, part in parts.items()))


def reward_files(reward: DictConfig) -> list[str]:
    """The files of a reward function that check_reward has found in order; none where verl's own scores."""
    if reward.path is None:
        return []
    weighs = Path(reward.path).resolve() == WEIGHTED
    return [reward.path, *(part.path for part in reward.reward_kwargs.functions.values())] if weighs else [reward.path]


def _parts(arguments: dict) -> dict[str, Any]:
    """The functions that preferences/weighted.py adds up, by name."""
    parts = arguments.get("functions")
    if not isinstance(parts, dict) or not parts:
        raise ConfigError(f"{PARTS}={parts!r}: preferences/weighted.py adds up functions by name; give each as {PART}")
    try:
        check_names(parts)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return parts


def _check_part(settings: Settings, key: str, part: Any, more: dict) -> None:
    texts = [part.get("path"), part.get("name", "compute_score")] if isinstance(part, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not part.keys() <= {*PART_KEYS}:
        raise ConfigError(f"{key}={part!r}: must be {PART}")
    if not is_number(part.get("weight", 1.0)):
        raise ConfigError(f"{key}.weight={part['weight']!r}: must be a finite number")
    _check_function(settings, key, *texts, more)


def _check_function(settings: Settings, key: str, path: str, name: str, more: dict) -> None:
    """The file and name of a reward function, which is called with `more` besides what verl gives every one."""
    settings[f"{key}.path"]  # leaves, where it has a fault
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{key}.path={path!r}: there is no such file; name a Python file with the reward")
    try:
        module = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError) as error:
        raise ConfigError(f"{key}.path={path!r}: {error}; correct the file") from error
    settings.run(partial(_check_imports, key=f"{key}.path", module=module))
    definitions = dict(_definitions(module.body))
    if name not in definitions:
        if "*" in definitions:
            return  # a star import may bring it
        names = ", ".join(definitions) or "no function"
        raise ConfigError(f"{key}.name={name!r}: {file} defines {names}; name one")
    if fault := _call_fault(definitions[name], more):
        own = f", or set {KEY}.path=null for the reward model's own score" if {*OF_A_MODEL} <= more.keys() else ""
        raise ConfigError(f"{key}.name={name!r}: in {file} {name} {fault}{own}")


def _check_imports(settings: Settings, key: str, module: ast.Module) -> None:
    """Imports at the top of the file, which fail as soon as it is loaded; one in a `try` may."""
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            settings.require(
                False,
                key,
                f"line {node.lineno}: the file is loaded by its path, outside of a package; import by a full name",
            )
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for package in sorted({name.split(".")[0] for name in names}):
                settings.require(
                    find_spec(package) is not None,
                    key,
                    f"line {node.lineno} imports {package}, which is not installed; install it, or add its folder to "
                    "PYTHONPATH",
                )


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST | None]]:
    """The names that statements define, import or assign, each with its function or value where that is known."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, None) for alias in node.names)
        elif isinstance(node, ast.Assign):
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            yield from ((name, node.value if len(names) == 1 else None) for name in names)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):  # of if, try, with, for, match
            yield from _definitions(getattr(node, block, []))


def _call_fault(definition: ast.AST | None, more: dict) -> str | None:
    """Why verl cannot call what a name stands for; None where it can, or where that cannot be known."""
    if isinstance(definition, ast.Constant | ast.List | ast.Dict | ast.Set | ast.Tuple | ast.JoinedStr):
        return f"is {ast.unparse(definition)[:60]} and no function; write compute_score({', '.join(ARGUMENTS)})"
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return None
    arguments = definition.args
    positional = arguments.posonlyargs + arguments.args
    required = [one.arg for one in positional[: len(positional) - len(arguments.defaults)]]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required += [one.arg for one, default in pairs if default is None]
    given = (*ARGUMENTS, *more)
    asked = [name for name in required if name not in given]
    by_position = [one.arg for one in arguments.posonlyargs]
    named = {one.arg for one in arguments.args + arguments.kwonlyargs}
    refused = [] if arguments.kwarg else [name for name in given if name not in named]
    if not asked and not refused and not set(required) & set(by_position):
        return None
    return (
        f"takes ({ast.unparse(arguments)}), and verl calls it with {', '.join(given)} by name; give it these arguments"
    )
