"""verl's reward worker, whose answers are complete and which runs a model folder's code only where that was allowed."""

from verl.experimental.reward_loop import reward_loop
from verl.utils import hf_tokenizer

VerlWorker = reward_loop.RewardLoopWorker


class RewardWorker(VerlWorker):
    """Scores responses by a reward function or a reward model."""

    def _init_reward_fn(self):
        """verl loads tokenizers with `trust_remote_code=True`, whatever the run was told."""
        trusts = self.config.actor_rollout_ref.model.trust_remote_code
        reward_loop.hf_tokenizer = lambda path, **options: hf_tokenizer(path, **options | {"trust_remote_code": trusts})
        super()._init_reward_fn()

    async def compute_score_disrm(self, data) -> dict:
        """verl's agent loop reads `reward_extra_info` of every answer; a reward model's has none."""
        return {"reward_extra_info": {}, **await super().compute_score_disrm(data)}


def use_reward_worker() -> None:
    """Puts it in place of verl's, for which verl has no hook; called in the process that starts the workers."""
    reward_loop.RewardLoopWorker = RewardWorker
