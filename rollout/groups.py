"""Scoring the responses to a prompt together, as soon as the last of them is there."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


def checked(scores: list[Any], count: int) -> list[Any]:
    """The scores. Raises ValueError unless there is one for each of `count` responses."""
    if len(scores) != count:
        raise ValueError(f"score_group gave {len(scores)} scores for {count} responses; give one for each")
    return scores


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
            scores = checked(await self._score([self._responses[n] for n in sorted(self._responses)]), self._count)
        except Exception as error:  # handed to each that waits
            self._scores.set_exception(error)
        else:
            self._scores.set_result(scores)

    def give_up(self, error: BaseException) -> None:
        """A response failed: there is no group to score. Nothing changes where scoring has failed or succeeded."""
        if not self._scores.done():
            self._scores.set_exception(RuntimeError(f"another response to the same prompt failed: {error!r}"))
            self._scores.exception()  # read here: maybe none waits
