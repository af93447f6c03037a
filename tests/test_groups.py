"""Responses to a prompt that are scored together."""

import asyncio

import pytest

from recipe.spin.rollout.groups import GroupScoring


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


@pytest.mark.parametrize("fault", [ValueError("no judge"), None])
def test_what_scoring_raises_reaches_every_response(fault):
    async def score(responses: list) -> list:
        if fault is None:
            return [1.0]
        raise fault

    async def run() -> list:
        group = GroupScoring(2, score)
        return await asyncio.gather(group.score(0, "a"), group.score(1, "b"), return_exceptions=True)

    words = "no judge" if fault else "score_group gave 1 scores for 2 responses"
    assert [words in str(error) for error in asyncio.run(run())] == [True, True]


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
