"""The losses that look at more than log-probs of responses, on the real worker, against plain PyTorch.

As test_update does it: five steps on the same pairs, a refresh of the reference at step 3, and parameters, losses and
gradient norms compared. The losses are written once more here, from the papers, pair by pair and token by token.
"""

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from plain_model import EPS, LEARNING_RATE, REFRESH_AT, WEIGHT_DECAY, load_model, response_tokens
from worker_jobs import MAX_PROMPT, MAX_RESPONSE, PROMPTS, make_batches, train, train_with_ulysses

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BETA, ALPHA, GAMMA, LAMBDA, PENALTY, TAU = 0.3, 0.4, 0.7, 5.0, 0.05, 0.3


# ---- Plain PyTorch ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Player:
    """A pair's responses under one model: log-probs of their tokens, and what drawn tokens would have on average."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_expected: torch.Tensor
    rejected_expected: torch.Tensor


def log_loss(x):
    return torch.log1p(torch.exp(-x))


def dpo(policy, reference, alpha=1.0):
    """beta h, tokens beyond the shorter response counted alpha."""
    shared = min(len(policy.chosen), len(policy.rejected))

    def logp(tokens):
        return tokens[:shared].sum() + alpha * tokens[shared:].sum()

    chosen, rejected = logp(policy.chosen) - logp(reference.chosen), logp(policy.rejected) - logp(reference.rejected)
    return BETA * (chosen - rejected)


def simpo(policy, reference):
    chosen, rejected = (tokens.sum() / max(len(tokens), 1) for tokens in (policy.chosen, policy.rejected))
    return log_loss(BETA * (chosen - rejected) - GAMMA)


def dpop(policy, reference):
    lost = (reference.chosen.sum() - policy.chosen.sum()).relu()
    return log_loss(dpo(policy, reference) - BETA * LAMBDA * lost)


def length_penalty(policy, reference):
    return log_loss(dpo(policy, reference) + PENALTY * (len(policy.chosen) - len(policy.rejected)))


def discopop(policy, reference):
    lead = dpo(policy, reference)
    share = torch.sigmoid(lead / TAU)
    return (1 - share) * log_loss(lead) + share * torch.exp(-lead)


def length_desensitized(policy, reference):
    return log_loss(dpo(policy, reference, ALPHA))


def weighted(policy, reference):
    def weight(tokens, expected):
        return (tokens.detach() - expected.log()).sum().div(max(len(tokens), 1)).exp()

    chosen = weight(policy.chosen, policy.chosen_expected)
    return chosen * weight(policy.rejected, policy.rejected_expected) * log_loss(dpo(policy, reference))


def forward_kl(policy, reference):
    ratios = [
        (theirs.sum() - ours.sum()).exp()
        for ours, theirs in ((policy.chosen, reference.chosen), (policy.rejected, reference.rejected))
    ]
    return log_loss(BETA * (ratios[1] - ratios[0]))


LOSSES = {  # the plain loss of a pair, and the recipe's settings
    "simpo": (simpo, ["dpo_loss_type=simpo", f"dpo_simpo_gamma={GAMMA}"]),
    "dpop": (dpop, ["dpo_loss_type=dpop", f"dpo_dpop_lambda={LAMBDA}"]),
    "DiscoPOP": (discopop, ["dpo_loss_type=discopop", f"dpo_discopop_tau={TAU}"]),
    "R-DPO": (length_penalty, [f"dpo_length_penalty={PENALTY}"]),
    "LD-DPO": (length_desensitized, [f"dpo_ld_alpha={ALPHA}"]),
    "WPO": (weighted, ["dpo_use_weighting=True"]),
    "forward KL": (forward_kl, ["dpo_f_divergence_type=forward_kl"]),
}
COMPARED = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "kl/sequence")


@cache
def plain_training(folder: str, n: int, kind: str, prompts_per_step: int):
    equation, _ = LOSSES[kind]
    policy = load_model(folder)
    initial = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, eps=EPS, weight_decay=WEIGHT_DECAY)
    steps = []
    for step, batch in enumerate(make_batches(n), start=1):
        if step == REFRESH_AT:
            reference.load_state_dict(policy.state_dict())

        def player(model, chosen, rejected, batch=batch):
            rows = (
                response_tokens(model, batch.prompts[row], batch.responses[row], batch.masks[row], 1.0)
                for row in (chosen, rejected)
            )
            (chosen, chosen_expected), (rejected, rejected_expected) = rows
            return Player(chosen, rejected, chosen_expected, rejected_expected)

        pairs = list(zip(batch.chosen, batch.rejected, batch.weights, strict=True))
        theirs = {pair: player(reference, *pair[:2]) for pair in pairs}
        mini_batches: dict[int, list] = {}
        for pair in pairs:
            mini_batches.setdefault(pair[0] // n // prompts_per_step, []).append(pair)
        for members in (mini_batches[key] for key in sorted(mini_batches)):
            total = sum(weight for *_, weight in members)
            found = dict.fromkeys(COMPARED, 0.0)
            optimizer.zero_grad()
            loss = 0.0
            for pair in members:
                ours, other, share = player(policy, *pair[:2]), theirs[pair], pair[2] / total
                loss = loss + share * equation(ours, other)
                gaps = [x.sum().item() - y.sum().item() for x, y in zip(whole(ours), whole(other), strict=True)]
                alpha = ALPHA if kind == "LD-DPO" else 1.0
                found["rewards/margins"] += share * dpo(ours, other, alpha).item()
                found["logps/chosen"] += share * ours.chosen.sum().item()
                found["kl/sequence"] += share * sum(gaps) / 2
            loss.backward()
            found["loss"] = loss.item()
            found["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
            optimizer.step()
            steps.append(found)
    return {"initial": initial, "parameters": policy.state_dict(), "steps": steps}


def whole(player):
    return player.chosen, player.rejected


# ---- The comparison --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    loss: str
    world_size: int = 1
    n: int = 2
    prompts_per_step: int = PROMPTS
    share_prompt: bool = True
    reference_passes: bool = False  # also where the reference equals the actor
    ranks_per_sequence: int = 1  # Ulysses

    def overrides(self, folder: str) -> list[str]:
        actor = "actor_rollout_ref.actor"
        _, settings = LOSSES[self.loss]
        return [
            f"actor_rollout_ref.model.path={folder}",
            f"actor_rollout_ref.share_prompt={self.share_prompt}",
            f"actor_rollout_ref.rollout.n={self.n}",
            "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=64",
            f"{actor}.ppo_max_token_len_per_gpu=64",
            f"{actor}.ppo_mini_batch_size={self.prompts_per_step}",
            f"{actor}.ulysses_sequence_parallel_size={self.ranks_per_sequence}",
            f"{actor}.optim.lr={LEARNING_RATE}",
            f"{actor}.optim.weight_decay={WEIGHT_DECAY}",
            f"{actor}.optim.override_optimizer_config={{eps:{EPS}}}",
            f"data.train_batch_size={PROMPTS}",
            f"data.max_prompt_length={MAX_PROMPT}",
            f"data.max_response_length={MAX_RESPONSE}",
            f"algorithm.dpo_beta={BETA}",
            f"trainer.ref_update_freq={REFRESH_AT}",
            *(f"algorithm.{setting}" for setting in settings),
        ]


MANY = {
    "n": 3,
    "prompts_per_step": 3,
}  # all pairs of three responses: a response is cut differently in each of its pairs
CASES = [
    *(Case(loss) for loss in LOSSES),
    Case("LD-DPO", **MANY),
    Case("LD-DPO", world_size=2, **MANY, share_prompt=False),
    Case("LD-DPO", reference_passes=True),
    Case("LD-DPO", world_size=2, ranks_per_sequence=2),
    Case("WPO", world_size=2, **MANY, share_prompt=False),
    Case("WPO", world_size=2, ranks_per_sequence=2),
]


def gap(ours, theirs) -> float:
    """Relative difference of two tensors by their norms."""
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_worker_trains_like_plain_pytorch(case, tiny_models, ranks):
    folder = tiny_models["llama"]
    plain = plain_training(folder, case.n, case.loss, case.prompts_per_step)
    job = train_with_ulysses if case.ranks_per_sequence > 1 else train
    outputs = ranks[case.world_size].run(job, case.overrides(folder), make_batches(case.n), case.reference_passes)
    for worker in outputs:
        steps = [
            dict(zip(COMPARED, values, strict=True))
            for update in worker["steps"]
            for values in zip(*(update[name] for name in COMPARED), strict=True)
        ]
        assert len(steps) == len(plain["steps"])
        gaps = {
            name: max(
                abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1)
                for ours, theirs in zip(steps, plain["steps"], strict=True)
            )
            for name in COMPARED
        }
        end, start = plain["parameters"], plain["initial"]
        ours = {name: torch.from_numpy(array) for name, array in worker["parameters"].items()}
        gaps["parameters"] = max(gap(ours[name], end[name]) for name in end)
        gaps["change"] = max(gap(ours[name] - start[name], end[name] - start[name]) for name in end)
        print(case, {name: f"{value:.1e}" for name, value in gaps.items()})  # shown by pytest -rP
        assert gaps["parameters"] < 2e-6
        assert gaps["change"] < 1e-4
        assert max(gaps[name] for name in COMPARED) < 5e-5


def test_options_make_a_difference_in_these_batches(tiny_models):
    losses = {
        kind: [step["loss"] for step in plain_training(tiny_models["llama"], 2, kind, PROMPTS)["steps"]]
        for kind in LOSSES
    }
    first = {kind: values[-1] for kind, values in losses.items()}
    assert len({round(value, 3) for value in first.values()}) == len(LOSSES)
