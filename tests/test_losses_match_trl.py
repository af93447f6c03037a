"""Our losses against TRL's own code: DPOTrainer._compute_loss, CPOTrainer.cpo_loss and OnlineDPOTrainer.training_step,
run for real.

The trainers are built without __init__ and get a stand-in model that answers with prepared log-probs; all else is TRL.
"""

import inspect
import math
import os
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0")

from trl import DPOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.online_dpo import OnlineDPOTrainer  # noqa: E402

from recipe.spin.core_algos import (  # noqa: E402
    LOSSES,
    LossOptions,
    compute_online_dpo_loss,
    compute_onlineDPO_pref,
    length_desensitized_logps,
    penalize_missing_eos,
    sequence_logps,
    wpo_weights,
)

TOLERANCE = dict(rtol=1e-10, atol=1e-10)
PAIRS, PROMPT, RESPONSE = 5, 3, 7
OURS = {"simpo", "dpop"}  # TRL's DPOTrainer lacks them
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


class Model(torch.nn.Module):
    """Answers with given log-probs (N, RESPONSE) of the responses' tokens, and of what drawn tokens have on average."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs, mask, expected=None):
        super().__init__()
        prompt = log_probs.new_zeros(len(mask), PROMPT - 1)  # position t holds the log-prob of token t + 1
        self.log_probs = torch.cat([prompt, torch.where(mask, log_probs, 0.0)], dim=1)
        self.expected = None if expected is None else torch.cat([prompt, expected], dim=1)

    def forward(self, **inputs):
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=self.expected,
        )


def trl_loss(policy, reference, mask, beta, label_smoothing, loss_types, loss_weights, expected=None, **settings):
    """DPOTrainer._compute_loss on the given token log-probs."""
    rows = len(policy)
    trainer = object.__new__(DPOTrainer)
    trainer.model, trainer.ref_model = Model(policy, mask, expected), Model(reference, mask)
    trainer.accelerator = accelerator()
    trainer.args = SimpleNamespace(discopop_tau=0.2, gradient_checkpointing_kwargs=None)
    trainer.beta, trainer.label_smoothing = beta, label_smoothing
    trainer.loss_types, trainer.loss_weights = loss_types, loss_weights
    trainer.f_divergence_type, trainer.f_alpha_divergence_coef, trainer.ld_alpha = "reverse_kl", 0.5, None
    trainer.precompute_ref_logps, trainer.use_weighting, trainer.aux_loss_enabled = False, False, False
    vars(trainer).update(settings)
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = defaultdict(lambda: defaultdict(list)), 0, 1

    completion_mask = torch.cat([torch.zeros(rows, PROMPT, dtype=torch.long), mask.long()], dim=1)
    inputs = {
        "input_ids": torch.ones_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    return trainer._compute_loss(trainer.model, inputs, return_outputs=False)


def our_loss(
    policy,
    reference,
    mask,
    beta,
    label_smoothing,
    loss_types,
    loss_weights=None,
    average=False,
    expected=None,
    **options,
):
    options = LossOptions(**options)
    chosen_lengths, rejected_lengths = mask.sum(1).chunk(2)

    def logps(tokens):
        if options.ld_alpha is None:
            return sequence_logps(tokens, mask, average).chunk(2)
        shared = torch.minimum(chosen_lengths, rejected_lengths).repeat(2)
        return length_desensitized_logps(tokens, mask, shared, options.ld_alpha).chunk(2)

    return compute_online_dpo_loss(
        *logps(policy),
        *logps(reference),
        beta,
        label_smoothing,
        loss_types,
        loss_weights=loss_weights,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        whole_chosen_logps=sequence_logps(policy, mask, average).chunk(2)[0],
        wpo_weight=None if expected is None else math.prod(wpo_weights(policy, expected, mask).chunk(2)),
        options=options,
    )


def assert_same_value_and_gradient(ours, theirs, leaf, tolerance=TOLERANCE):
    torch.testing.assert_close(ours, theirs, **tolerance)
    (our_gradient,) = torch.autograd.grad(ours, leaf)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)
    assert their_gradient.abs().max() > 1e-6, "a vanished gradient would compare nothing"
    torch.testing.assert_close(our_gradient, their_gradient, **tolerance)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - OURS))
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
    assert set(LOSSES) - OURS == {name.strip("[]' ") for name in known.split(",")}


def takers(option):
    """The losses that take an option, but ipo, which TRL divides by lengths."""
    return sorted(name for name, loss in LOSSES.items() if option in loss.takes and name not in OURS | {"ipo"})


@pytest.mark.parametrize("name", takers("f_divergence_type"))
@pytest.mark.parametrize(
    ("kind", "coef"),
    [("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.3), ("alpha_divergence", 1.0)],
)
def test_f_divergences(name, kind, coef):
    """In float32: TRL's alpha_divergence knows no bound for exponents of more."""
    policy, reference, mask = random_pairs(3)
    policy, reference = (tensor.detach().float() for tensor in (policy, reference))
    policy.requires_grad_()
    eps = 0.1 if name in ("robust", "exo_pair") else 0.0
    settings = dict(f_divergence_type=kind, f_alpha_divergence_coef=coef)
    ours = our_loss(policy, reference, mask, 0.3, eps, name, **settings)
    theirs = trl_loss(policy, reference, mask, 0.3, eps, [name], [1.0], **settings)
    assert_same_value_and_gradient(ours, theirs.to(ours), policy, dict(rtol=1e-4, atol=1e-5))


def test_f_divergences_are_refused_where_trl_refuses_them():
    source = inspect.getsource(DPOTrainer.__init__)
    theirs = re.search(r"f_divergence_loss_types = \{(.*?)\}", source)[1]
    assert {name.strip(' "') for name in theirs.split(",")} == {*takers("f_divergence_type"), "ipo"}


@pytest.mark.parametrize("name", takers("ld_alpha"))
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitization(name, alpha):
    policy, reference, mask = random_pairs(4)
    eps = 0.1 if name in ("robust", "exo_pair") else 0.0
    ours = our_loss(policy, reference, mask, 0.3, eps, name, ld_alpha=alpha)
    theirs = trl_loss(policy, reference, mask, 0.3, eps, [name], [1.0], ld_alpha=alpha)
    assert_same_value_and_gradient(ours, theirs, policy)


@pytest.mark.parametrize("names", [["sigmoid"], ["nca_pair"], ["sigmoid", "bco_pair"]])  # hinge fails in TRL
def test_wpo_weights(names):
    policy, reference, mask = random_pairs(5)
    expected = -torch.rand(policy.shape, generator=torch.Generator().manual_seed(6)).mul(4)
    ours = our_loss(policy, reference, mask, 0.3, 0.0, names, expected=expected, use_weighting=True)
    theirs = trl_loss(
        policy, reference, mask, 0.3, 0.0, names, [1.0] * len(names), expected=expected, use_weighting=True
    )
    assert_same_value_and_gradient(ours, theirs, policy)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.6])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_simpo(gamma, eps):
    """CPOTrainer gets the mean log-probs, as its concatenated_forward makes them for simpo."""
    policy, reference, mask = random_pairs(8)
    trainer = object.__new__(CPOTrainer)
    trainer.loss_type, trainer.beta, trainer.simpo_gamma = "simpo", 2.0, gamma
    trainer.alpha, trainer.label_smoothing, trainer.accelerator = 0.0, eps, accelerator()
    means = (policy * mask).sum(1) / mask.sum(1)
    theirs, _, _ = trainer.cpo_loss(*means.chunk(2))
    ours = our_loss(policy, reference, mask, 2.0, eps, "simpo", simpo_gamma=gamma)
    assert_same_value_and_gradient(ours, theirs.mean(), policy)


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
