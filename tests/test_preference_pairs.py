"""Which responses make pairs, against numbers worked out by hand."""

import pytest
import torch

from recipe.spin.core_algos import compute_onlineDPO_pref, compute_self_play_pref, penalize_missing_eos


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


@pytest.mark.parametrize(
    ("scores", "margin", "pairs"),
    [
        ([0.4, 0.3], 0.1, 1),  # in float32 their gaps are 0.09999999, 0.09999996 and 0.10000002
        ([0.9, 0.8], 0.1, 1),
        ([0.8, 0.7], 0.1, 1),
        ([1000.4, 1000.3], 0.1, 1),
        ([0.4, 0.301], 0.1, 0),
        ([0.3, 0.3], 0.0, 0),
        ([1.0, 1.0 - 2**-24], 0.0, 1),  # neighbours in float32
        ([1e-8, 0.0], 0.1, 0),
    ],
)
def test_min_margin_is_the_decimal_number(scores, margin, pairs):
    assert len(prefer(scores, min_margin=margin)[0]) == len(prefer(scores[::-1], min_margin=margin)[0]) == pairs


def test_margins_have_no_gradient():
    rewards = torch.tensor([[1.0], [0.0]], requires_grad=True)
    assert not compute_onlineDPO_pref(rewards, torch.ones(2, 1)).margin.requires_grad


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
        (dict(n=2.0), r"rollout\.n\) is 2\.0.*a whole number"),
        (dict(scored=torch.ones(4, 1, dtype=torch.bool)), r"'scored': \(4, 1\), 'responses': \(4,\)"),
        (dict(scored=torch.ones(2, dtype=torch.bool)), r"'scored': \(2,\)"),
        (dict(scored=torch.ones(4)), r"scored is of dtype torch.float32: pass booleans"),
        (dict(scored=[True] * 4), "scored is of type list: pass a tensor"),
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


@pytest.mark.parametrize(
    ("differs", "n"), [(torch.ones(5), 2), (torch.ones(4, 1), 2), (torch.ones(4), 0), (torch.ones(4), 2.0)]
)
def test_self_play_refuses_incomplete_prompts(differs, n):
    with pytest.raises(ValueError, match="keep prompts complete"):
        compute_self_play_pref(differs, n)
