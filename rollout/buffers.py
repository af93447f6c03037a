"""verl's replay buffers with an order: what a step gets does not follow from the chance of which answer came first."""

import time
from collections.abc import Callable

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from recipe.spin.rollout.queue import trajectory_place
from recipe.spin.rollout.scored_groups import ScoredGroups

WAIT_SECONDS = 60.0


class InOrder:
    """What differs from a buffer of verl's that returns answers in the order of their prompts, to be put before it.

    Attributes:
        settle: the manager's (rollout/agent_loop.py), which waits for the prompts being answered.
        count_answering: how many these are.
    """

    settle: Callable[[float], bool]
    count_answering: Callable[[], int]

    def _select_prompt_uids(self, partition_id, sampleable_keys, batch_size):
        asked = [uid for uid in self.prompt_global_steps[partition_id] if uid in sampleable_keys]
        _, *snapshots = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        return asked[:batch_size], *snapshots

    def _materialize_batch(self, partition_id, selected_prompt_uids, partition_snapshot):
        place = {uid: number for number, uid in enumerate(selected_prompt_uids)}

        def order(key: str) -> tuple[int, int, int]:
            uid, session, index = trajectory_place(key)
            return place.get(uid, -1), session, index

        snapshot = {key: partition_snapshot[key] for key in sorted(partition_snapshot, key=order)}
        batch = super()._materialize_batch(partition_id, selected_prompt_uids, snapshot)
        if not batch.keys and partition_id == "val":  # with which verl's validation ends in an error that says nothing
            raise RuntimeError(
                f"all held-out answers failed, of {len(selected_prompt_uids)} prompts that were asked together; mend "
                "the cause, which the logs of the agent loop's worker hold"
            )
        return batch

    def _check_lost(self, partition_id: str) -> None:
        """Raises where prompts wait that nobody works on; to be asked when nobody works on any."""
        ReplayBuffer._sync_metadata_from_transfer_queue(self)
        lost = self.pending_keys[partition_id] | self.running_keys[partition_id]
        if lost:
            raise RuntimeError(f"{len(lost)} prompts were never answered, and nothing works on them: {min(lost)}")


class WholeRounds(InOrder, ScoredGroups, ReplayBuffer):
    """verl's buffer, which looks at answers when all that were asked for are there, and returns them in their order.

    Dynamic sampling then drops and replaces the same prompts in every run.
    """

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()
        for partition in {*self.pending_keys, *self.running_keys}:
            if self.pending_keys[partition] or self.running_keys[partition]:
                self.finished_keys.pop(partition, None)
                self.failure_keys.pop(partition, None)

    def _wait_for_next_poll(self, partition_id, last_debug_time):
        if self.settle(WAIT_SECONDS) or not self.count_answering():
            self._check_lost(partition_id)
        return super()._wait_for_next_poll(partition_id, last_debug_time)


class OldestFirst(InOrder, ScoredGroups, ReplayBufferAsync):
    """verl's buffer of asynchronous generation: hands out finished prompts while others are being answered.

    Those that were asked first come first. A prompt that failed ends the run, as in synchronous training; verl would
    ask for another in its place, for ever if all fail. The reward or the engine that failed has said why in the log.
    """

    _looked = 0.0

    def _terminal_eviction_reasons(self, global_steps, partition_id):
        reasons = super()._terminal_eviction_reasons(global_steps, partition_id)
        failed = self.failure_keys[partition_id]
        if failed and partition_id != "val":
            raise RuntimeError(f"step {global_steps}: generating or scoring failed for {len(failed)} prompts")
        return reasons

    def _wait_for_next_poll(self, partition_id, last_debug_time):
        if time.monotonic() - self._looked > WAIT_SECONDS:
            self._looked = time.monotonic()
            if not self.count_answering():
                self._check_lost(partition_id)
        return super()._wait_for_next_poll(partition_id, last_debug_time)
