"""Rewards that fail, return no number or never return: the message names reward and response, or the response is left
out."""

import asyncio
import contextlib
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from ray.exceptions import RayTaskError
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

from recipe.spin.preferences import reward_error
from recipe.spin.preferences.reward_error import RewardError
from recipe.spin.rollout.scoring import FAULT, Scoring, response_name

ROW = {
    "session_id": 1,
    "raw_prompt": np.array([{"role": "user", "content": "What is 1 + 1?"}], dtype=object),
    "data_source": "sums",
    "extra_info": {"index": 7},
}


class VerlsWorker:
    """Stands for verl's: asks a reward, which is the function it holds."""

    reward_loop_worker_handles = ["a reward worker"]

    async def _compute_score(self, outputs, kwargs):
        outputs[-1].reward_score = await self.reward()


class Worker(Scoring, VerlsWorker):
    def __init__(self, reward, error: str = "raise", limit: float = 60.0):
        function = {"path": "/data/mine/reward.py", "name": "compute_score"}
        reward_settings = {"custom_reward_function": function, "reward_model": {"enable": False}}
        algorithm = {"reward_error": error, "reward_timeout_s": limit}
        self.config = OmegaConf.create({"algorithm": algorithm, "reward": reward_settings})
        self.reward = reward


def output() -> AgentLoopOutput:
    return AgentLoopOutput(prompt_ids=[1], response_ids=[2], response_mask=[1], metrics=AgentLoopMetrics())


def score(worker: Worker) -> AgentLoopOutput:
    response = output()
    asyncio.run(asyncio.wait_for(worker._compute_score([response], ROW), 10))
    return response


def returning(value):
    async def reward():
        return value

    return reward


async def raising():
    error = KeyError("answer")
    raise RayTaskError("compute_score", "traceback", error).as_instanceof_cause()


async def never():
    await asyncio.Event().wait()


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.5), torch.tensor(0.25)])
def test_numbers_are_scores(value):
    assert score(Worker(returning(value))).reward_score == float(value)


@pytest.mark.parametrize("value", [None, "1.0", math.nan, math.inf, [1.0], np.ones(2), torch.ones(2)])
def test_what_is_no_finite_number_is_refused_by_name(value):
    with pytest.raises(RewardError) as caught:
        score(Worker(returning(value)))
    message = str(caught.value)
    assert f"compute_score of /data/mine/reward.py returned {value!r}" in message
    assert "response 1 to the prompt 'What is 1 + 1?'" in message and "extra_info.index 7" in message
    assert "algorithm.reward_error=skip" in message


def test_a_reward_that_raises_is_named_with_its_error():
    with pytest.raises(
        RewardError, match=r"compute_score of /data/mine/reward.py raised KeyError: 'answer' for response 1"
    ):
        score(Worker(raising))


def test_a_reward_that_never_returns_is_given_up():
    with pytest.raises(RewardError, match=r"did not return within algorithm.reward_timeout_s=0.05 s for response 1"):
        score(Worker(never, limit=0.05))


@pytest.mark.parametrize("reward", [returning(None), returning(math.nan), raising, never])
def test_skip_leaves_the_response_without_a_score(reward):
    response = score(Worker(reward, error="skip", limit=0.05))
    assert math.isnan(response.reward_score)
    assert "compute_score of /data/mine/reward.py" in response.extra_fields[FAULT]
    assert response.extra_fields["reward_extra_info"] == {}


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time passes by what is waited for alone, however busy the machine is."""

    def __init__(self):
        super().__init__()
        self._now = 0.0
        self._look, self._selector.select = self._selector.select, self._pass_time

    def time(self) -> float:
        return self._now

    def _pass_time(self, seconds: float | None):
        self._now += seconds or 0.0
        return self._look(0)


def test_a_response_waits_as_long_as_others_get_their_scores(monkeypatch):
    """Twenty that are scored one after the other, all of them together over the limit of one."""

    async def one_at_a_time():
        async with turn:
            await asyncio.sleep(20.0)
        return 1.0

    async def run(worker: Worker) -> list[AgentLoopOutput]:
        responses = [output() for _ in range(20)]
        await asyncio.gather(*(worker._compute_score([response], ROW) for response in responses))
        return responses

    turn, clock = asyncio.Lock(), Clock()
    monkeypatch.setattr(reward_error.time, "monotonic", clock.time)
    with contextlib.closing(clock):
        responses = clock.run_until_complete(run(Worker(one_at_a_time, limit=30.0)))
    assert [response.reward_score for response in responses] == [1.0] * 20 and clock.time() == 400.0


def test_a_dead_reward_worker_is_not_the_rewards_fault():
    from ray.exceptions import ActorDiedError

    async def dead():
        raise ActorDiedError()

    with pytest.raises(ActorDiedError):
        score(Worker(dead, error="skip"))


def test_a_long_prompt_is_shown_in_part():
    row = ROW | {"raw_prompt": [{"role": "user", "content": "x" * 500}], "extra_info": {}}
    assert len(response_name(row)) < 200 and "xxx..." in response_name(row) and "index" not in response_name(row)


def test_what_the_trainer_will_score_is_left_to_it():
    worker = Worker(returning(None))
    worker.reward_loop_worker_handles = None
    assert score(worker).reward_score is None
