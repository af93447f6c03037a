"""Whose weights vLLM has when, and when it sleeps: the order of a validation's calls."""

import types

import pytest

from recipe.spin.preferences.source import PreferenceSource
from recipe.spin.rollout.opponent import OpponentInVLLM


class Verl:
    """verl's trainer as far as a validation goes: vLLM answers, which it does awake and with the actor's weights."""

    def _validate(self) -> dict[str, float]:
        self.calls.append("answer")
        return {"val-core/sums": 0.5}


class Trainer(OpponentInVLLM, Verl):
    def __init__(self, source: PreferenceSource):
        self.source, self.global_steps, self.val_dataloader, self.calls = source, 7, ["a batch"], []
        note = self.calls.append
        self.actor_rollout_wg = types.SimpleNamespace(choose_rollout_model=note)
        self.dpo = types.SimpleNamespace(actor_logps=self._actor_logps)
        self.checkpoint_manager = types.SimpleNamespace(
            sleep_replicas=lambda: note("sleep"), update_weights=lambda step: note(f"send {step}")
        )

    def _actor_logps(self, prompts, responses):
        self.calls.append("compute")
        return [-1.0]


class Measuring(PreferenceSource):
    def held_out_metrics(self, batches, logps) -> dict[str, float]:
        assert batches == ["a batch"]
        return {"val-likelihood/response": sum(logps([], []))}


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (
            "reference",
            ["sleep", "actor", "send 7", "answer", "sleep", "compute", "reference", "send 7"],
        ),
        ("actor", ["answer", "compute"]),
    ],
)
def test_the_actor_computes_held_out_metrics_while_an_opponents_vllm_sleeps(model, calls):
    """And vLLM is told to sleep once, not twice, before it gets weights."""
    trainer = Trainer(Measuring(None, None))
    trainer.source.rollout_model = model
    assert trainer._validate() == {"val-core/sums": 0.5, "val-likelihood/response": -1.0}
    assert trainer.calls == calls
