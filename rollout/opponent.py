"""Whose weights vLLM has: the actor's, or with a source that says so the reference's, its opponent or its judge."""

from recipe.spin.preferences.source import RewardSource, Score


class OpponentInVLLM:
    """What differs from verl's trainer where vLLM plays the reference, to be put before it among a trainer's bases."""

    source: RewardSource

    def on_init_end(self):
        if self.source.rollout_model != "actor":
            self.actor_rollout_wg.choose_rollout_model(self.source.rollout_model)
        super().on_init_end()

    def on_step_end(self):
        """An opponent stays until the next refresh; only where vLLM gave its memory back it must be sent again."""
        if self.source.rollout_model == "actor" or self.config.actor_rollout_ref.rollout.free_cache_engine:
            super().on_step_end()

    def _validate(self) -> dict[str, float]:
        """The actor answers the held-out prompts, whoever answers the others."""
        if self.source.rollout_model == "actor":
            return super()._validate()
        self._push_weights("actor")
        metrics = super()._validate()
        self._push_weights(self.source.rollout_model)
        return metrics

    def _ask_reference(self, uids: list[str]) -> list[Score]:
        """The source's scores of all responses to these prompts, vLLM with the reference's weights.

        It gave its memory back when the last response was there. The actor's weights return with the push that ends
        every step.
        """
        self.actor_rollout_wg.choose_rollout_model("reference")
        self.checkpoint_manager.update_weights(self.global_steps)
        scores = self.agent_loop_manager.score_groups()
        self.checkpoint_manager.sleep_replicas()
        self.actor_rollout_wg.choose_rollout_model("actor")
        return [score for uid in uids for score in scores[uid]]

    def _push_weights(self, model: str) -> None:
        self.actor_rollout_wg.choose_rollout_model(model)
        self.checkpoint_manager.sleep_replicas()
        self.checkpoint_manager.update_weights(self.global_steps)
