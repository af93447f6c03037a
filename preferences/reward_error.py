"""A reward that gives no score: what is none, what that is called, and how long it is waited for."""

import asyncio
import math
import time
from collections.abc import Awaitable
from contextlib import suppress
from numbers import Real
from typing import TypeVar

Answer = TypeVar("Answer")


class RewardError(RuntimeError):
    """A reward that failed, returned no finite number or did not return; names the reward and the response."""


class NoScore(Exception):
    """Why a reward's answer is no score, as the end of a sentence about the reward."""


class Patience:
    """Awaits the scores of many responses; `limit` is `algorithm.reward_timeout_s`."""

    def __init__(self, limit: float):
        self._limit = limit
        self._last_score = 0.0  # when a reward returned last, by the monotonic clock

    async def wait_for(self, scoring: Awaitable[Answer]) -> Answer:
        """A score, unless for `limit` seconds no reward at all has returned.

        Not the time of one call: many wait until a reward worker has a thread for them, or the reward model room.

        Raises:
            NoScore: when that time has passed.
        """
        asked, task = time.monotonic(), asyncio.ensure_future(scoring)
        while not task.done():
            left = max(asked, self._last_score) + self._limit - time.monotonic()
            if left <= 0:
                task.cancel()
                raise NoScore(f"did not return within algorithm.reward_timeout_s={self._limit:g} s")
            await asyncio.wait({task}, timeout=left)
        self._last_score = time.monotonic()
        return task.result()


def finite_number(score) -> float:
    """A reward as a float.

    Raises:
        NoScore: when it is no finite number.
    """
    with suppress(ValueError, RuntimeError):  # of an array of several numbers, which is none below
        score = score.item() if hasattr(score, "item") else score  # of numpy's or torch's
    if not isinstance(score, Real) or not math.isfinite(score):
        raise NoScore(f"returned {score!r}, which is no finite number,")
    return float(score)


def reward_name(config) -> str:
    """The reward as its user knows it."""
    function = config.reward.custom_reward_function
    if function.path:
        return f"the reward {function.name} of {function.path}"
    return "the reward model" if config.reward.reward_model.enable else "verl's reward for the data source"
