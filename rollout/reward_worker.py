"""verl's reward worker: its answers are complete and come in time, and a model folder's code runs only if allowed."""

import asyncio

from verl.experimental.reward_loop import reward_loop
from verl.utils import hf_tokenizer

from recipe.spin.common import heap
from recipe.spin.preferences.reward_error import NoScore, Patience, RewardError, reward_name

VerlWorker = reward_loop.RewardLoopWorker


class RewardWorker(VerlWorker):
    """Scores responses by a reward function or a reward model."""

    def _init_reward_fn(self):
        """verl loads tokenizers with `trust_remote_code=True`, whatever the run was told."""
        trusts = self.config.actor_rollout_ref.model.trust_remote_code
        reward_loop.hf_tokenizer = lambda path, **options: hf_tokenizer(path, **options | {"trust_remote_code": trusts})
        super()._init_reward_fn()
        heap.hand_back()

    async def compute_score_batch(self, data) -> list[dict]:
        """A step's scores where the reward model shares the trainer's devices; verl would wait without end.

        Raises:
            RewardError: when for `algorithm.reward_timeout_s` seconds no response got a score.
        """
        patience = Patience(self.config.algorithm.reward_timeout_s)
        scores = (patience.wait_for(self.compute_score(data[number : number + 1])) for number in range(len(data)))
        try:
            return await asyncio.gather(*scores)
        except NoScore as error:
            raise RewardError(
                f"{reward_name(self.config)} {error} for the responses of a batch. Look after its server, or raise "
                "algorithm.reward_timeout_s"
            ) from error

    async def compute_score_disrm(self, data) -> dict:
        """verl's agent loop reads `reward_extra_info` of every answer; a reward model's has none."""
        return {"reward_extra_info": {}, **await super().compute_score_disrm(data)}


def use_reward_worker() -> None:
    """Puts it in place of verl's, for which verl has no hook; called in the process that starts the workers."""
    reward_loop.RewardLoopWorker = RewardWorker
