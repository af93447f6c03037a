"""Losses and their settings against numbers worked out by hand and formulas written down from the papers."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from recipe.spin.core_algos import (
    LOSSES,
    LossOptions,
    PairLogps,
    check_loss_settings,
    compute_online_dpo_loss,
    f_score,
    register_loss,
)

ROOT = Path(__file__).resolve().parents[1]


# ---- losses

# One pair: policy -2 (chosen), -5 (rejected); reference -3, -4. Log-ratios +1 and -1, so h = 2.
ONE_PAIR = [torch.tensor([x], dtype=torch.float64) for x in (-2.0, -5.0, -3.0, -4.0)]
LENGTHS = dict(chosen_lengths=torch.tensor([2]), rejected_lengths=torch.tensor([4]))
# log sigma(1) = -0.3132616875, log sigma(-1) = -1.3132616875, sigma(1) = 0.7310585786
# log sigma(0.5) = -0.4740769842, log sigma(-0.5) = -0.9740769842, sigma(0.5) = 0.6224593312


@pytest.mark.parametrize(
    ("name", "beta", "eps", "expected"),
    [
        ("sigmoid", 0.5, 0.0, 0.3132616875),  # beta h = 1
        ("sigmoid", 0.5, 0.1, 0.4132616875),  # 0.9 * 0.3132616875 + 0.1 * 1.3132616875
        ("hinge", 0.25, 0.0, 0.5),  # 1 - 0.25 * 2
        ("hinge", 1.0, 0.0, 0.0),  # 1 - 2 < 0
        ("ipo", 0.5, 0.0, 1.0),  # (2 - 1)^2
        ("ipo", 0.125, 0.0, 4.0),  # (2 - 4)^2
        ("robust", 0.5, 0.1, 0.1882616875),  # (0.9 * 0.3132616875 - 0.1 * 1.3132616875) / 0.8
        # q = 0.7310585786: q (log q - log 0.75) = 0.7310585786 * (-0.3132616875 + 0.2876820724) = -0.0187001970,
        # (1-q) (log(1-q) - log 0.25) = 0.2689414214 * (-1.3132616875 + 1.3862943611) = 0.0196415110
        ("exo_pair", 0.5, 0.25, 0.0009413140),
        ("nca_pair", 0.5, 0.0, 1.1981539684),  # r = +-0.5: 0.4740769842 + (0.9740769842 + 0.4740769842) / 2
        ("bco_pair", 0.5, 0.0, 0.9481539684),  # 2 * 0.4740769842
        ("sppo_hard", 0.25, 0.0, 2.0),  # (1 - 2)^2 + (-1 + 2)^2
        ("aot", 0.5, 0.1, 0.4132616875),  # one pair: as sigmoid
        ("aot_unpaired", 0.5, 0.1, 0.4132616875),
        ("apo_zero", 0.5, 0.0, 0.7550813376),  # 2 * sigma(-0.5) = 2 * (1 - 0.6224593312)
        ("apo_down", 0.5, 0.0, 0.8914007526),  # sigma(0.5) + sigma(-1) = 0.6224593312 + 0.2689414214
        # x = 1, x / tau = 2, sigma(2) = 0.8807970780: 0.1192029220 * 0.3132616875 + 0.8807970780 * exp(-1)
        ("discopop", 0.5, 0.0, 0.3613688453),
        ("sigmoid_norm", 2.0, 0.0, 0.2014132780),  # 1/2 - -1/4 = 0.75, times 2 is 1.5, -log sigma(1.5)
        ("sft", 0.5, 0.0, 1.0),  # 2 nats over 2 tokens
        # -2/2 - -5/4 = 0.25, times 2 is 0.5, less gamma 0.5 is 0; less 0 by label smoothing, as log sigma(0) is even
        ("simpo", 2.0, 0.1, math.log(2)),
        ("dpop", 0.5, 0.0, 0.3132616875),  # the chosen has gained: as sigmoid
    ],
)
def test_losses_by_hand(name, beta, eps, expected):
    loss = compute_online_dpo_loss(*ONE_PAIR, beta, eps, name, discopop_tau=0.5, **LENGTHS)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("tau", "towards_the_chosen"), [(0.05, False), (0.102, False), (0.104, True), (0.2, True)])
def test_discopop_at_first_pulls_towards_the_chosen_response_from_a_tau_on(tau, towards_the_chosen):
    """Where the policy is the reference, as at the start and after a refresh."""
    logps = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    same = torch.zeros(1, dtype=torch.float64)
    compute_online_dpo_loss(logps, same, same, same, 0.1, loss_type="discopop", discopop_tau=tau).backward()
    assert (logps.grad.item() < 0) == towards_the_chosen


def two_pairs():
    """Log-ratios chosen 1, -3 and rejected -1, 5; policy chosen - rejected 3, -1, reference chosen - rejected 1, 7."""
    pairs = ([-2.0, -6.0], [-5.0, -5.0], [-3.0, -3.0], [-4.0, -10.0])
    return [torch.tensor(x, dtype=torch.float64) for x in pairs]


def test_batch_coupled_losses_compare_sorted_log_ratios():
    def losses(name):
        return compute_online_dpo_loss(*two_pairs(), 0.5, loss_type=name, reduction="none").tolist()

    # aot: sorted policy [-1, 3] - sorted reference [1, 7] = [-2, -4], times 0.5 = [-1, -2]; -log sigma(-2) = 2.12692801
    assert losses("aot") == pytest.approx([1.3132616875, 2.1269280110])
    # aot_unpaired: sorted chosen [-3, 1] - sorted rejected [-1, 5] = [-2, -4]: the same numbers by another way
    assert losses("aot_unpaired") == pytest.approx([1.3132616875, 2.1269280110])
    # paired, h = 2 and -8: -log sigma(1), -log sigma(-4) = 4.0181499279
    assert losses("sigmoid") == pytest.approx([0.3132616875, 4.0181499279])


def test_the_registry_says_what_each_loss_asks_for():
    assert {name for name, loss in LOSSES.items() if loss.batch_coupled} == {"aot", "aot_unpaired"}
    assert {name for name, loss in LOSSES.items() if loss.needs_lengths} == {"sigmoid_norm", "sft", "simpo"}
    assert {name for name, loss in LOSSES.items() if loss.needs_reference} == {"dpop"}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_of_micro_batches_add_up_unless_batch_coupled(name):
    """What `batch_coupled` promises, and what mean_chosen_length is for."""
    pairs, lengths = two_pairs(), dict(chosen_lengths=torch.tensor([2, 6]), rejected_lengths=torch.tensor([4, 1]))

    def losses(rows):
        return compute_online_dpo_loss(
            *(x[rows] for x in pairs),
            0.5,
            0.1 if name in ("exo_pair", "robust") else 0.0,
            name,
            reduction="none",
            mean_chosen_length=4.0,
            **{key: x[rows] for key, x in lengths.items()},
        )

    split = torch.cat([losses(slice(0, 1)), losses(slice(1, 2))])
    assert torch.equal(split, losses(slice(None))) != LOSSES[name].batch_coupled


def test_sft_is_the_cross_entropy_per_chosen_token():
    lengths = dict(chosen_lengths=torch.tensor([2, 6]), rejected_lengths=torch.tensor([1, 1]))
    # 2 + 6 nats over 2 + 6 tokens; per pair 2 / 4 and 6 / 4; with a mini-batch's mean length of 8: half of it
    loss = compute_online_dpo_loss(*two_pairs(), 0.5, loss_type="sft", **lengths)
    assert loss.item() == pytest.approx(1.0)
    loss = compute_online_dpo_loss(*two_pairs(), 0.5, loss_type="sft", reduction="none", **lengths)
    assert loss.tolist() == pytest.approx([0.5, 1.5])
    loss = compute_online_dpo_loss(*two_pairs(), 0.5, loss_type="sft", mean_chosen_length=torch.tensor(8.0), **lengths)
    assert loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["sft", "sigmoid_norm"])
def test_empty_responses_do_not_divide_by_zero(name):
    none = torch.zeros(1, dtype=torch.long)
    zeros = [torch.zeros(1)] * 4
    loss = compute_online_dpo_loss(*zeros, 0.1, loss_type=name, chosen_lengths=none, rejected_lengths=none)
    assert loss.isfinite()


def test_several_losses_add_up_with_their_weights():
    # sigmoid 0.3132616875, ipo 1.0, at beta 0.5
    assert compute_online_dpo_loss(*ONE_PAIR, 0.5, loss_type=["sigmoid", "ipo"]).item() == pytest.approx(1.3132616875)
    weighted = compute_online_dpo_loss(*ONE_PAIR, 0.5, loss_type=["sigmoid", "ipo"], loss_weights=[2.0, 0.5])
    assert weighted.item() == pytest.approx(2 * 0.3132616875 + 0.5)
    assert compute_online_dpo_loss(*ONE_PAIR, 0.5, loss_weights=[3.0]).item() == pytest.approx(3 * 0.3132616875)


def test_reference_free_counts_the_reference_as_zero():
    # h = -2 - -5 = 3, beta h = 1.5
    chosen, rejected, *reference = ONE_PAIR
    assert compute_online_dpo_loss(chosen, rejected, *reference, 0.5, reference_free=True).item() == pytest.approx(
        0.2014132780
    )
    free = compute_online_dpo_loss(chosen, rejected, None, None, 0.5, reference_free=True)
    assert free.item() == pytest.approx(0.2014132780)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_half_precision_log_probs_are_compared_in_float32(name, kind):
    pairs = [x.to(kind).requires_grad_() for x in two_pairs()]
    settings = (0.3, 0.1, name)
    lengths = dict(chosen_lengths=torch.tensor([2, 6]), rejected_lengths=torch.tensor([4, 1]))
    loss = compute_online_dpo_loss(*pairs, *settings, **lengths)
    assert loss.dtype == torch.float32
    assert loss.item() == compute_online_dpo_loss(*(x.float() for x in pairs), *settings, **lengths).item()
    loss.backward()
    assert pairs[0].grad.dtype == kind and pairs[0].grad.abs().max() > 0


def test_the_mean_and_its_gradient():
    pairs = [x.clone().requires_grad_() for x in two_pairs()]
    loss = compute_online_dpo_loss(*pairs, 0.5)
    assert loss.shape == () and loss.item() == pytest.approx((0.3132616875 + 4.0181499279) / 2)
    loss.backward()
    # d/d chosen = -beta sigma(-beta h) / P: sigma(-1) = 0.2689414214, sigma(4) = 0.9820137900
    assert pairs[0].grad.tolist() == pytest.approx([-0.5 * 0.2689414214 / 2, -0.5 * 0.9820137900 / 2])
    assert pairs[1].grad.tolist() == pytest.approx([0.5 * 0.2689414214 / 2, 0.5 * 0.9820137900 / 2])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_pairs(name):
    none, lengths = [torch.zeros(0)] * 4, dict(chosen_lengths=torch.zeros(0), rejected_lengths=torch.zeros(0))
    eps = 0.1 if name == "exo_pair" else 0.0
    assert compute_online_dpo_loss(*none, 0.1, eps, name, reduction="none", **lengths).shape == (0,)
    with pytest.raises(ValueError, match="no preference pairs.*skip the update"):
        compute_online_dpo_loss(*none, 0.1, eps, name, **lengths)


def test_errors_of_the_loss():
    chosen, rejected, *reference = ONE_PAIR
    with pytest.raises(ValueError, match=r"'policy_rejected_logps': \(2,\)"):  # would broadcast
        compute_online_dpo_loss(chosen, rejected.expand(2), *reference, 0.1)
    with pytest.raises(ValueError, match=r"'chosen_lengths': \(3,\)"):
        compute_online_dpo_loss(*ONE_PAIR, 0.1, chosen_lengths=torch.ones(3))
    with pytest.raises(ValueError, match="rejected_lengths is of type list: pass a tensor"):
        compute_online_dpo_loss(*ONE_PAIR, 0.1, chosen_lengths=torch.ones(1), rejected_lengths=[1])
    with pytest.raises(ValueError, match=r"mean_chosen_length has shape \(1, 1\)"):  # would make a table of pairs
        compute_online_dpo_loss(*ONE_PAIR, 0.1, mean_chosen_length=torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"must be \(P\)"):
        compute_online_dpo_loss(*(x[None] for x in ONE_PAIR), 0.1)
    with pytest.raises(ValueError, match="reference's log-probs are missing.*reference_free"):
        compute_online_dpo_loss(chosen, rejected, None, None, 0.1)
    with pytest.raises(ValueError, match="reduction is 'sum'.*mean or none"):
        compute_online_dpo_loss(*ONE_PAIR, 0.1, reduction="sum")
    for name in ("sft", "sigmoid_norm"):
        with pytest.raises(ValueError, match=f"loss {name}.*pass chosen_lengths and rejected_lengths"):
            compute_online_dpo_loss(*ONE_PAIR, 0.1, loss_type=["sigmoid", name], chosen_lengths=torch.ones(1))
    with pytest.raises(ValueError, match="dpo_label_smoothing"):  # settings are checked here too
        compute_online_dpo_loss(*ONE_PAIR, 0.1, 0.7)
    with pytest.raises(ValueError, match="dpo_discopop_tau. is 0.0"):
        compute_online_dpo_loss(*ONE_PAIR, 0.1, discopop_tau=0.0)


# ---- Options
PAPERS = {  # from the papers, for one pair of the policy's c, r and the reference's C, R, of lengths m, k
    "simpo": (
        "simpo",
        {"simpo_gamma": 0.9},
        lambda c, r, C, R, m, k, beta: -log_sigmoid(beta / m * c - beta / k * r - 0.9),
    ),
    "dpop": (
        "dpop",
        {"dpop_lambda": 3.0},
        lambda c, r, C, R, m, k, beta: -log_sigmoid(beta * ((c - C) - (r - R) - 3.0 * max(0.0, C - c))),
    ),
    "R-DPO": (
        "sigmoid",
        {"length_penalty": 0.2},
        lambda c, r, C, R, m, k, beta: -log_sigmoid(beta * (c - C) - beta * (r - R) + (0.2 * m - 0.2 * k)),
    ),
    "R-DPO of hinge": (
        "hinge",
        {"length_penalty": 0.2},
        lambda c, r, C, R, m, k, beta: max(0.0, 1 - beta * ((c - C) - (r - R)) - 0.2 * (m - k)),
    ),
    "forward KL": (
        "sigmoid",
        {"f_divergence_type": "forward_kl"},
        lambda c, r, C, R, m, k, beta: -log_sigmoid(beta * (-math.exp(C - c) + math.exp(R - r))),
    ),
    "Jensen-Shannon": (
        "sigmoid",
        {"f_divergence_type": "js_divergence"},
        lambda c, r, C, R, m, k, beta: (
            -log_sigmoid(beta * (math.log(2 / (1 + math.exp(C - c))) - math.log(2 / (1 + math.exp(R - r)))))
        ),
    ),
    "alpha-divergence": (  # the paper's alpha 0.7: f'(u) = (1 - u^-alpha) / alpha
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        lambda c, r, C, R, m, k, beta: (
            -log_sigmoid(beta * ((1 - math.exp(C - c) ** 0.7) / 0.7 - (1 - math.exp(R - r) ** 0.7) / 0.7))
        ),
    ),
    "IPO under the forward KL": (
        "ipo",
        {"f_divergence_type": "forward_kl"},
        lambda c, r, C, R, m, k, beta: (-math.exp(C - c) + math.exp(R - r) - 1 / (2 * beta)) ** 2,
    ),
}
PAIRS_BY_HAND = [(-2.0, -5.0, -3.0, -4.0, 2, 4), (-6.0, -5.5, -4.5, -7.0, 7, 3), (-1.0, -1.0, -1.0, -1.0, 5, 5)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_options_are_the_papers_equations(paper, beta):
    name, options, equation = PAPERS[paper]
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*PAIRS_BY_HAND, strict=True)]
    *logps, chosen, rejected = columns
    losses = compute_online_dpo_loss(
        *logps,
        beta,
        loss_type=name,
        chosen_lengths=chosen.long(),
        rejected_lengths=rejected.long(),
        options=LossOptions(**options),
        reduction="none",
    )
    assert losses.tolist() == pytest.approx([equation(*pair, beta) for pair in PAIRS_BY_HAND], rel=1e-12)


def test_a_length_penalty_holds_back_longer_chosen_responses():
    """The gradient that a longer chosen response gets is smaller, that of a shorter one larger."""

    def slope(chosen_length, penalty):
        chosen = torch.tensor([-2.0], requires_grad=True)
        lengths = dict(chosen_lengths=torch.tensor([chosen_length]), rejected_lengths=torch.tensor([10]))
        options = LossOptions(length_penalty=penalty)
        compute_online_dpo_loss(chosen, *(x.float() for x in ONE_PAIR[1:]), 0.5, **lengths, options=options).backward()
        return -chosen.grad.item()

    assert slope(20, 0.1) < slope(20, 0.0) == slope(10, 0.1) < slope(5, 0.1)


def test_where_the_chosen_response_has_lost_nothing_dpop_is_dpo():
    """At the reference too: there the penalty has a kink, and pulls to neither side."""
    chosen = torch.tensor([-3.0, -2.0], requires_grad=True)
    reference = torch.tensor([-3.0, -3.0])
    slopes = []
    for name in ("dpop", "sigmoid"):
        loss = compute_online_dpo_loss(chosen, reference, reference, reference, 0.5, loss_type=name)
        slopes.append(torch.autograd.grad(loss, chosen)[0].tolist())
    assert slopes[0] == slopes[1]


def test_the_alpha_divergence_lies_between_the_kls():
    ratios = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for coef, kind in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        torch.testing.assert_close(f_score(ratios, "alpha_divergence", coef), f_score(ratios, kind))
    near = f_score(ratios, "alpha_divergence", 1 - 1e-5)
    torch.testing.assert_close(near, ratios, rtol=1e-4, atol=1e-4)


def test_an_unknown_divergence_is_named():
    with pytest.raises(ValueError, match="f_divergence_type is 'kl': choose one of reverse_kl, forward_kl"):
        f_score(torch.zeros(1), "kl")


def test_options_are_no_dict():
    with pytest.raises(ValueError, match=r"options is of type dict: pass LossOptions\("):
        check_loss_settings("sigmoid", 0.1, options={"ld_alpha": 0.5})


def test_sft_takes_the_whole_response_beside_ld_alpha():
    """The losses compare the first tokens of responses then; the likelihood to hold up is that of all of them."""
    loss = compute_online_dpo_loss(
        *ONE_PAIR,
        0.5,
        loss_type="sft",
        whole_chosen_logps=torch.tensor([-6.0]),
        options=LossOptions(ld_alpha=0.0),
        **LENGTHS,
    )
    assert loss.item() == pytest.approx(3.0)  # 6 nats over 2 tokens


def test_wpo_weight_multiplies_the_losses():
    settings = dict(options=LossOptions(use_weighting=True), wpo_weight=torch.tensor([0.5, 0.25]))
    losses = compute_online_dpo_loss(*two_pairs(), 0.5, reduction="none", **settings)
    assert losses.tolist() == pytest.approx([0.5 * 0.3132616875, 0.25 * 4.0181499279])
    loss = compute_online_dpo_loss(*two_pairs(), 0.5, **settings)
    assert loss.item() == pytest.approx((0.5 * 0.3132616875 + 0.25 * 4.0181499279) / 2)


WEIGHTED, DESENSITIZED = LossOptions(use_weighting=True), LossOptions(ld_alpha=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(options=WEIGHTED), "use_weighting is True, wpo_weight is missing: set it and pass"),
        (dict(wpo_weight=torch.ones(1)), "use_weighting is False, wpo_weight is there"),
        (dict(options=WEIGHTED, wpo_weight=torch.ones(1, 1)), r"'wpo_weight': \(1, 1\)"),
        (dict(options=DESENSITIZED), "ld_alpha is 0.5, which weighs tokens.*whole_chosen_logps"),
        (dict(options=DESENSITIZED, loss_type="sft", **LENGTHS), "ld_alpha is 0.5.*whole_chosen_logps"),
        (dict(options=DESENSITIZED, whole_chosen_logps=torch.ones(2)), r"'whole_chosen_logps': \(2,\)"),
    ],
)
def test_an_option_that_takes_tokens_is_no_plain_loss(given, message):
    """The plain loss would come out, as if the option had not been set."""
    with pytest.raises(ValueError, match=message):
        compute_online_dpo_loss(*ONE_PAIR, 0.5, **given)


def test_a_length_penalty_takes_lengths():
    with pytest.raises(ValueError, match="a length_penalty needs lengths: pass chosen_lengths"):
        compute_online_dpo_loss(*ONE_PAIR, 0.5, options=LossOptions(length_penalty=0.1))


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "exo_pair", "discopop", "sigmoid_norm"])
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_f_divergences_stay_finite(name, kind):
    sizes = torch.tensor([-1e4, -88.8, -1.0, 0.0, 1.0, 1e4])
    chosen, rejected = (ratios.clone().requires_grad_() for ratios in torch.cartesian_prod(sizes, sizes).unbind(1))
    zeros, lengths = torch.zeros_like(chosen), torch.ones(len(chosen), dtype=torch.long)
    losses = compute_online_dpo_loss(
        chosen,
        rejected,
        zeros,
        zeros,
        0.1,
        0.1,
        name,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        options=LossOptions(f_divergence_type=kind),
        reduction="none",
    )
    gradients = torch.autograd.grad(losses.sum(), [chosen, rejected])
    assert losses.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_docs_and_config_name_every_loss_and_option():
    document, config = ((ROOT / name).read_text() for name in ("docs/losses.md", "config/spin_trainer.yaml"))
    assert [name for name in LOSSES if f"`{name}`" not in document or name not in config] == []
    assert [name for name in vars(LossOptions()) if f"`dpo_{name}`" not in document] == []


def test_the_configs_defaults_are_the_options_own():
    config = yaml.safe_load((ROOT / "config/spin_trainer.yaml").read_text())
    assert LossOptions.of(config["algorithm"]) == LossOptions()


def test_options_have_the_configs_names():
    algorithm = {f"dpo_{name}": number for number, name in enumerate(vars(LossOptions()))} | {"dpo_beta": 0.1}
    assert vars(LossOptions.of(algorithm)) == {name: number for number, name in enumerate(vars(LossOptions()))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(simpo_gamma=-1), r"dpo_simpo_gamma\) is -1: give a number >= 0"),
        (dict(dpop_lambda="5"), r"dpo_dpop_lambda\) is '5'"),
        (dict(length_penalty=-0.1), r"dpo_length_penalty\) is -0.1.*taken off"),
        (dict(length_penalty=float("nan")), r"dpo_length_penalty\) is nan"),
        (dict(f_divergence_type="kl"), r"dpo_f_divergence_type\) is 'kl'.*reverse_kl, forward_kl, js_divergence"),
        (dict(f_alpha_divergence_coef=None), r"dpo_f_alpha_divergence_coef\) is None"),
        (dict(ld_alpha=1.5), r"dpo_ld_alpha\) is 1.5: give a share from 0 to 1, or null"),
        (dict(ld_alpha=True), r"dpo_ld_alpha\) is True"),
        (dict(use_weighting=1), r"dpo_use_weighting\) is 1: must be true or false"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        check_loss_settings("sigmoid", 0.1, options=LossOptions(**options))


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (
            dict(loss_type="simpo"),
            dict(ld_alpha=0.5),
            "dpo_ld_alpha is 0.5, which the loss simpo does not take.*sigmoid",
        ),
        (dict(loss_type="simpo", average_log_prob=True), {}, "dpo_average_log_prob is true, but the loss simpo"),
        (dict(loss_type="simpo"), dict(length_penalty=0.1), "dpo_length_penalty is 0.1, which the loss simpo"),
        (dict(loss_type="dpop", reference_free=True), {}, "dpo_reference_free is true, but the loss dpop"),
        (dict(loss_type="dpop"), dict(f_divergence_type="forward_kl"), "dpo_f_divergence_type is 'forward_kl'.*dpop"),
        (dict(loss_type="aot"), dict(use_weighting=True), "dpo_use_weighting is true, but the loss aot sorts"),
        (dict(loss_type="aot"), dict(ld_alpha=0.0), "dpo_ld_alpha is 0.0, which the loss aot does not take"),
        (dict(loss_type=["sigmoid", "nca_pair"]), dict(f_divergence_type="js_divergence"), "the loss nca_pair"),
        (dict(loss_type="ipo"), dict(length_penalty=0.1), "dpo_length_penalty is 0.1, which the loss ipo"),
        (dict(average_log_prob=True), dict(ld_alpha=0.5), "dpo_ld_alpha is 0.5 and takes sums.*dpo_average_log_prob"),
        (dict(average_log_prob=True), dict(f_divergence_type="forward_kl"), "takes sums: set dpo_average_log_prob"),
        (dict(reference_free=True), dict(f_divergence_type="forward_kl"), "but dpo_reference_free is true"),
    ],
)
def test_combinations_that_make_no_sense(settings, options, message):
    with pytest.raises(ValueError, match=message):
        check_loss_settings(**dict(dict(loss_type="sigmoid", beta=0.1), **settings), options=LossOptions(**options))


def test_combinations_that_are_fine():
    every = LossOptions(length_penalty=0.1, f_divergence_type="alpha_divergence", ld_alpha=0.5, use_weighting=True)
    for names in ("sigmoid", ["sigmoid", "sft"], ["robust", "exo_pair", "hinge", "discopop"]):
        check_loss_settings(names, 0.1, 0.1, options=every)
    check_loss_settings("simpo", 2.0, reference_free=True, options=LossOptions(use_weighting=True))
    check_loss_settings("dpop", 0.3, options=LossOptions(length_penalty=0.1))


# ---- check_loss_settings, register_loss


def test_settings_that_are_fine():
    assert check_loss_settings("sigmoid", 0.1) == [("sigmoid", 1.0)]
    assert check_loss_settings(("sigmoid", "sft"), 1, 0.5, (0.5, 2)) == [("sigmoid", 0.5), ("sft", 2)]
    assert check_loss_settings(["exo_pair", "robust"], 0.1, 0.001) == [("exo_pair", 1.0), ("robust", 1.0)]
    assert check_loss_settings("ipo", 0.1, average_log_prob=True) == [("ipo", 1.0)]
    for name in set(LOSSES) - {"exo_pair"}:
        check_loss_settings(name, 0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss_type="sympo"), r"dpo_loss_type\) is 'sympo'.*sigmoid, hinge, ipo"),
        (dict(loss_type=["sigmoid", "dpo"]), r"dpo_loss_type\) is \['sigmoid', 'dpo'\]"),
        (dict(loss_type=[]), r"dpo_loss_type\) is \[\]"),
        (dict(beta=0.0), r"dpo_beta\).* 0\.0.*> 0"),
        (dict(beta=-1), r"dpo_beta\).* -1"),
        (dict(beta=float("inf")), r"dpo_beta\).* inf"),
        (dict(beta="0.1"), r"dpo_beta\).* '0.1'"),
        (dict(beta=True), r"dpo_beta\).* True"),
        (dict(beta=None), r"dpo_beta\).* None"),
        (dict(label_smoothing=-0.1), r"dpo_label_smoothing\) is -0.1.*0 to 0.5"),
        (dict(label_smoothing=0.6), r"dpo_label_smoothing\) is 0.6"),
        (dict(label_smoothing=None), r"dpo_label_smoothing\) is None"),
        (dict(loss_type="robust", label_smoothing=0.5), r"dpo_label_smoothing\) is 0.5.*below 0.5 for robust"),
        (dict(loss_type=["sft", "exo_pair"]), r"dpo_label_smoothing\) is 0.0.*above 0 for exo_pair"),
        (dict(loss_weights=[]), r"dpo_loss_weights\) is \[\].*\['sigmoid'\]"),
        (dict(loss_weights=[1.0, 2.0]), r"dpo_loss_weights\) is \[1.0, 2.0\]"),
        (dict(loss_weights=["1"]), r"dpo_loss_weights\) is \['1'\]"),
        (dict(loss_weights=[float("nan")]), r"dpo_loss_weights\) is \[nan\]"),
        (dict(loss_type=["sigmoid", "sft"], loss_weights=[0, 0.0]), r"dpo_loss_weights\) is \[0, 0.0\].*one > 0"),
        (dict(discopop_tau=0.0), r"dpo_discopop_tau\) is 0.0"),
        (dict(discopop_tau=1.5), r"dpo_discopop_tau\) is 1.5"),
        (dict(loss_type="sft", average_log_prob=True), "dpo_average_log_prob is true, but the loss sft"),
        (dict(loss_type="sigmoid_norm", average_log_prob=True), "dpo_average_log_prob is true, but .* sigmoid_norm"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        check_loss_settings(**dict(dict(loss_type="sigmoid", beta=0.1), **settings))


def test_a_recipe_can_register_its_own_loss(monkeypatch):
    monkeypatch.setattr("recipe.spin.losses.LOSSES", dict(LOSSES))

    @register_loss("linear", batch_coupled=True)
    def linear(p: PairLogps) -> torch.Tensor:
        return -p.beta * p.h

    assert compute_online_dpo_loss(*ONE_PAIR, 0.5, loss_type="linear").item() == -1.0  # -0.5 * 2
    with pytest.raises(ValueError, match="'linear' is registered already"):
        register_loss("linear")(linear)
    with pytest.raises(
        ValueError, match="loss 'other' takes nope: choose from f_divergence_type, length_penalty, ld_alpha"
    ):
        register_loss("other", takes={"nope"})
    assert "linear" not in LOSSES
