"""Several reward functions as one, their scores summed up by weight: for `reward.custom_reward_function`."""

import asyncio
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from recipe.spin.preferences.reward_error import NoScore, finite_number

OWN_NAMES = ("score", "acc")  # of what is returned, beside the functions' scores by their names


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    functions: Mapping[str, Mapping[str, Any]],
    **kwargs: Any,
) -> dict[str, float]:
    """The weighted sum as `score`, each function's own score under its name, and `acc` of the first that gives one.

    What else a function returns stands under its name too, as `name/key`.

    Args:
        functions: by name `{path: file, name: function (compute_score), weight: number (1)}`; a function is called as
            a reward function of its own would be, asynchronous ones together.

    Raises:
        ValueError: when a function's name is one of the sum's own.
        RuntimeError, TypeError: when a function raises, or gives no number; with its name.
    """
    check_names(functions)
    arguments = dict(
        data_source=data_source, solution_str=solution_str, ground_truth=ground_truth, extra_info=extra_info, **kwargs
    )
    results = await asyncio.gather(*(_call(name, one, arguments) for name, one in functions.items()))
    total, told, accuracies = 0.0, {}, []
    for (name, one), result in zip(functions.items(), results, strict=True):
        parts = dict(result) if isinstance(result, Mapping) else {"score": result}
        told[name] = _score(name, parts.pop("score", None))
        total += one.get("weight", 1.0) * told[name]
        if "acc" in parts:
            accuracies.append(parts.pop("acc"))
        told |= {f"{name}/{key}": value for key, value in parts.items()}
    return {"score": total, **told} | ({"acc": accuracies[0]} if accuracies else {})


def check_names(functions: Mapping[str, Any]) -> None:
    """Raises ValueError when a function's name is one of the sum's own."""
    if taken := [name for name in OWN_NAMES if name in functions]:
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.functions.{taken[0]}: the name is taken by the sum's "
            f"own {' and '.join(OWN_NAMES)}; call the function otherwise"
        )


@cache
def load(path: str, name: str) -> Callable[..., Any]:
    """The function of that name in a Python file."""
    spec = importlib.util.spec_from_file_location(f"reward_{abs(hash(path))}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


async def _call(name: str, one: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
    try:
        function = load(one["path"], one.get("name", "compute_score"))
        if inspect.iscoroutinefunction(function):
            return await function(**arguments)
        return await asyncio.to_thread(function, **arguments)
    except Exception as error:  # a user's function, which may raise what it likes
        raise RuntimeError(f"the reward {name!r} ({one['path']}) failed: {type(error).__name__}: {error}") from error


def _score(name: str, score: Any) -> float:
    try:
        return finite_number(score)
    except NoScore as error:
        raise TypeError(f"the reward {name!r} {error} give a number, or a dict with a number as score") from error
