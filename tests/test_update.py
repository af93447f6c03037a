"""The proof that the update is right: the real worker against DPO written once more in plain PyTorch.

The plain version knows nothing of the recipe, of verl or of FSDP: one process, one forward pass per sequence, no
padding, its own losses, gradient clipping and optimizer loop. Both train for five steps on the same pairs; the
reference is frozen but for a refresh from the policy at step 3. Parameters, losses and gradient norms (before clipping,
which would hide a wrong scale) must agree.
"""

import copy
import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from as_on_gpus import fsdp_on_one_rank, segments_on_a_cpu
from plain_model import EPS, LEARNING_RATE, REFRESH_AT, WEIGHT_DECAY, load_model, response_entropy, response_logp
from ulysses_on_gloo import ulysses_on_gloo
from worker_harness import Ranks
from worker_jobs import (
    MAX_PROMPT,
    MAX_RESPONSE,
    PROMPTS,
    STEPS,
    make_batches,
    run_within,
    train,
    train_over_a_bad_step,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BETA = 0.3


# ---- Plain PyTorch ---------------------------------------------------------------------------------------------------
def plain_losses(h, chosen_logps, chosen_lengths, weights, kind):
    """Loss of each pair; h (P,) is the difference of the pairs' log-ratios."""
    sigmoid = torch.log1p(torch.exp(-BETA * h))
    if kind == "sigmoid":
        return sigmoid
    if kind == "ipo":
        return (h - 1 / (2 * BETA)) ** 2
    if kind == "hinge":
        return torch.clamp(1 - BETA * h, min=0)
    assert kind == "sigmoid+sft"
    mean_length = (weights * chosen_lengths).sum() / weights.sum()
    return 1.0 * sigmoid + 0.2 * -chosen_logps / mean_length


def plain_aot(chosen, rejected, ref_chosen, ref_rejected, kind):
    """Losses between the k-th smallest of two quantities each: of all pairs of the mini-batch at once."""
    if kind == "aot":
        upper, lower = chosen - rejected, ref_chosen - ref_rejected
    else:
        upper, lower = chosen - ref_chosen, rejected - ref_rejected
    return torch.log1p(torch.exp(-BETA * (torch.sort(upper).values - torch.sort(lower).values)))


@cache
def plain_training(
    folder: str,
    n: int,
    longest_prompt: int,
    kind: str,
    temperature: float,
    clip: float,
    prompts_per_step: int,
    epochs: int,
):
    policy = load_model(folder)
    initial = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, eps=EPS, weight_decay=WEIGHT_DECAY)
    steps = []
    for step, batch in enumerate(make_batches(n, longest_prompt), start=1):
        if step == REFRESH_AT:
            reference.load_state_dict(policy.state_dict())

        def logps(model, rows, batch=batch):
            return torch.stack(
                [
                    response_logp(model, batch.prompts[row], batch.responses[row], batch.masks[row], temperature)
                    for row in rows
                ]
            )

        with torch.no_grad():
            ref_logps = logps(reference, range(len(batch.prompts)))
        mini_batches: dict[int, list[int]] = {}
        for pair, row in enumerate(batch.chosen):
            mini_batches.setdefault(row // n // prompts_per_step, []).append(pair)
        for members in [mini_batches[key] for key in sorted(mini_batches)] * epochs:
            chosen_rows, rejected_rows = [batch.chosen[i] for i in members], [batch.rejected[i] for i in members]
            chosen, rejected = logps(policy, chosen_rows), logps(policy, rejected_rows)
            ref_chosen, ref_rejected = ref_logps[chosen_rows], ref_logps[rejected_rows]
            lengths = torch.tensor([float(sum(batch.masks[row])) for row in chosen_rows])
            weights = torch.tensor([batch.weights[i] for i in members])
            rewards_chosen, rewards_rejected = BETA * (chosen - ref_chosen), BETA * (rejected - ref_rejected)
            if kind in ("aot", "aot_unpaired"):
                losses = plain_aot(chosen, rejected, ref_chosen, ref_rejected, kind)
            else:
                h = (chosen - rejected) - (ref_chosen - ref_rejected)
                losses = plain_losses(h, chosen, lengths, weights, kind)
            loss = (weights * losses).sum() / weights.sum()

            entropies = [
                response_entropy(policy, batch.prompts[row], batch.responses[row], batch.masks[row], temperature)
                for row in chosen_rows + rejected_rows
            ]
            chosen_entropy, rejected_entropy = torch.stack(entropies).view(2, -1)

            optimizer.zero_grad()
            loss.backward()
            norm = torch.sqrt(sum((p.grad**2).sum() for p in policy.parameters()))
            if norm > clip:
                for parameter in policy.parameters():
                    parameter.grad *= clip / norm
            optimizer.step()

            def mean(values, weights=weights):
                return ((weights * values).sum() / weights.sum()).item()

            steps.append(
                {
                    "loss": loss.item(),
                    "grad_norm": norm.item(),
                    "rewards/margins": mean(rewards_chosen - rewards_rejected),
                    "rewards/accuracies": mean((rewards_chosen > rewards_rejected).float()),
                    "logps/chosen": mean(chosen),
                    "logps/rejected": mean(rejected),
                    "undecided": mean(((rewards_chosen - rewards_rejected).abs() < 1e-4).float()),
                    "kl/sequence": mean((chosen - ref_chosen + rejected - ref_rejected) / 2),
                    "response_length/chosen": mean(lengths),
                    "entropy": mean((chosen_entropy + rejected_entropy) / 2),
                }
            )
    return {"initial": initial, "parameters": policy.state_dict(), "steps": steps}


COMPARED = [
    "loss",
    "grad_norm",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "kl/sequence",
    "response_length/chosen",
    "entropy",
]


# ---- Configurations --------------------------------------------------------------------------------------------------
LOSSES = {
    "sigmoid": [],
    "ipo": ["algorithm.dpo_loss_type=ipo"],
    "hinge": ["algorithm.dpo_loss_type=hinge"],
    "sigmoid+sft": ["algorithm.dpo_loss_type=[sigmoid,sft]", "algorithm.dpo_loss_weights=[1.0,0.2]"],
    "aot": ["algorithm.dpo_loss_type=aot"],
    "aot_unpaired": ["algorithm.dpo_loss_type=aot_unpaired"],
}


@dataclass(frozen=True)
class Case:
    name: str
    world_size: int = 1
    model: str = "llama"
    strategy: str = "fsdp2"
    micro_batch: int | None = None  # prompts; None cuts by tokens
    tokens: int = 64  # of a micro-batch, where prompts are not counted; the largest row has 28
    share_prompt: bool = True
    remove_padding: bool = True  # where prompts are not shared
    reference_passes: bool = False  # also where the reference equals the actor
    prompts_per_step: int = PROMPTS
    epochs: int = 1
    temperature: float = 1.0
    loss: str = "sigmoid"
    n: int = 2
    longest_prompt: int = MAX_PROMPT
    clip: float = 1.0
    ranks_per_sequence: int = 1  # Ulysses
    by_segment: bool = False  # attention as on GPUs
    wrapped: bool = False  # one rank goes through FSDP, as on a GPU

    def contexts(self) -> list:
        """What stands for a GPU in the ranks."""
        stand_ins = {
            ulysses_on_gloo: self.ranks_per_sequence > 1,
            segments_on_a_cpu: self.by_segment,
            fsdp_on_one_rank: self.wrapped,
        }
        return [context for context, needed in stand_ins.items() if needed]

    def all_overrides(self, folder: str) -> list[str]:
        actor = "actor_rollout_ref.actor"
        return [
            f"actor_rollout_ref.model.path={folder}",
            f"actor_rollout_ref.share_prompt={self.share_prompt}",
            f"actor_rollout_ref.model.use_remove_padding={self.remove_padding}",
            f"actor_rollout_ref.rollout.temperature={self.temperature}",
            f"actor_rollout_ref.rollout.n={self.n}",
            f"actor_rollout_ref.ref.log_prob_max_token_len_per_gpu={self.tokens}",
            f"{actor}.strategy={self.strategy}",
            f"{actor}.use_dynamic_bsz={self.micro_batch is None}",
            f"{actor}.ppo_max_token_len_per_gpu={self.tokens}",
            f"{actor}.ppo_micro_batch_size_per_gpu={self.micro_batch or 8}",
            f"{actor}.ppo_mini_batch_size={self.prompts_per_step}",
            f"{actor}.ppo_epochs={self.epochs}",
            f"{actor}.ulysses_sequence_parallel_size={self.ranks_per_sequence}",
            f"{actor}.calculate_entropy=True",
            f"{actor}.optim.lr={LEARNING_RATE}",
            f"{actor}.optim.weight_decay={WEIGHT_DECAY}",
            f"{actor}.optim.clip_grad={self.clip}",
            f"{actor}.optim.override_optimizer_config={{eps:{EPS}}}",
            f"data.train_batch_size={PROMPTS}",
            f"data.max_prompt_length={self.longest_prompt}",
            f"data.max_response_length={MAX_RESPONSE}",
            f"algorithm.dpo_beta={BETA}",
            f"trainer.ref_update_freq={REFRESH_AT}",
            *LOSSES[self.loss],
        ]


TWO = {"world_size": 2}
SEPARATE = {"share_prompt": False}
CASES = [
    Case("llama"),
    Case("one-rank-as-on-a-gpu", wrapped=True, by_segment=True, longest_prompt=24),
    Case("llama-2-ranks", **TWO),
    Case("llama-2-ranks-fsdp1", **TWO, strategy="fsdp"),
    Case("qwen2", model="qwen2"),
    Case("qwen2-2-ranks", **TWO, model="qwen2"),
    Case("qwen2-2-ranks-fsdp1", **TWO, model="qwen2", strategy="fsdp"),
    Case("micro-batches-of-1", micro_batch=1),
    Case("micro-batches-of-2-fsdp1", micro_batch=2, wrapped=True, strategy="fsdp"),
    Case("micro-batches-of-2-on-2-ranks", **TWO, micro_batch=2),
    Case("one-micro-batch", micro_batch=PROMPTS),
    Case("few-tokens", tokens=28),
    Case("few-tokens-on-2-ranks-fsdp1", **TWO, tokens=28, strategy="fsdp"),
    Case("many-tokens", tokens=1000),
    Case("separate", **SEPARATE),
    Case("separate-2-ranks", **TWO, **SEPARATE, strategy="fsdp", micro_batch=2),
    Case("padded", **SEPARATE, remove_padding=False),
    Case("padded-2-ranks", **TWO, **SEPARATE, remove_padding=False, model="qwen2", micro_batch=2),
    Case("reference-passes", reference_passes=True),
    Case("reference-passes-2-ranks-mini-batches", **TWO, reference_passes=True, prompts_per_step=3),
    Case("mini-batches", prompts_per_step=3),
    Case("mini-batches-and-epochs-on-2-ranks", **TWO, prompts_per_step=3, epochs=2),
    Case("unclipped", clip=1000.0),
    Case("temperature", temperature=0.7),
    Case("temperature-padded-2-ranks-fsdp1", **TWO, **SEPARATE, temperature=0.7, remove_padding=False, strategy="fsdp"),
    Case("all-pairs-weighted", n=3, prompts_per_step=3),
    Case("all-pairs-weighted-2-ranks", **TWO, n=3, prompts_per_step=3, micro_batch=2),
    Case("all-pairs-of-8-responses", n=8, tokens=300),
    Case("all-pairs-of-8-responses-separate-2-ranks", **TWO, **SEPARATE, n=8, tokens=300),
    Case("sliding-windows", model="windows"),
    Case("sliding-windows-by-segment-2-ranks", **TWO, model="windows", micro_batch=2, by_segment=True),
    Case("sliding-windows-separate", **SEPARATE, model="windows"),
    Case("ipo", loss="ipo"),
    Case("hinge-2-ranks", **TWO, loss="hinge"),
    Case("sigmoid+sft-2-ranks", **TWO, loss="sigmoid+sft"),
    Case("sigmoid+sft-all-pairs", loss="sigmoid+sft", n=3, prompts_per_step=3),
    Case("aot-mini-batches", loss="aot", micro_batch=2, prompts_per_step=3, epochs=2),
    Case("aot-2-ranks-mini-batches", **TWO, loss="aot", tokens=28, prompts_per_step=3, epochs=2),
    Case("aot-unpaired-2-ranks", **TWO, loss="aot_unpaired", tokens=28),
    Case("ulysses", **TWO, ranks_per_sequence=2),
    Case("ulysses-fsdp1", **TWO, ranks_per_sequence=2, strategy="fsdp", model="qwen2", micro_batch=2),
    Case("ulysses-by-segment", **TWO, ranks_per_sequence=2, by_segment=True, tokens=18, prompts_per_step=3, epochs=2),
    Case("ulysses-separate", **TWO, **SEPARATE, ranks_per_sequence=2),
]


def gap(ours, theirs) -> float:
    """Relative difference of two tensors by their norms."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def check_against_plain_pytorch(case: Case, folder: str, ranks: Ranks, contexts: list, overrides: list[str]) -> None:
    """Trains a model's folder on ranks within contexts, with settings besides the case's own."""
    data = (case.n, case.longest_prompt)
    plain = plain_training(folder, *data, case.loss, case.temperature, case.clip, case.prompts_per_step, case.epochs)
    job = (contexts, train, [*case.all_overrides(folder), *overrides], make_batches(*data), case.reference_passes)
    outputs = ranks.run(run_within, *job)
    for worker in outputs:
        # Optimizer steps: one list of values a metric and call of update_actor
        steps = [
            dict(zip(update, values, strict=True))
            for update in ({name: update[name] for name in COMPARED} for update in worker["steps"])
            for values in zip(*update.values(), strict=True)
        ]
        assert len(steps) == len(plain["steps"]) == STEPS * case.epochs * PROMPTS // case.prompts_per_step
        gaps = {
            name: max(
                abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1)
                # where policy and reference are equal, rounding decides whose reward is larger
                - (theirs["undecided"] if name == "rewards/accuracies" else 0)
                for ours, theirs in zip(steps, plain["steps"], strict=True)
            )
            for name in COMPARED
        }
        end, start = plain["parameters"], plain["initial"]
        ours = {name: torch.from_numpy(array) for name, array in worker["parameters"].items()}
        assert ours.keys() == end.keys()
        gaps["parameters"] = max(gap(ours[name], end[name]) for name in ours)
        gaps["change"] = max(gap(ours[name] - start[name], end[name] - start[name]) for name in ours)
        print(case.name, {name: f"{value:.1e}" for name, value in gaps.items()})  # shown by pytest -rP
        assert gaps["parameters"] < 2e-6
        assert gaps["change"] < 1e-4
        assert max(gaps[name] for name in COMPARED) < 5e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_worker_trains_like_plain_pytorch(case, tiny_models, ranks):
    check_against_plain_pytorch(case, tiny_models[case.model], ranks[case.world_size], case.contexts(), [])


@pytest.mark.parametrize("world_size", [1, 2])
def test_prompts_that_are_computed_once_train_as_those_that_are_copied(world_size, tiny_models, ranks):
    """Prompts of 1 to 24 tokens."""
    found = []
    for share_prompt in (True, False):
        case = Case("", world_size, share_prompt=share_prompt, longest_prompt=24)
        batches = make_batches(longest_prompt=case.longest_prompt)
        found.append(ranks[world_size].run(train, case.all_overrides(tiny_models[case.model]), batches)[0])
    shared, copied = found
    for ours, theirs in zip(shared["steps"], copied["steps"], strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    pairs = (
        (torch.from_numpy(shared["parameters"][name]), torch.from_numpy(copied["parameters"][name]))
        for name in shared["parameters"]
    )
    assert max(gap(one, other) for one, other in pairs) < 1e-5


@pytest.mark.parametrize(
    ("case", "bad"),
    [
        (Case("1-rank"), math.nan),
        (Case("2-ranks", **TWO), math.inf),  # in the rows of one of them
        (Case("2-ranks-fsdp1", **TWO, strategy="fsdp"), math.nan),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_optimizer_step_whose_loss_is_not_finite_is_skipped(case, bad, tiny_models, ranks):
    """Nothing changes in it, and it is counted; the next one starts from the weights and the optimizer before it."""
    first, skipped, third, *_ = make_batches()
    overrides = case.all_overrides(tiny_models[case.model])
    outputs = ranks[case.world_size].run(train_over_a_bad_step, overrides, [first, skipped, third], bad)
    others = ranks[case.world_size].run(train_over_a_bad_step, overrides, [first, third], None)
    for worker, without in zip(outputs, others, strict=True):
        before, after, end = ({n: torch.from_numpy(a) for n, a in p.items()} for p in worker["parameters"])
        expected = {name: torch.from_numpy(array) for name, array in without["parameters"][-1].items()}
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(after[name], end[name]) for name in after)
        assert all(torch.equal(end[name], expected[name]) for name in end)
        assert [step["actor/skipped_steps"] for step in worker["metrics"]] == [0, 1, 0]
        assert "actor/loss" not in worker["metrics"][1]
        assert math.isfinite(worker["metrics"][2]["actor/grad_norm"])


def test_plain_version_exercises_what_it_should(tiny_models):
    """The comparison means something: parameters move, gradients are clipped, margins grow, the refresh resets them."""
    plain = plain_training(tiny_models["llama"], 2, MAX_PROMPT, "sigmoid", 1.0, 1.0, PROMPTS, 1)
    moved = [gap(plain["parameters"][name], start) for name, start in plain["initial"].items()]
    assert min(moved) > 1e-3
    assert all(step["grad_norm"] > 1 for step in plain["steps"])
    losses = [step["loss"] for step in plain["steps"]]
    untrained = math.log(2)  # policy = reference, h = 0
    assert losses[0] == losses[REFRESH_AT - 1] == pytest.approx(untrained)
    assert max(losses[1], losses[3], losses[4]) < untrained - 0.02
    lengths = {len(response) for batch in make_batches() for response in batch.responses}
    assert {0, MAX_RESPONSE} < lengths


@pytest.mark.parametrize(("loss", "prompts_per_step", "epochs"), [("aot", 3, 2), ("aot_unpaired", PROMPTS, 1)])
def test_sorting_makes_a_difference_in_these_batches(tiny_models, loss, prompts_per_step, epochs):
    sorted_, paired = (
        plain_training(tiny_models["llama"], 2, MAX_PROMPT, kind, 1.0, 1.0, prompts_per_step, epochs)["steps"]
        for kind in (loss, "sigmoid")
    )
    assert max(abs(one["loss"] - other["loss"]) for one, other in zip(sorted_, paired, strict=True)) > 5e-3
