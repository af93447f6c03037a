"""Several reward functions with weights."""

import asyncio
import re
from pathlib import Path

import pytest
from worker_harness import compose

from recipe.spin.preferences.weighted import compute_score

REWARDS = """
import asyncio
import numpy as np

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = float(solution_str == ground_truth)
    return {"score": right, "acc": right}

async def compute_brevity(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    await asyncio.sleep(0)
    return -len(solution_str)

def compute_single(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"score": np.float32(0.5)}

def compute_more(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"score": 1.0, "acc": 0.0, "format": 0.5}

def compute_nothing(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"acc": 1.0}

def compute_failure(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    raise LookupError("no such answer")

def compute_nan(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float("nan")

def compute_none(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return None
"""


@pytest.fixture
def path(tmp_path) -> str:
    (tmp_path / "rewards.py").write_text(REWARDS)
    return str(tmp_path / "rewards.py")


def score(**functions) -> dict[str, float]:
    return asyncio.run(compute_score("sums", "seven", "seven", {"index": 0}, functions=functions))


def test_scores_add_up_by_weight_and_are_kept_by_name(path):
    found = score(right={"path": path, "weight": 2.0}, brief={"path": path, "name": "compute_brevity", "weight": 0.1})
    assert found == {"score": pytest.approx(2 - 0.5), "right": 1.0, "brief": -5.0, "acc": 1.0}


def test_without_an_accuracy_there_is_none(path):
    assert score(brief={"path": path, "name": "compute_brevity"}) == {"score": -5.0, "brief": -5.0}


def test_numbers_of_numpy_are_scores(path):
    found = score(half={"path": path, "name": "compute_single", "weight": 2.0})
    assert found == {"score": 1.0, "half": 0.5} and type(found["half"]) is float


def test_what_a_function_returns_besides_stands_under_its_name(path):
    found = score(right={"path": path}, layout={"path": path, "name": "compute_more"})
    assert found == {"score": 2.0, "right": 1.0, "layout": 1.0, "layout/format": 0.5, "acc": 1.0}


def test_a_function_that_raises_or_gives_no_score_is_named(path):
    with pytest.raises(RuntimeError, match=r"the reward 'lost' \(.*rewards.py\) failed: LookupError: no such answer"):
        score(right={"path": path}, lost={"path": path, "name": "compute_failure"})
    with pytest.raises(RuntimeError, match=r"the reward 'gone' \(.*other.py\) failed: FileNotFoundError"):
        score(gone={"path": path.replace("rewards", "other")})
    with pytest.raises(TypeError, match="the reward 'lost' returned None, which is no finite number, give a number"):
        score(lost={"path": path, "name": "compute_nothing"})


@pytest.mark.parametrize("value", ["none", "nan"])
def test_a_function_that_gives_no_number_is_named(path, value):
    with pytest.raises(TypeError, match=f"(?i)the reward 'lazy' returned {value}, which is no finite number, give a"):
        score(lazy={"path": path, "name": f"compute_{value}"})


@pytest.mark.parametrize("name", ["score", "acc"])
def test_a_function_may_not_have_the_name_of_the_sum_or_the_accuracy(path, name):
    with pytest.raises(ValueError, match=f"functions.{name}: the name is taken"):
        score(right={"path": path}, **{name: {"path": path, "name": "compute_brevity"}})


def test_the_overrides_of_the_documentation_are_what_it_takes():
    text = (Path(__file__).resolve().parents[1] / "docs" / "preferences.md").read_text()
    overrides = re.findall(r"'(\+reward\.\S+=\{.*\})'", text)
    functions = compose(*overrides, device="cpu").reward.custom_reward_function.reward_kwargs.functions
    assert functions.right.path == "examples/arithmetic/reward.py"
    assert functions.brief == {"path": "/data/mine.py", "name": "compute_brevity", "weight": 0.1}
