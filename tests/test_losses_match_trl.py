"""Our losses against TRL's own code: DPOTrainer._compute_loss and OnlineDPOTrainer.training_step, run for real.

Both trainers are built without __init__ and get a stand-in model that answers with prepared log-probs; all else is TRL.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0")

from trl import DPOTrainer  # noqa: E402
from trl.experimental.online_dpo import OnlineDPOTrainer  # noqa: E402

from recipe.spin.core_algos import (  # noqa: E402
    LOSSES,
    compute_online_dpo_loss,
    compute_onlineDPO_pref,
    penalize_missing_eos,
    sequence_logps,
)

TOLERANCE = dict(rtol=1e-10, atol=1e-10)
PAIRS, PROMPT, RESPONSE = 5, 3, 7
SMOOTHING = {"robust": (0.0, 0.1, 0.4), "exo_pair": (1e-3, 0.1, 0.5), "aot": (0.0, 0.1), "aot_unpaired": (0.0, 0.1)}


@pytest.fixture(autouse=True)
def float64_by_default():
    """TRL's exo_pair takes the logarithm of label_smoothing in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def accelerator():
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, backward=lambda loss: loss.backward()
    )


def random_pairs(seed, pairs=PAIRS):
    """Token log-probs (2 * pairs, RESPONSE), chosen first, of policy (a leaf) and reference, and a ragged mask."""
    g = torch.Generator().manual_seed(seed)
    policy = -torch.rand(2 * pairs, RESPONSE, generator=g).mul(4)
    reference = -torch.rand(2 * pairs, RESPONSE, generator=g).mul(4)
    lengths = torch.randint(1, RESPONSE + 1, (2 * pairs,), generator=g)
    return policy.requires_grad_(), reference, torch.arange(RESPONSE) < lengths[:, None]


def trl_loss(policy, reference, mask, beta, label_smoothing, loss_types, loss_weights):
    """DPOTrainer._compute_loss on the given token log-probs."""
    rows = len(policy)

    class Model(torch.nn.Module):
        def forward(self, **inputs):
            prompt = torch.zeros(rows, PROMPT - 1)  # position t holds the log-prob of token t + 1
            log_probs = torch.cat([prompt, torch.where(mask, policy, 0.0)], dim=1)
            zeros = torch.zeros_like(log_probs)
            return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    trainer = object.__new__(DPOTrainer)
    trainer.model, trainer.accelerator, trainer.args = Model(), accelerator(), SimpleNamespace(discopop_tau=0.05)
    trainer.beta, trainer.label_smoothing = beta, label_smoothing
    trainer.loss_types, trainer.loss_weights = loss_types, loss_weights
    trainer.f_divergence_type, trainer.ld_alpha = "reverse_kl", None
    trainer.precompute_ref_logps, trainer.use_weighting, trainer.aux_loss_enabled = True, False, False
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = defaultdict(lambda: defaultdict(list)), 0, 1

    completion_mask = torch.cat([torch.zeros(rows, PROMPT, dtype=torch.long), mask.long()], dim=1)
    ref_chosen, ref_rejected = torch.where(mask, reference, 0.0).sum(1).chunk(2)
    inputs = {
        "input_ids": torch.ones_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trainer._compute_loss(trainer.model, inputs, return_outputs=False)


def our_loss(policy, reference, mask, beta, label_smoothing, loss_types, loss_weights=None, average=False):
    chosen_lengths, rejected_lengths = mask.sum(1).chunk(2)
    return compute_online_dpo_loss(
        *sequence_logps(policy, mask, average).chunk(2),
        *sequence_logps(reference, mask, average).chunk(2),
        beta,
        label_smoothing,
        loss_types,
        loss_weights=loss_weights,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )


def assert_same_value_and_gradient(ours, theirs, leaf):
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    (our_gradient,) = torch.autograd.grad(ours, leaf)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)
    assert their_gradient.abs().max() > 1e-6, "a vanished gradient would compare nothing"
    torch.testing.assert_close(our_gradient, their_gradient, **TOLERANCE)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("beta", [0.05, 0.3, 1.3])
@pytest.mark.parametrize("seed", range(3))
def test_every_loss(name, beta, seed):
    policy, reference, mask = random_pairs(seed)
    for eps in SMOOTHING.get(name, (0.0,)):
        ours = our_loss(policy, reference, mask, beta, eps, name, average=name == "ipo")
        assert_same_value_and_gradient(ours, trl_loss(policy, reference, mask, beta, eps, [name], [1.0]), policy)


@pytest.mark.parametrize("eps", [0.1, 0.3, 0.5])
def test_label_smoothing_of_sigmoid(eps):
    """TRL 1.16's sigmoid ignores label_smoothing; its aot on a batch of one pair, where there is no order, is cDPO."""
    policy, reference, mask = random_pairs(seed=7, pairs=1)
    ours = our_loss(policy, reference, mask, 0.3, eps, "sigmoid")
    assert_same_value_and_gradient(ours, trl_loss(policy, reference, mask, 0.3, eps, ["aot"], [1.0]), policy)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["sigmoid", "sft"], [0.7, 0.3]),
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),  # MPO, arXiv 2411.10442
        (["aot", "sigmoid_norm", "discopop"], [1.0, 2.0, 0.5]),
        (["exo_pair", "robust", "hinge"], [0.1, 0.2, 0.3]),
        (["apo_zero", "nca_pair", "sppo_hard", "apo_down", "aot_unpaired"], [1.0, 1.0, 0.25, -0.5, 0.0]),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_weighted_sums(names, weights, seed):
    policy, reference, mask = random_pairs(seed)
    eps = 0.0 if "sigmoid" in names else 0.1
    ours = our_loss(policy, reference, mask, 0.2, eps, names, weights)
    assert_same_value_and_gradient(ours, trl_loss(policy, reference, mask, 0.2, eps, names, weights), policy)


def test_every_loss_of_trl_is_here():
    """The list in TRL's own error message."""
    policy, reference, mask = random_pairs(0)
    with pytest.raises(ValueError, match="Should be one of") as error:
        trl_loss(policy, reference, mask, 0.1, 0.0, ["no such loss"], [1.0])
    known = str(error.value).split("Should be one of ")[1]
    assert set(LOSSES) == {name.strip("[]' ") for name in known.split(",")}


def trl_online_step(policy, reference, mask, rewards, ended, beta, loss_type, penalty):
    """OnlineDPOTrainer.training_step on given responses; rows are all first responses, then all second ones.
    Returns the loss; the gradient is in policy.grad."""
    eos, other = 1, 0
    tokens = torch.full(mask.shape, other)
    tokens[:, 0] = torch.where(ended, eos, other)
    policy_model, reference_model = torch.nn.Identity(), torch.nn.Identity()

    class Trainer(OnlineDPOTrainer):
        def _generate(self, model, prompts, images=None):
            return None, None, tokens, mask.long(), None

        def _forward(self, model, *inputs):
            return policy if model is policy_model else reference

        def _calculate_rewards_from_functions(self, **inputs):
            return rewards.clone()

    trainer = object.__new__(Trainer)
    trainer.model, trainer.ref_model, trainer.accelerator = policy_model, reference_model, accelerator()
    trainer.args = SimpleNamespace(
        use_vllm=False,
        missing_eos_penalty=penalty,
        loss_type=loss_type,
        torch_empty_cache_steps=None,
        optim="adamw_torch",
        n_gpu=1,
        gradient_accumulation_steps=1,
    )
    trainer._beta, trainer.eos_token_ids, trainer.reward_funcs = beta, [eos], ["given"]
    trainer.processing_class = SimpleNamespace(batch_decode=lambda ids, **_: ["" for _ in ids])
    trainer.stats, trainer.state = defaultdict(list), SimpleNamespace(global_step=1)
    return trainer.training_step(policy_model, {"prompt": ["question"] * (len(policy) // 2)})


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("penalty", [None, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_of_online_dpo(loss_type, penalty, seed):
    """Preference (ties to the first), missing-EOS penalty and loss together. Integer rewards make ties frequent."""
    prompts = 6
    policy, reference, mask = random_pairs(seed, pairs=prompts)
    g = torch.Generator().manual_seed(100 + seed)
    rewards = torch.randint(0, 3, (2 * prompts,), generator=g).double()
    ended = torch.rand(2 * prompts, generator=g) < 0.6
    theirs = trl_online_step(policy, reference, mask, rewards, ended, 0.3, loss_type, penalty)

    by_prompt = torch.arange(2 * prompts).view(2, prompts).T.flatten()  # first and second response next to each other
    scores = rewards if penalty is None else penalize_missing_eos(rewards, ended, penalty)
    scores = scores[by_prompt, None]
    pairs = compute_onlineDPO_pref(scores, torch.ones_like(scores), tie_policy="first")
    assert (pairs.margin == 0).any() and (pairs.margin > 0).any() and (pairs.chosen % 2 == 1).any()
    policy_logps, reference_logps = sequence_logps(policy, mask)[by_prompt], sequence_logps(reference, mask)[by_prompt]
    ours = compute_online_dpo_loss(
        policy_logps[pairs.chosen],
        policy_logps[pairs.rejected],
        reference_logps[pairs.chosen],
        reference_logps[pairs.rejected],
        0.3,
        loss_type=loss_type,
    )
    torch.testing.assert_close(ours.detach(), theirs, **TOLERANCE)
    torch.testing.assert_close(torch.autograd.grad(ours, policy)[0], policy.grad, **TOLERANCE)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.01, 0.3, 10.0])
def test_extreme_log_ratios_stay_finite(name, dtype, beta):
    """Log-ratios up to 1e4, all combinations of chosen and rejected; at such values TRL's discopop gives NaN."""
    sizes = torch.tensor([-1e4, -1e3, -88.8, -1.0, 0.0, 1.0, 88.8, 1e3, 1e4], dtype=dtype)
    chosen, rejected = (ratios.clone().requires_grad_() for ratios in torch.cartesian_prod(sizes, sizes).unbind(1))
    zeros, lengths = torch.zeros_like(chosen), torch.ones(len(chosen), dtype=torch.long)
    eps = 0.1 if name == "exo_pair" else 0.0
    losses = compute_online_dpo_loss(
        chosen,
        rejected,
        zeros,
        zeros,
        beta,
        eps,
        name,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        reduction="none",
    )
    gradients = torch.autograd.grad(losses.sum(), [chosen, rejected], allow_unused=True)
    assert losses.dtype == dtype and losses.isfinite().all()
    assert gradients[0].isfinite().all() and (name == "sft" or gradients[1].isfinite().all())
