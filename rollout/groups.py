"""Scoring the responses to a prompt together, as soon as the last of them is there."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from numbers import Real
from typing import Any

from recipe.spin.preferences.reward_error import NoScore, finite_number
from recipe.spin.preferences.source import Group, Score
from recipe.spin.rollout.scoring import prompt_name


def checked(scores: Any, group: Group, source: str) -> list[Score]:
    """What the source's `score_group` gave for a prompt's responses, the values as floats.

    NaN is taken where the response's reward is NaN: there the reward failed, which was counted or has ended the run.

    Raises:
        ValueError: unless each response has a Score with a finite number; names the source, the prompt, the response.
    """
    prompt, count = prompt_name(group.row), len(group.responses)
    given = len(scores) if isinstance(scores, list | tuple) else f"{scores!r}, which is no list of"
    if given != count:
        raise ValueError(
            f"{source}.score_group gave {given} scores for {count} responses to {prompt}; give one for each"
        )
    rewards = group.rewards or [None] * count
    found = []
    for number, (score, reward) in enumerate(zip(scores, rewards, strict=True)):
        try:
            found.append(Score(_value(score, reward), score.info))
        except NoScore as error:
            raise ValueError(
                f"{source}.score_group {error} for response {number} to {prompt}; give a Score with a finite number"
            ) from error
    return found


def win(scores: list[Score]) -> float:
    """What the second of two responses is worth: 1 where it has the higher score, 0 where the first has, else 0.5."""
    first, second = (score.value for score in scores)
    return 0.5 + 0.5 * ((second > first) - (second < first))


def _value(score: Any, reward: float | None) -> float:
    if not isinstance(score, Score):
        raise NoScore(f"returned {score!r}, which is no Score,")
    if _is_nan(score.value) and _is_nan(reward):
        return math.nan
    return finite_number(score.value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, Real) and math.isnan(value)


class GroupScoring:
    """The n responses to a prompt: each waits for the last, and gets its score from the one call for all."""

    def __init__(self, count: int, score: Callable[[list[Any]], Awaitable[list[Any]]]):
        self._count = count
        self._score = score
        self._responses: dict[int, Any] = {}
        self._scores: asyncio.Future = asyncio.get_running_loop().create_future()

    async def score(self, number: int, response: Any) -> Any:
        """The score of response `number` of the n. Raises what scoring raised, or that another response failed."""
        self._responses[number] = response
        if len(self._responses) == self._count:
            await self._score_all()
        return (await asyncio.shield(self._scores))[number]

    async def _score_all(self) -> None:
        try:
            scores = await self._score([self._responses[n] for n in sorted(self._responses)])
        except Exception as error:  # handed to each that waits
            self._scores.set_exception(error)
        else:
            self._scores.set_result(scores)

    def give_up(self, error: BaseException) -> None:
        """A response failed: there is no group to score. Nothing changes where scoring has failed or succeeded."""
        if not self._scores.done():
            self._scores.set_exception(RuntimeError(f"another response to the same prompt failed: {error!r}"))
            self._scores.exception()  # read here: maybe none waits
