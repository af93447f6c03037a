"""SPIN as published (arXiv 2401.01335): the data set's response is chosen, the opponent's own generation rejected.

The opponent is the reference: an iteration is `trainer.ref_update_freq` steps against the model that ended the one
before. vLLM plays the opponent, so its weights change when the reference is refreshed, not after every step.
"""

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from recipe.spin.core_algos import PreferencePairs, compute_self_play_pref, sequence_logps
from recipe.spin.engine.rows import make_rows, nest, pad_rows
from recipe.spin.spin_trainer import SpinTrainer


class SelfPlayTrainer(SpinTrainer):
    """SpinTrainer whose pairs are the data's response against the opponent's, with vLLM as the opponent."""

    preference_fields = ("reward_model",)  # holds the data's response

    # ------------------------------------------------------------------ the opponent in vLLM

    def on_init_end(self):
        self.actor_rollout_wg.choose_rollout_model("reference")
        super().on_init_end()

    def _refresh_reference(self):
        super()._refresh_reference()
        self._push_weights()

    def on_step_end(self):
        """The opponent stays until the next refresh; only where vLLM gave its memory back it must be sent again."""
        if self.config.actor_rollout_ref.rollout.free_cache_engine:
            super().on_step_end()

    def _push_weights(self, model: str = "reference") -> None:
        self.actor_rollout_wg.choose_rollout_model(model)
        self.checkpoint_manager.sleep_replicas()
        self.checkpoint_manager.update_weights(self.global_steps)

    def _validate(self) -> dict[str, float]:
        """The actor, not its opponent, answers the held-out prompts; adds how likely it finds the data's answers."""
        self._push_weights("actor")
        metrics = super()._validate()
        self._push_weights()
        return metrics | self._held_out_likelihood()

    # ------------------------------------------------------------------ pairs

    def _pairs(self, responses: TensorDict, rewards, mask) -> tuple[TensorDict, PreferencePairs, torch.Tensor]:
        """Puts the data's response to each prompt behind the opponent's, and pairs them."""
        n = self.config.actor_rollout_ref.rollout.n
        texts = [row["ground_truth"] for row in responses.pop("reward_model").tolist()[::n]]
        token_logps = pad_rows(responses.pop("rollout_log_probs"))
        opponent_logps = sequence_logps(token_logps, mask, average=self.config.algorithm.dpo_average_log_prob)
        answers = [self._response_tokens(text) for text in texts]
        generated = responses["responses"].unbind()
        differs = [not torch.equal(row, answers[i // n]) for i, row in enumerate(generated)]
        real = {
            "prompts": responses["prompts"].unbind()[::n],
            "responses": answers,
            "response_mask": [torch.ones_like(answer) for answer in answers],
        }
        both = {name: nest([*responses[name].unbind(), *rows]) for name, rows in real.items()}
        both["opponent_logps"] = torch.cat([opponent_logps, torch.full((len(answers),), torch.nan)])
        count = len(generated)
        prompt_of = torch.cat([torch.arange(count) // n, torch.arange(len(answers))])
        pairs = compute_self_play_pref(torch.tensor(differs), n)
        return TensorDict(both, batch_size=count + len(answers)), pairs, prompt_of

    def _response_tokens(self, text: str) -> torch.Tensor:
        """The tokens with which the model would have given this response, its end included, up to the limit."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False) + [self.tokenizer.eos_token_id]
        return torch.tensor(tokens[: self.config.data.max_response_length])

    def _held_out_likelihood(self) -> dict[str, float]:
        """Mean log-prob of the held-out data's responses under the actor, per response and per token."""
        prompts, answers = [], []
        for batch in self.val_dataloader:
            for messages, row in zip(batch["raw_prompt"], batch["reward_model"], strict=True):
                prompts.append(self._prompt_tokens(list(messages)))
                answers.append(self._response_tokens(row["ground_truth"]))
        held_out = len(prompts)
        padding = -held_out % self._dp_size
        answers_to = [[answer] for answer in answers + answers[:1] * padding]
        rows = make_rows(prompts + prompts[:1] * padding, answers_to)
        tu.assign_non_tensor_data(rows, "temperature", 1.0)
        tu.assign_non_tensor(rows, average_log_prob=False)
        logps = self.actor_rollout_wg.compute_actor_logps(rows)["logps"].values()[:held_out]
        tokens = sum(map(len, answers))
        return {
            "val-likelihood/response": logps.mean().item(),
            "val-likelihood/token": logps.sum().item() / tokens,
        }

    def _prompt_tokens(self, messages: list[dict]) -> torch.Tensor:
        options = self.config.data.get("apply_chat_template_kwargs") or {}
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False))
