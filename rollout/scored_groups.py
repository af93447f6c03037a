"""Dynamic sampling where some responses have no score."""

import math
from collections import defaultdict

from verl.trainer.ppo.v1.replay_buffer import FILTER_GROUPS_REWARD_METRIC

from recipe.spin.preferences.reward_error import RewardError
from recipe.spin.rollout import queue
from recipe.spin.rollout.scoring import FAULT

WITHOUT_SCORE = "training/filter_groups/responses_without_score"


class ScoredGroups:
    """What differs from verl's replay buffers where responses have no score (`algorithm.reward_error=skip`).

    Their NaN would make a prompt one whose responses differ, and another metric of the reward's would be missed. Here a
    prompt ties whose scored responses do, or of which fewer than two have a score.

    Attributes:
        rewards_may_fail: whether responses can be without a score. Where none can, rewards are read by verl alone.
    """

    rewards_may_fail = False
    _batch_size = math.inf
    # Since the last sample: responses with a score and without one, prompts of whose responses none has one
    _scored = _without_score = _prompts_without_score = 0
    _counted: frozenset[str] = frozenset()  # prompts that stand in them

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
        self._counted = frozenset()
        return batch, metrics

    def _dapo_filtered_keys(self, partition_id: str):
        if self.rewards_may_fail and self.filter_groups_metric is not None and partition_id != "val":
            self._classify_groups_without_scores(partition_id)
        return super()._dapo_filtered_keys(partition_id)

    def _classify_groups_without_scores(self, partition_id: str) -> None:
        """Puts into verl's cache the value by which a prompt ties, NaN where it has none, or None if it does not."""
        known = self._dapo_classification_cache[partition_id]
        groups = defaultdict(list)
        for key, reward, extra in self._rewards_of(partition_id, self.finished_keys[partition_id] - known.keys()):
            groups[queue.trajectory_place(key)[0]].append((reward, extra))
        for uid, group in groups.items():
            values = [self._value(reward, extra) for reward, extra in group if not math.isnan(reward)]
            if uid not in self._counted:  # verl forgets what it knows of prompts that wait for a refill (WholeRounds)
                self._count(group, len(values))
            if len(values) < len(group) and None not in values:  # else verl says which metric is missing
                known[uid] = None if len(set(values)) > 1 else next(iter(values), math.nan)
        self._counted = self._counted.union(groups)

    def _rewards_of(self, partition_id: str, uids: set[str]) -> list[tuple[str, float, dict]]:
        """The key, the reward and the extra fields of each response to these prompts."""
        keys = [key for key in self.partitions[partition_id] if queue.trajectory_place(key)[0] in uids]
        if not keys:
            return []
        data = queue.read(keys, partition_id, ["rm_scores", "extra_fields"])
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
