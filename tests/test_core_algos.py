"""Preferences, log-probs, losses and beta schedules against numbers worked out by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipe.spin.core_algos import (
    LOSSES,
    PairLogps,
    beta_at,
    check_loss_settings,
    compute_online_dpo_loss,
    compute_onlineDPO_pref,
    compute_self_play_pref,
    implicit_rewards,
    penalize_missing_eos,
    register_loss,
    sequence_logps,
)

ROOT = Path(__file__).resolve().parents[1]


def prefer(scores, n=2, **options):
    """Pairs of responses with the given scores, as lists."""
    rewards = torch.tensor(scores, dtype=torch.float32)[:, None]
    pairs = compute_onlineDPO_pref(rewards, torch.ones_like(rewards), n, **options)
    return [pytest.approx(field.tolist()) if field.is_floating_point() else field.tolist() for field in pairs]


# ---- compute_onlineDPO_pref


def test_the_higher_score_is_chosen():
    # prompt 0: rows 0 (1.0) and 1 (3.0), so row 1 wins by 2; prompt 1: rows 2 (0.5) and 3 (-0.5), so row 2 wins by 1
    assert prefer([1.0, 3.0, 0.5, -0.5]) == [[1, 2], [0, 3], [2.0, 1.0], [1.0, 1.0]]


def test_types_and_shapes():
    rewards = torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16)
    pairs = compute_onlineDPO_pref(rewards, torch.ones(2, 1, dtype=torch.bool))
    assert [field.dtype for field in pairs] == [torch.int64, torch.int64, torch.float32, torch.float32]
    assert [tuple(field.shape) for field in pairs] == [(1,)] * 4


def test_score_is_the_sum_over_the_mask_and_garbage_elsewhere_is_never_read():
    nan, inf = float("nan"), float("inf")
    rewards = torch.tensor([[0.5, 0.25, nan], [1.0, 99.0, inf]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    pairs = compute_onlineDPO_pref(rewards, mask)
    # 0.5 + 0.25 = 0.75 against 1.0: row 1 wins by 0.25 (99 would make it 99.25)
    assert (pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.margin.tolist()) == ([1], [0], [0.25])


def test_a_tie_does_not_hang_on_the_order_of_summation():
    # in float32 1e8 + 1 - 1e8 is 0, and 1e8 - 1e8 + 1 is 1: both mean 1
    rewards = torch.tensor([[1e8, 1.0, -1e8], [1e8, -1e8, 1.0]])
    assert len(compute_onlineDPO_pref(rewards, torch.ones(2, 3)).chosen) == 0


def test_ties_are_dropped():
    assert prefer([1.0, 1.0, 0.0, 2.0]) == [[3], [2], [2.0], [1.0]]


def test_ties_go_to_the_first_response_by_tie_policy_first():
    assert prefer([1.0, 1.0, 0.0, 2.0], tie_policy="first") == [[0, 3], [1, 2], [0.0, 2.0], [1.0, 1.0]]


@pytest.mark.parametrize("pairing", ["best_worst", "random", "all"])
def test_all_tied_gives_no_pairs_at_all(pairing):
    assert prefer([1.0] * 6, n=3, pairing=pairing) == [[], [], [], []]
    assert prefer([1.0] * 6, n=3, pairing=pairing, tie_policy="first") == [[0, 3], [2, 5], [0.0, 0.0], [1.0, 1.0]]


def test_a_batch_of_no_prompts():
    rewards = torch.zeros(0, 5)
    assert [len(field) for field in compute_onlineDPO_pref(rewards, rewards, 3, tie_policy="first")] == [0] * 4


def test_min_margin_makes_near_scores_tie():
    # gaps 0.25 and 0.5: at least 0.5 is kept
    assert prefer([0.25, 0.0, 0.0, 0.5], min_margin=0.5) == [[3], [2], [0.5], [1.0]]


@pytest.mark.parametrize("pairing", ["best_worst", "random", "all"])
def test_first_decides_within_min_margin_even_against_the_scores(pairing):
    # rows 0 and 1 differ by 0.25 < 0.5: a tie, so row 0 is chosen though row 1 scores more, and the margin counts as 0
    assert prefer([0.0, 0.25], min_margin=0.5, tie_policy="first", pairing=pairing) == [[0], [1], [0.0], [1.0]]


def test_best_against_worst_of_three():
    # prompt 0: best row 2 (5), worst row 1 (-1); prompt 1: two best, the first (row 3) counts, worst row 5
    assert prefer([0.0, -1.0, 5.0, 2.0, 2.0, 1.0], n=3) == [[2, 3], [1, 5], [6.0, 1.0], [1.0, 1.0]]


def test_best_against_worst_of_four():
    # best row 1 (4); worst are rows 0 and 3 (1), the first counts
    assert prefer([1.0, 4.0, 2.0, 1.0], n=4) == [[1], [0], [3.0], [1.0]]


def test_all_pairs_of_three():
    # prompt 0: 3 > 2 > 1 gives 0>1, 0>2, 1>2, each weighing 1/3; prompt 1: 0, 1, 1 gives 4>3 and 5>3, each 1/2
    assert prefer([3.0, 2.0, 1.0, 0.0, 1.0, 1.0], n=3, pairing="all") == [
        [0, 0, 1, 4, 5],
        [1, 2, 2, 3, 3],
        [1.0, 2.0, 1.0, 1.0, 1.0],
        [1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2],
    ]


def test_all_pairs_of_four_with_min_margin_and_a_tied_prompt():
    # scores 0, 1, 2, 4 and a gap of 2 or more: 2>0 (2), 3>0 (4), 3>1 (3), 3>2 (2); prompt 1 is tied: row 4 before row 7
    assert prefer([0.0, 1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0], n=4, pairing="all", min_margin=2.0, tie_policy="first") == [
        [2, 3, 3, 3, 4],
        [0, 0, 1, 2, 7],
        [2.0, 4.0, 3.0, 2.0, 0.0],
        [0.25, 0.25, 0.25, 0.25, 1.0],
    ]


def test_a_response_without_a_score_takes_part_in_no_pair():
    nan = float("nan")
    # prompt 0: of 1, 3, 2 and none; prompt 1: one score alone; prompt 2: none at all
    scores = [1.0, 3.0, nan, 2.0] + [nan, 5.0, nan, nan] + [nan] * 4
    scored = ~torch.tensor(scores).isnan()
    assert prefer(scores, n=4, scored=scored) == [[1], [0], [2.0], [1.0]]
    assert prefer(scores, n=4, scored=scored, pairing="all")[:3] == [[1, 1, 3], [0, 3, 0], [2.0, 1.0, 1.0]]


def test_of_ties_the_first_scored_response_is_preferred_to_the_last():
    nan = float("nan")
    scores = [nan, 1.0, 1.0, nan] + [nan, 1.0, nan, nan]
    scored = ~torch.tensor(scores).isnan()
    assert prefer(scores, n=4, tie_policy="first", scored=scored) == [[1], [2], [0.0], [1.0]]
    with pytest.raises(ValueError, match="finite"):
        prefer(scores, n=4)


def test_random_draws_every_untied_pair_equally_often():
    prompts = 3000
    scores = torch.tensor([1.0, 0.0, 1.0, 2.0]).repeat(prompts)[:, None]
    generator = torch.Generator().manual_seed(0)
    pairs = compute_onlineDPO_pref(scores, torch.ones_like(scores), 4, pairing="random", generator=generator)
    assert (pairs.chosen // 4).tolist() == list(range(prompts))
    drawn = torch.stack([pairs.chosen % 4, pairs.rejected % 4], dim=1)
    kinds, counts = drawn.unique(dim=0, return_counts=True)
    # untied: 0>1, 2>1, 3>0, 3>1, 3>2; 3000 / 5 = 600 each, standard deviation sqrt(3000 * 0.2 * 0.8) = 22
    assert kinds.tolist() == [[0, 1], [2, 1], [3, 0], [3, 1], [3, 2]]
    assert ((counts - 600).abs() < 5 * 22).all()
    assert (pairs.weight == 1).all()


def test_random_is_repeatable_by_its_generator():
    def draw(seed):
        return prefer(list(range(60)), n=6, pairing="random", generator=torch.Generator().manual_seed(seed))[:2]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n=3), r"4 rows, no multiple of n=3"),
        (dict(n=1), r"rollout\.n\) is 1.*at least 2"),
        (dict(pairing="median"), r"dpo_pairing\) is 'median'.*best_worst, random, all"),
        (dict(tie_policy="coin"), r"dpo_tie_policy\) is 'coin'.*drop, first"),
        (dict(min_margin=-0.1), r"dpo_min_margin\) is -0.1.*>= 0"),
        (dict(min_margin=float("nan")), r"dpo_min_margin\) is nan"),
        (dict(min_margin="0.1"), r"dpo_min_margin\) is '0.1'"),
    ],
)
def test_preference_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        prefer([1.0, 2.0, 3.0, 4.0], **options)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"'token_level_rewards': \(4, 3\), 'response_mask': \(4, 1\).*\(B\*n, T\)"):
        compute_onlineDPO_pref(torch.zeros(4, 3), torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"must be \(B\*n, T\)|each must be"):
        compute_onlineDPO_pref(torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_names_its_row(bad):
    with pytest.raises(ValueError, match=rf"row 4 \(prompt 1, response 1\) has score {bad}.*finite"):
        prefer([1.0, 2.0, 3.0, 4.0, bad, bad], n=3)


# ---- penalize_missing_eos


def test_missing_eos_costs_the_penalty():
    scores, ended = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([True, False, False])
    assert penalize_missing_eos(scores, ended, 0.5).tolist() == [1.0, 0.5, -2.5]
    assert scores.tolist() == [1.0, 1.0, -2.0]  # its input is left alone


def test_missing_eos_errors():
    with pytest.raises(ValueError, match="missing_eos_penalty is -1"):
        penalize_missing_eos(torch.zeros(2), torch.ones(2), -1)
    with pytest.raises(ValueError, match=r"'scores': \(2,\), 'ended': \(3,\)"):
        penalize_missing_eos(torch.zeros(2), torch.ones(3), 1.0)


# ---- sequence_logps, implicit_rewards

GARBAGE = float("nan")


def test_sequence_logps_sum_and_mean():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, GARBAGE, float("-inf")], [GARBAGE, 7.0, GARBAGE]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert sequence_logps(logps, mask).tolist() == [-6.0, -4.0, 0.0]
    assert sequence_logps(logps, mask, average=True).tolist() == [-2.0, -4.0, 0.0]  # -6 / 3, -4 / 1, nothing


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logps_gradient_stays_inside_the_mask(average):
    logps = torch.tensor([[-1.0, -2.0, GARBAGE], [GARBAGE, float("inf"), -1.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    sequence_logps(logps, mask, average).sum().backward()
    share = 0.5 if average else 1.0
    assert logps.grad.tolist() == [[share, share, 0.0], [0.0, 0.0, 0.0]]


def test_sequence_logps_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"'token_logps': \(2, 3\), 'response_mask': \(1, 3\)"):
        sequence_logps(torch.zeros(2, 3), torch.ones(1, 3))


def test_implicit_rewards():
    # 0.1 * (-2 - -5) = 0.3
    assert implicit_rewards(torch.tensor([-2.0]), torch.tensor([-5.0]), 0.1).tolist() == pytest.approx([0.3])


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
    ],
)
def test_losses_by_hand(name, beta, eps, expected):
    loss = compute_online_dpo_loss(*ONE_PAIR, beta, eps, name, discopop_tau=0.5, **LENGTHS)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


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
    assert {name for name, loss in LOSSES.items() if loss.needs_lengths} == {"sigmoid_norm", "sft"}


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
    with pytest.raises(ValueError, match=r"'policy_rejected': \(2,\)"):  # would broadcast
        compute_online_dpo_loss(chosen, rejected.expand(2), *reference, 0.1)
    with pytest.raises(ValueError, match=r"'chosen_lengths': \(3,\)"):
        compute_online_dpo_loss(*ONE_PAIR, 0.1, chosen_lengths=torch.ones(3))
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
    with pytest.raises(ValueError, match="discopop_tau is 0.0"):
        compute_online_dpo_loss(*ONE_PAIR, 0.1, discopop_tau=0.0)


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
        (dict(loss_type="simpo"), r"dpo_loss_type\) is 'simpo'.*sigmoid, hinge, ipo"),
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
        (dict(discopop_tau=0.0), "discopop_tau is 0.0"),
        (dict(discopop_tau=1.5), "discopop_tau is 1.5"),
        (dict(loss_type="sft", average_log_prob=True), "dpo_average_log_prob is true, but the loss sft"),
        (dict(loss_type="sigmoid_norm", average_log_prob=True), "dpo_average_log_prob is true, but .* sigmoid_norm"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        check_loss_settings(**dict(dict(loss_type="sigmoid", beta=0.1), **settings))


def test_a_recipe_can_register_its_own_loss(monkeypatch):
    monkeypatch.setattr("recipe.spin.core_algos.LOSSES", dict(LOSSES))

    @register_loss("linear", batch_coupled=True)
    def linear(p: PairLogps) -> torch.Tensor:
        return -p.beta * p.h

    assert compute_online_dpo_loss(*ONE_PAIR, 0.5, loss_type="linear").item() == -1.0  # -0.5 * 2
    with pytest.raises(ValueError, match="'linear' is registered already"):
        register_loss("linear")(linear)
    assert "linear" not in LOSSES


# ---- beta_at


def test_a_number_is_beta_at_every_step():
    assert beta_at(0.1, 1, 10) == beta_at(0.1, 10, 10) == 0.1


def test_linear_and_cosine():
    linear = {"schedule": "linear", "start": 0.1, "end": 0.5}
    # 5 steps are 4 strides of 0.1
    assert [beta_at(linear, step, 5) for step in range(1, 6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    cosine = {"schedule": "cosine", "start": 0.5, "end": 0.1}
    # share of start (1 + cos(pi p)) / 2: 1, 0.8535533906, 0.5, 0.1464466094, 0
    assert [beta_at(cosine, step, 5) for step in range(1, 6)] == pytest.approx(
        [0.5, 0.44142135624, 0.3, 0.15857864376, 0.1]
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_first_and_last_step_are_exact(kind):
    schedule = {"schedule": kind, "start": 0.1, "end": 0.7}
    assert (beta_at(schedule, 1, 7), beta_at(schedule, 7, 7), beta_at(schedule, 1, 1)) == (0.1, 0.7, 0.1)


def test_a_list_by_epoch_whose_last_value_holds_on():
    betas = [beta_at([0.3, 0.2], step, 7, steps_per_epoch=2) for step in range(1, 8)]
    assert betas == [0.3, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (0, r"dpo_beta\) is or contains 0"),
        ("0.1", r"dpo_beta\) is or contains '0.1'"),
        ([0.1, -0.1], r"dpo_beta\) is or contains -0.1"),
        ([], r"dpo_beta\) is \[\]"),
        ({"schedule": "step", "start": 0.1, "end": 0.2}, r"dpo_beta\).*linear or cosine"),
        ({"schedule": "linear", "start": 0.1}, r"dpo_beta\).*start and end"),
        ({"schedule": "linear", "start": 0.1, "end": 0.2, "stop": 0.3}, r"dpo_beta\).*'stop'"),
        ({"schedule": "linear", "start": 0.1, "end": 0.0}, r"dpo_beta\) is or contains 0.0"),
        ({"schedule": "linear", "start": "a", "end": 0.1}, r"dpo_beta\) is or contains 'a'"),
    ],
)
def test_schedules_that_make_no_sense(schedule, message):
    with pytest.raises(ValueError, match=message):
        beta_at(schedule, 1, 10, steps_per_epoch=5)


@pytest.mark.parametrize("steps_per_epoch", [None, 0])
def test_a_list_takes_steps_per_epoch(steps_per_epoch):
    with pytest.raises(ValueError, match=f"steps_per_epoch.*{steps_per_epoch}"):
        beta_at([0.1], 1, 10, steps_per_epoch)


@pytest.mark.parametrize("step", [0, 11])
def test_steps_count_from_one_to_the_last(step):
    with pytest.raises(ValueError, match=f"step is {step}.*total_steps=10"):
        beta_at(0.1, step, 10)


# ---- the module


def test_import_takes_torch_alone():
    """Other recipes import this module without paying for Ray, vLLM, verl or transformers."""
    code = (
        "import sys, recipe.spin.core_algos; "
        "print(*sorted({'ray', 'vllm', 'verl', 'transformers', 'tensordict', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# ---- Self-play on supervised data ------------------------------------------------------------------------------------
def test_self_play_pairs_the_data_with_each_response_that_differs_from_it():
    differs = torch.tensor([True, True, False, True, False, False])  # 3 prompts, 2 responses each
    pairs = compute_self_play_pref(differs, n=2)
    assert pairs.chosen.tolist() == [6, 6, 7]  # the data's responses stand behind the six of the opponent
    assert pairs.rejected.tolist() == [0, 1, 3]
    assert pairs.weight.tolist() == [0.5, 0.5, 1.0]
    assert pairs.margin.tolist() == [1.0, 1.0, 1.0]


def test_self_play_without_a_difference_gives_no_pair():
    assert compute_self_play_pref(torch.zeros(3, dtype=torch.bool)).chosen.tolist() == []


@pytest.mark.parametrize(("differs", "n"), [(torch.ones(5), 2), (torch.ones(4, 1), 2), (torch.ones(4), 0)])
def test_self_play_refuses_incomplete_prompts(differs, n):
    with pytest.raises(ValueError, match="keep prompts complete"):
        compute_self_play_pref(differs, n)
