"""AsyncSpinTrainer: SpinTrainer that does not wait for the last responses of a batch.

With `trainer.v1.trainer_mode=colocate_async` more prompts are being answered than a step trains on. As soon as enough
are, the others are stopped, vLLM gives the device to the update, and with the new weights they go on where they were.
"""

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from recipe.spin.rollout.agent_loop import ResumingClient
from recipe.spin.spin_trainer import SpinTrainer


class AsyncSpinTrainer(SpinTrainer):
    """What differs from SpinTrainer where prompts are answered ahead of the step that trains on them."""

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        if type(buffer) is ReplayBufferAsync:  # not a sampler that the config names; ours has no state of its own
            buffer.__class__ = WholeAnswers
        return buffer

    def get_llm_client(self):
        return self.llm_server_manager.get_client(ResumingClient)

    def on_train_begin(self):
        self._add_async_warmup_batches(self.config.trainer.v1.colocate_async.num_warmup_batches)

    def on_sample_end(self):
        self.checkpoint_manager.abort_replicas()
        super().on_sample_end()

    def on_step_end(self):
        super().on_step_end()
        self.checkpoint_manager.resume_generation_replicas()


class WholeAnswers(ReplayBufferAsync):
    """verl's buffer, which replaces a prompt whose responses failed by another, for ever if all fail: it ends the run.

    The reward or the engine that failed has said why in the log. `algorithm.reward_error=skip` lets no prompt fail.
    """

    def _terminal_eviction_reasons(self, global_steps, partition_id):
        reasons = super()._terminal_eviction_reasons(global_steps, partition_id)
        failed = self.failure_keys[partition_id]
        if failed and partition_id != "val":
            raise RuntimeError(f"step {global_steps}: generating or scoring failed for {len(failed)} prompts")
        return reasons
