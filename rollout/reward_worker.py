"""verl's reward worker: its answers are complete and come in time, and a model folder's code runs only if allowed."""

import asyncio

from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils import hf_tokenizer
from verl.utils.fs import copy_to_local

from recipe.spin.common import heap
from recipe.spin.preferences.reward_error import NoScore, Patience, RewardError, reward_name


class RewardWorker(RewardLoopWorker):
    """Scores responses by a reward function or a reward model."""

    def _init_reward_fn(self):
        """As verl's, which loads tokenizers with `trust_remote_code=True`, whatever the run was told."""
        model, reward_model = self.config.actor_rollout_ref.model, self.config.reward.reward_model
        self.input_tokenizer = self._tokenizer(model.path if model.tokenizer_path is None else model.tokenizer_path)
        self.reward_model_tokenizer = self._tokenizer(reward_model.model_path) if reward_model.enable else None
        self.reward_manager = load_reward_manager(
            self.config,
            self.input_tokenizer,
            reward_router_address=self.reward_router_address,
            reward_model_tokenizer=self.reward_model_tokenizer,
        )
        heap.hand_back()

    def _tokenizer(self, path: str):
        trusts = self.config.actor_rollout_ref.model.trust_remote_code
        return hf_tokenizer(copy_to_local(path), trust_remote_code=trusts)

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

    async def _preprocess_reward_inputs(self, data: DataProto) -> str:
        """As verl's, which takes the tokenizer's end token off the response: a chat's turn may end in another (Gemma's
        does), and the reward model's template writes its own."""
        special = set(self.input_tokenizer.all_special_ids)
        [response], mask = data.batch["responses"], data.batch["attention_mask"].clone()
        inside = mask[0, -len(response) :]  # a view: responses stand on the left, with padding after them
        end = int(inside.sum())
        while end > 0 and int(response[end - 1]) in special:
            end -= 1
        inside[end:] = 0
        batch = data.batch.clone(recurse=False).set("attention_mask", mask)
        return await super()._preprocess_reward_inputs(DataProto(batch, data.non_tensor_batch, data.meta_info))

    async def compute_score_disrm(self, data) -> dict:
        """verl's agent loop reads `reward_extra_info` of every answer; a reward model's has none."""
        return {"reward_extra_info": {}, **await super().compute_score_disrm(data)}
