"""Responses to a prompt that are scored together."""

import asyncio
import math

import numpy as np
import pytest
import torch

from recipe.spin.preferences.source import Group, Score
from recipe.spin.rollout.groups import GroupScoring, checked


def test_all_are_scored_in_one_call_when_the_last_is_there():
    calls = []

    async def score(responses: list) -> list:
        calls.append(responses)
        return [f"score of {response}" for response in responses]

    async def run() -> list:
        group = GroupScoring(3, score)
        waits = [asyncio.create_task(group.score(number, name)) for number, name in ((2, "c"), (0, "a"))]
        await asyncio.sleep(0)
        assert calls == []
        return [await group.score(1, "b"), *await asyncio.gather(*waits)]

    assert asyncio.run(run()) == ["score of b", "score of c", "score of a"]
    assert calls == [["a", "b", "c"]]


def test_what_scoring_raises_reaches_every_response():
    async def score(responses: list) -> list:
        raise ValueError("no judge")

    async def run() -> list:
        group = GroupScoring(2, score)
        return await asyncio.gather(group.score(0, "a"), group.score(1, "b"), return_exceptions=True)

    assert [str(error) for error in asyncio.run(run())] == ["no judge", "no judge"]


def test_a_failed_response_lets_none_wait():
    async def score(responses: list) -> list:
        raise AssertionError("there is no group")

    async def run() -> BaseException:
        group = GroupScoring(2, score)
        waits = asyncio.create_task(group.score(0, "a"))
        await asyncio.sleep(0)
        group.give_up(ConnectionError("vLLM is away"))
        (error,) = await asyncio.gather(waits, return_exceptions=True)
        return error

    assert "another response to the same prompt failed: ConnectionError('vLLM is away')" in str(asyncio.run(run()))


# ---- what a source's score_group gives -------------------------------------------------------------------------------
def group(rewards: list[float] | None = None) -> Group:
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    row = {"raw_prompt": messages, "data_source": "sums", "extra_info": {"index": 7}}
    return Group(3, messages, ["two", "2"], rewards, row, None)


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.5), torch.tensor(0.25)])
def test_numbers_are_a_sources_scores(value):
    first, second = checked([Score(value, {"why": "so"}), Score(0.0, {})], group(), "Mine")
    assert (first, second) == (Score(float(value), {"why": "so"}), Score(0.0, {})) and type(first.value) is float


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (Score(None, {}), "returned None, which is no finite number,"),
        (Score(math.nan, {}), "returned nan, which is no finite number,"),
        (Score(-math.inf, {}), "returned -inf, which is no finite number,"),
        (Score("1", {}), "returned '1', which is no finite number,"),
        (0.5, "returned 0.5, which is no Score,"),
        ((0.5, {}), "returned (0.5, {}), which is no Score,"),
    ],
)
def test_what_is_no_score_is_refused_by_source_prompt_and_response(score, words):
    with pytest.raises(ValueError) as caught:
        checked([Score(1.0, {}), score], group([0.0, 1.0]), "Mine")
    where = "for response 1 to the prompt 'What is 1 + 1?' (data_source sums, extra_info.index 7)"
    assert str(caught.value).startswith(f"Mine.score_group {words} {where}; give a Score")


@pytest.mark.parametrize(("scores", "words"), [([Score(1.0, {})], "gave 1 scores"), (None, "gave None, which is no")])
def test_as_many_scores_as_responses(scores, words):
    with pytest.raises(ValueError) as caught:
        checked(scores, group(), "Mine")
    assert f"Mine.score_group {words}" in str(caught.value) and "2 responses to the prompt 'What" in str(caught.value)


def test_a_response_whose_reward_failed_has_no_score_of_a_source_either():
    """With algorithm.reward_error=skip the reward is NaN, and so is what a source makes of it."""
    scores = checked([Score(math.nan, {}), Score(1.0, {})], group([math.nan, 1.0]), "Mine")
    assert math.isnan(scores[0].value) and scores[1].value == 1.0
    with pytest.raises(ValueError, match="response 1"):
        checked([Score(math.nan, {}), Score(math.nan, {})], group([math.nan, 1.0]), "Mine")
