"""AsyncSpinTrainer: SpinTrainer that does not wait for the last responses of a batch.

With `trainer.v1.trainer_mode=colocate_async` more prompts are being answered than a step trains on. As soon as enough
are, the others are stopped, vLLM gives the device to the update, and with the new weights they go on where they were.
"""

from verl.trainer.ppo.v1.trainer_base import _count_tq_prompt_groups

from recipe.spin.rollout import queue
from recipe.spin.rollout.agent_loop import ResumingClient
from recipe.spin.spin_trainer import SpinTrainer


class AsyncSpinTrainer(SpinTrainer):
    """What differs from SpinTrainer where prompts are answered ahead of the step that trains on them."""

    def get_llm_client(self):
        return self.llm_server_manager.get_client(ResumingClient)

    def on_sample_end(self):
        self.checkpoint_manager.abort_replicas()
        super().on_sample_end()

    def on_step_end(self):
        super().on_step_end()
        self.checkpoint_manager.resume_generation_replicas()

    # ------------------------------------------------------------------ prompts ahead

    @property
    def _batches_ahead(self) -> float:
        return self.config.trainer.v1.colocate_async.num_warmup_batches

    def _add_batch_to_generate(self) -> None:
        """Fills up what vLLM has to do, with none of the prompts that no step is left for."""
        size = self.config.data.train_batch_size
        steps_left = self.total_training_steps - self.global_steps + 1
        missing = int(size * min(1 + self._batches_ahead, steps_left)) - _count_tq_prompt_groups()
        if missing > 0:
            self._add_prompts_to_generate(missing)

    def _check_filtering(self, fetched: int) -> None:
        super()._check_filtering(fetched - int(self.config.data.train_batch_size * self._batches_ahead))

    def _reissue_inflight_prompts(self, partition_id: str = "train") -> int:
        """Sends the prompts that the checkpoint holds unanswered or failed; what its last step trained on is cleared.

        verl saves before it clears that, and a resumed run would keep it for good.
        """
        tags = queue.tags(partition_id)
        waiting = {key for key, tag in tags.items() if tag.get("is_prompt")}
        trained_on = [key for key in tags if key not in waiting and queue.trajectory_place(key)[0] not in waiting]
        if trained_on:
            queue.remove(trained_on, partition_id)
        failed = [key for key in waiting if tags[key]["status"] == "failure"]
        if failed:
            queue.retag({key: tags[key] | {"status": "pending"} for key in failed}, partition_id)
        return super()._reissue_inflight_prompts(partition_id)
