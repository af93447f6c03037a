"""How a response gets its score: verl's reward, with a time limit, and with what it must not return refused."""

import math
from functools import cached_property

import ray
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput

from recipe.spin.preferences.reward_error import NoScore, Patience, RewardError, finite_number, reward_name

FAULT = "reward_error"  # of the responses' extra fields: why one has no score
SHOWN_CHARACTERS = 80


class Scoring:
    """What differs from how verl's agent loop worker scores, to be put before it among a worker's bases.

    With `algorithm.reward_error=skip` a response whose reward fails gets the score NaN, which means that it has none,
    and the reason among its extra fields.
    """

    @cached_property
    def _patience(self) -> Patience:
        return Patience(self.config.algorithm.reward_timeout_s)

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict) -> None:
        response = outputs[-1]
        if response.reward_score is not None or self.reward_loop_worker_handles is None:
            return await super()._compute_score(outputs, kwargs)  # the agent loop has scored it, or the trainer will
        try:
            await self._patience.wait_for(super()._compute_score(outputs, kwargs))
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


def response_name(row: dict) -> str:
    """Which response of which prompt it was."""
    return f"response {row['session_id']} to {prompt_name(row)}"


def prompt_name(row: dict) -> str:
    """Which prompt of the data it was, by its last message."""
    messages = row.get("raw_prompt")
    prompt = str(messages[-1].get("content")) if messages is not None and len(messages) else ""
    shown = prompt if len(prompt) <= SHOWN_CHARACTERS else prompt[: SHOWN_CHARACTERS - 3] + "..."
    index = (row.get("extra_info") or {}).get("index")
    number = "" if index is None else f", extra_info.index {index}"
    return f"the prompt {shown!r} (data_source {row.get('data_source')}{number})"
