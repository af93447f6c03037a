"""verl's replay buffers with an order: what a step gets does not follow from the chance of which answer came first."""

import math
import time
from collections import defaultdict
from collections.abc import Callable

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import FILTER_GROUPS_REWARD_METRIC, ReplayBuffer, ReplayBufferAsync

from recipe.spin.rollout.reward_error import RewardError
from recipe.spin.rollout.scoring import FAULT

WAIT_SECONDS = 60.0
WITHOUT_SCORE = "training/filter_groups/responses_without_score"


class ScoredGroups:
    """What differs from verl's dynamic sampling where responses have no score (`algorithm.reward_error=skip`).

    Their NaN would make a prompt one whose responses differ, and another metric of the reward's would be missed. Here a
    prompt ties whose scored responses do, or of which fewer than two have a score.
    """

    _batch_size = math.inf
    # Since the last sample: responses with a score and without one, prompts of whose responses none has one
    _scored = _without_score = _prompts_without_score = 0

    def sample(self, global_steps: int, partition_id: str, batch_size: int):
        """verl's sample; its metrics have the responses without a score, those of replaced prompts as well.

        Raises:
            RewardError: when none of a whole batch has a score: verl would ask for others, without end if all fail.
        """
        if partition_id == "val":
            return super().sample(global_steps, partition_id, batch_size)
        self._batch_size = batch_size
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if self._without_score:
            metrics = metrics | {WITHOUT_SCORE: self._without_score}
        self._scored = self._without_score = self._prompts_without_score = 0
        return batch, metrics

    def _dapo_filtered_keys(self, partition_id: str):
        if self.filter_groups_metric is not None and partition_id != "val":
            self._classify_groups_without_scores(partition_id)
        return super()._dapo_filtered_keys(partition_id)

    def _classify_groups_without_scores(self, partition_id: str) -> None:
        """Puts into verl's cache the value by which a prompt ties, NaN where it has none, or None if it does not."""
        known = self._dapo_classification_cache[partition_id]
        groups = defaultdict(list)
        for key, reward, extra in self._rewards_of(partition_id, self.finished_keys[partition_id] - known.keys()):
            groups[key.split("_")[0]].append((reward, extra))
        for uid, group in groups.items():
            values = [self._value(reward, extra) for reward, extra in group if not math.isnan(reward)]
            self._count(group, len(values))
            if len(values) < len(group) and None not in values:  # else verl says which metric is missing
                known[uid] = None if len(set(values)) > 1 else next(iter(values), math.nan)

    def _rewards_of(self, partition_id: str, uids: set[str]) -> list[tuple[str, float, dict]]:
        """The key, the reward and the extra fields of each response to these prompts."""
        keys = [key for key in self.partitions[partition_id] if key.split("_")[0] in uids]
        if not keys:
            return []
        data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["rm_scores", "extra_fields"])
        rewards = [row.sum().item() for row in data["rm_scores"]]
        return list(zip(keys, rewards, (getattr(one, "data", one) for one in data["extra_fields"]), strict=True))

    def _value(self, reward: float, extra: dict) -> float | None:
        """What prompts are told apart by (`algorithm.filter_groups.metric`); None where the reward did not give it."""
        if self.filter_groups_metric == FILTER_GROUPS_REWARD_METRIC:
            return reward
        value = extra.get("reward_extra_info", {}).get(self.filter_groups_metric)
        return None if value is None else float(value)

    def _count(self, group: list[tuple[float, dict]], scored: int) -> None:
        self._scored += scored
        self._without_score += len(group) - scored
        self._prompts_without_score += scored == 0
        if not self._scored and self._prompts_without_score >= self._batch_size:
            faults = [extra[FAULT] for _, extra in group if FAULT in extra]
            raise RewardError(
                f"no response to {self._prompts_without_score} prompts has a score. One of them: {' '.join(faults[:1])}"
            )


class InOrder(ScoredGroups):
    """What differs from a buffer of verl's that returns answers in the order of their prompts, to be put before it.

    Attributes:
        settle: the manager's (rollout/agent_loop.py), which waits for the prompts being answered.
        is_idle: the manager's too, whether there are none.
    """

    settle: Callable[[float], bool]
    is_idle: Callable[[], bool]

    def _select_prompt_uids(self, partition_id, sampleable_keys, batch_size):
        asked = [uid for uid in self.prompt_global_steps[partition_id] if uid in sampleable_keys]
        _, *snapshots = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        return asked[:batch_size], *snapshots

    def _materialize_batch(self, partition_id, selected_prompt_uids, partition_snapshot):
        place = {uid: number for number, uid in enumerate(selected_prompt_uids)}

        def order(key: str) -> tuple[int, int, int]:
            uid, session, index = key.rsplit("_", 2)
            return place.get(uid, -1), int(session), int(index)

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


class WholeRounds(InOrder, ReplayBuffer):
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
        if self.settle(WAIT_SECONDS):
            self._check_lost(partition_id)
        return super()._wait_for_next_poll(partition_id, last_debug_time)


class OldestFirst(InOrder, ReplayBufferAsync):
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
            if self.is_idle():
                self._check_lost(partition_id)
        return super()._wait_for_next_poll(partition_id, last_debug_time)
