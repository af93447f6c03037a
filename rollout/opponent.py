"""Whose weights vLLM has: the actor's, or with a source that says so the reference's, its opponent or its judge."""

from recipe.spin.preferences.source import PreferenceSource, Score


class OpponentInVLLM:
    """What differs from verl's trainer where vLLM plays the reference, to be put before it among a trainer's bases."""

    source: PreferenceSource

    def on_init_end(self):
        if self.source.rollout_model != "actor":
            self.actor_rollout_wg.choose_rollout_model(self.source.rollout_model)
        super().on_init_end()

    def on_step_end(self):
        """An opponent stays until the next refresh; only where vLLM gave its memory back it must be sent again."""
        if self.source.rollout_model == "actor" or self.config.actor_rollout_ref.rollout.free_cache_engine:
            super().on_step_end()

    def _validate(self) -> dict[str, float]:
        """The actor answers the held-out prompts, whoever answers the others; then come the source's own metrics.

        For these the actor computes, as in training while vLLM sleeps where it gets other weights afterwards anyway:
        memory.py reckons with no device that holds both at work.
        """
        others = self.source.rollout_model != "actor"
        if others:
            self._push_weights("actor")
        metrics = super()._validate()
        if others:
            self.checkpoint_manager.sleep_replicas()
        metrics |= self.source.held_out_metrics(self.val_dataloader, self.dpo.actor_logps)
        if others:
            self._send_weights(self.source.rollout_model)
        return metrics

    def _ask_reference(self, uids: list[str]) -> list[Score]:
        """The source's scores of all responses to these prompts, vLLM with the reference's weights.

        It gave its memory back when the last response was there. The actor's weights return with the push that ends
        every step.
        """
        self._send_weights("reference")
        scores = self.agent_loop_manager.score_groups()
        self.checkpoint_manager.sleep_replicas()
        self.actor_rollout_wg.choose_rollout_model("actor")
        return [score for uid in uids for score in scores[uid]]

    def _push_weights(self, model: str) -> None:
        """Sends a model's weights to vLLM, which has others."""
        self.checkpoint_manager.sleep_replicas()
        self._send_weights(model)

    def _send_weights(self, model: str) -> None:
        """The same to vLLM that sleeps."""
        self.actor_rollout_wg.choose_rollout_model(model)
        self.checkpoint_manager.update_weights(self.global_steps)
