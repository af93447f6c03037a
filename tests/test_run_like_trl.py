"""A run like TRL's: one model, the same prompts, sampled responses and scores for its OnlineDPOTrainer and our worker.

TRL's trainer trains for real, with its own forward, preferences, loss and optimizer; only what vLLM and a reward
function would give, responses and scores, is handed to it.
"""

import os

import pytest
import torch
from plain_model import EPS, LEARNING_RATE, load_model
from worker_harness import Ranks
from worker_jobs import MAX_PROMPT, MAX_RESPONSE, Scored, make_scored, train_on_scores

pytestmark = pytest.mark.slow
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0")

from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer  # noqa: E402

BETA = 0.3
COMPARED = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
COMPARED += ["logps/chosen", "logps/rejected"]


class FedTrainer(OnlineDPOTrainer):
    """TRL's trainer with prepared responses and scores in place of generation and reward functions."""

    fed: list[Scored]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen: list[dict] = []

    def _rows(self, values: list) -> list:
        """TRL's order: the first response to each prompt, then the second."""
        return values[0::2] + values[1::2]

    def _padded(self, rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        pad = self._tokenizer.pad_token_id
        ids = [torch.tensor(row) for row in rows]
        ones = [torch.ones_like(row) for row in ids]
        both = [torch.nn.utils.rnn.pad_sequence(x, True, v, side) for x, v in ((ids, pad), (ones, 0))]
        return both[0], both[1]

    def _generate(self, model, prompts, images=None):
        step = self.fed[self.state.global_step]
        return (
            *self._padded(self._rows(step.prompts), "left"),
            *self._padded(self._rows(step.responses), "right"),
            None,
        )

    def _calculate_rewards_from_functions(self, **kwargs):
        return torch.tensor(self._rows(self.fed[self.state.global_step].scores))

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen.append({"loss": loss.item()} | {name: self.stats[name][-1] for name in COMPARED[1:]})
        return loss


def trl_steps(folder: str, output: str, loss_type: str, fed: list[Scored]) -> list[dict]:
    from datasets import Dataset
    from transformers import AutoTokenizer

    prompts = len(fed[0].prompts) // 2
    config = OnlineDPOConfig(
        output_dir=output,
        per_device_train_batch_size=prompts,
        max_steps=len(fed),
        max_new_tokens=MAX_RESPONSE,
        max_length=MAX_PROMPT + MAX_RESPONSE,
        beta=BETA,
        loss_type=loss_type,
        learning_rate=LEARNING_RATE,
        adam_epsilon=EPS,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    FedTrainer.fed = fed
    trainer = FedTrainer(
        model=load_model(folder),
        ref_model=load_model(folder),
        reward_funcs=lambda **kwargs: [],
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": "unused"}] * prompts * len(fed)),
    )
    trainer.train()
    return trainer.seen


def our_steps(ranks: Ranks, folder: str, loss_type: str, fed: list[Scored], share_prompt: bool) -> list[dict]:
    actor = "actor_rollout_ref.actor"
    overrides = [
        f"actor_rollout_ref.model.path={folder}",
        "actor_rollout_ref.rollout.n=2",
        f"actor_rollout_ref.share_prompt={share_prompt}",
        f"{actor}.ppo_max_token_len_per_gpu=64",
        f"{actor}.optim.lr={LEARNING_RATE}",
        f"{actor}.optim.override_optimizer_config={{eps:{EPS}}}",
        f"data.train_batch_size={len(fed[0].prompts) // 2}",
        f"data.max_prompt_length={MAX_PROMPT}",
        f"data.max_response_length={MAX_RESPONSE}",
        f"algorithm.dpo_beta={BETA}",
        f"algorithm.dpo_loss_type={loss_type}",
        "trainer.ref_update_freq=0",
    ]
    return [{name: step[name][0] for name in COMPARED} for step in ranks.run(train_on_scores, overrides, fed)[0]]


@pytest.mark.parametrize(
    ("loss_type", "world_size", "share_prompt"), [("sigmoid", 1, True), ("sigmoid", 2, False), ("ipo", 1, False)]
)
def test_losses_and_rewards_are_trls_at_every_step(ranks, tiny_models, tmp_path, loss_type, world_size, share_prompt):
    fed = make_scored()
    theirs = trl_steps(tiny_models["llama"], str(tmp_path), loss_type, fed)
    ours = our_steps(ranks[world_size], tiny_models["llama"], loss_type, fed, share_prompt)
    assert len(ours) == len(theirs) == len(fed)
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        for name in COMPARED:
            if step == 1 and name == "rewards/accuracies":
                continue  # policy and reference are equal: the margins are rounding
            assert our[name] == pytest.approx(their[name], rel=1e-4, abs=1e-5), (step, name)
    # the steps moved the policy, so the equality above is not that of two untrained models
    assert abs(theirs[-1]["rewards/margins"]) > 0.05
