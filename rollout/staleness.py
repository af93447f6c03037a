"""How far vLLM's weights are behind the policy's: when they are pushed, and how old those were that made a response.

The weights' version is the step that they are the result of, 0 as loaded.
"""

from typing import Any

import numpy as np
from transfer_queue import KVBatchMeta

from recipe.spin.preferences.source import PreferenceSource


def staleness(tags: list[dict], step: int) -> np.ndarray | None:
    """Steps (N,) between the weights that began each of N responses and those that the training step begins with.

    By the responses' tags; None where the engine does not tell.
    """
    versions = [tag.get("min_global_steps") for tag in tags]
    return None if None in versions else step - 1 - np.array(versions)


class StaleWeights:
    """What differs from verl's trainer where vLLM may be behind the policy, to be put before it among the bases."""

    source: PreferenceSource
    _staleness: dict[str, int] = {}  # of the step's responses, by their keys

    def on_step_end(self):
        if self._weights_are_due():
            super().on_step_end()

    def _weights_are_due(self) -> bool:
        """Whether vLLM gets the weights: every `rollout_sync_freq` steps, and for the held-out prompts."""
        return self._validation_is_due() or self.global_steps % self.config.trainer.rollout_sync_freq == 0

    def _measure_staleness(self, batch: KVBatchMeta) -> dict[str, float]:
        """The step's metrics of it: 0 where every step pushes weights and waits for all its responses.

        None where vLLM plays the reference, which is old on purpose.
        """
        steps = staleness(batch.tags, self.global_steps) if self.source.rollout_model == "actor" else None
        if steps is None:
            return {}
        self._staleness = dict(zip(batch.keys, steps.tolist(), strict=True))
        several = [tag["min_global_steps"] != tag["max_global_steps"] for tag in batch.tags]
        return {
            "staleness/mean": steps.mean().item(),
            "staleness/max": steps.max().item(),
            "staleness/several_versions": float(np.mean(several)),
        }

    @staticmethod
    def _name_logp_gap(metrics: dict[str, Any]) -> None:
        """Between different weights the gap is no sign of a fault, and gets a name of its own."""
        if metrics.get("staleness/max", 0) > 0 and "rollout/logp_gap_max" in metrics:
            metrics["staleness/logp_gap_max"] = metrics.pop("rollout/logp_gap_max")

    def _dump_generations(self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path):
        """As verl does; with the responses of training (`trainer.rollout_data_dir`) their staleness."""
        keys = reward_extra_infos_dict.get("uid", [])
        if keys and all(key in self._staleness for key in keys):
            reward_extra_infos_dict["staleness"] = [self._staleness[key] for key in keys]
        super()._dump_generations(inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path)
