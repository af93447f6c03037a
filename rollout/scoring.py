"""How a response gets its score: verl's reward, with a time limit, and with what it must not return refused."""

import asyncio
import math
import time
from collections.abc import Awaitable
from numbers import Real

import ray
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput

FAULT = "reward_error"  # of the responses' extra fields: why one has no score
SHOWN_CHARACTERS = 80


class RewardError(RuntimeError):
    """A reward that failed, returned no finite number or did not return; names the reward and the response."""


class NoScore(Exception):
    """Why a reward's answer is no score, as the end of a sentence about the reward."""


class Scoring:
    """What differs from how verl's agent loop worker scores, to be put before it among a worker's bases.

    With `algorithm.reward_error=skip` a response whose reward fails gets the score NaN, which means that it has none,
    and the reason among its extra fields.
    """

    _last_score = 0.0  # when a reward returned last, by the monotonic clock

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict) -> None:
        response = outputs[-1]
        if response.reward_score is not None or self.reward_loop_worker_handles is None:
            return await super()._compute_score(outputs, kwargs)  # the agent loop has scored it, or the trainer will
        try:
            await self._in_time(super()._compute_score(outputs, kwargs), self.config.algorithm.reward_timeout_s)
            response.reward_score = finite_number(response.reward_score)
        except ray.exceptions.RayTaskError as error:  # of a reward worker that lives
            self._without_score(response, kwargs, f"raised {type(error.cause).__name__}: {error.cause}", error)
        except NoScore as error:
            self._without_score(response, kwargs, str(error), error)

    def _without_score(self, response: AgentLoopOutput, row: dict, fault: str, error: Exception) -> None:
        fault = f"{reward_name(self.config)} {fault} for {response_name(row)}"
        if self.config.algorithm.reward_error != "skip":
            remedy = "Mend the reward or that row; algorithm.reward_error=skip leaves such responses out"
            raise RewardError(f"{fault}. {remedy}") from error
        response.reward_score = math.nan
        response.extra_fields |= {FAULT: fault, "reward_extra_info": {}}

    async def _in_time(self, scoring: Awaitable, limit: float) -> None:
        """Awaits a score; gives up when for `limit` seconds no reward at all has returned.

        Not the time of one call: many wait until a reward worker has a thread for them.
        """
        asked, task = time.monotonic(), asyncio.ensure_future(scoring)
        while not task.done():
            left = max(asked, self._last_score) + limit - time.monotonic()
            if left <= 0:
                task.cancel()
                raise NoScore(f"did not return within algorithm.reward_timeout_s={limit:g} s")
            await asyncio.wait({task}, timeout=left)
        self._last_score = time.monotonic()
        task.result()


def finite_number(score) -> float:
    """A reward as a float.

    Raises:
        NoScore: when it is no finite number.
    """
    if hasattr(score, "item"):  # of numpy's or torch's
        score = score.item()
    if not isinstance(score, Real) or not math.isfinite(score):
        raise NoScore(f"returned {score!r}, which is no finite number,")
    return float(score)


def reward_name(config) -> str:
    """The reward as its user knows it."""
    function = config.reward.custom_reward_function
    if function.path:
        return f"the reward {function.name} of {function.path}"
    return "the reward model" if config.reward.reward_model.enable else "verl's reward for the data source"


def response_name(row: dict) -> str:
    """Which response of which prompt it was."""
    messages = row.get("raw_prompt")
    prompt = str(messages[-1].get("content")) if messages is not None and len(messages) else ""
    shown = prompt if len(prompt) <= SHOWN_CHARACTERS else prompt[: SHOWN_CHARACTERS - 3] + "..."
    index = (row.get("extra_info") or {}).get("index")
    number = "" if index is None else f", extra_info.index {index}"
    return f"response {row['session_id']} to the prompt {shown!r} (data_source {row.get('data_source')}{number})"
