"""SPIN as published (arXiv 2401.01335): the data set's response is chosen, the opponent's own generation rejected.

The opponent is the reference: an iteration is `trainer.ref_update_freq` steps against the model that ended the one
before. vLLM plays the opponent, so its weights change when the reference is refreshed, not after every step.
"""

from functools import cached_property

import torch
from tensordict import TensorDict

from recipe.spin.core_algos import compute_self_play_pref, sequence_logps
from recipe.spin.engine.rows import nest, pad_rows
from recipe.spin.preferences.source import Pairing, PreferenceSource

RESPONSE = "spin's response"  # a text that no template holds


class SelfPlaySource(PreferenceSource):
    """Pairs the data's response with the opponent's; vLLM is the opponent."""

    fields = ("reward_model",)  # holds the data's response
    rollout_model = "reference"

    def pair(self, responses: TensorDict, rewards: torch.Tensor, mask: torch.Tensor, step: int) -> Pairing:
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
        return Pairing(TensorDict(both, batch_size=count + len(answers)), pairs, prompt_of)

    def held_out_metrics(self, batches, logps) -> dict[str, float]:
        """Mean log-prob of the held-out data's responses under the actor, per response and per token."""
        prompts, answers = [], []
        for batch in batches:
            for messages, row in zip(batch["raw_prompt"], batch["reward_model"], strict=True):
                prompts.append(torch.tensor(self.prompt_tokens(list(messages))))
                answers.append(self._response_tokens(row["ground_truth"]))
        found = logps(prompts, answers)
        return {
            "val-likelihood/response": found.mean().item(),
            "val-likelihood/token": found.sum().item() / sum(map(len, answers)),
        }

    def _response_tokens(self, text: str) -> torch.Tensor:
        """The tokens with which the model would have given this response, its end included, up to the limit."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False) + [self._end_token]
        return torch.tensor(tokens[: self.config.data.max_response_length])

    @cached_property
    def _end_token(self) -> int:
        """With which a response ends: what the chat template puts behind one, if generation stops there.

        The opponent ends with that token too. With another one in the data's responses, as the tokenizer's end of a
        text is with some models, DPO would learn the token.
        """
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": RESPONSE}]
        options = self.config.data.apply_chat_template_kwargs
        behind = self.tokenizer.apply_chat_template(turn, tokenize=False, **options).rpartition(RESPONSE)[2]
        tokens = self.tokenizer.encode(behind, add_special_tokens=False)
        return next((token for token in tokens if token in self.end_tokens), self.tokenizer.eos_token_id)
