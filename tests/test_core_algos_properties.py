"""What must hold of preferences and losses for any input."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recipe.spin.core_algos import (
    LOSSES,
    PAIRINGS,
    TIE_POLICIES,
    PairLogps,
    beta_at,
    compute_online_dpo_loss,
    compute_onlineDPO_pref,
    sequence_logps,
)

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)

H_BASED = [
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "discopop",
    "aot",
]  # a common shift of both responses cancels
PER_PAIR = sorted(name for name, loss in LOSSES.items() if not loss.batch_coupled)
betas = st.floats(0.01, 2.0)
smoothings = st.floats(0.01, 0.45)
close = dict(rtol=1e-9, atol=1e-9)


@st.composite
def pairs_of_logps(draw):
    """Log-probs and lengths of 1 to 6 pairs, as keyword arguments of PairLogps."""
    size = draw(st.integers(1, 6))
    logps = st.lists(st.floats(-30.0, 0.0), min_size=size, max_size=size)
    lengths = st.lists(st.integers(1, 20), min_size=size, max_size=size)
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    drawn = {name: torch.tensor(draw(logps), dtype=torch.float64) for name in names}
    return drawn | {name: torch.tensor(draw(lengths)) for name in ("chosen_lengths", "rejected_lengths")}


@st.composite
def scored_groups(draw):
    """Integer token rewards (B*n, T), a mask, and n: integers make ties, and keep sums and shifts exact."""
    prompts, n, tokens = draw(st.integers(0, 4)), draw(st.integers(2, 5)), draw(st.integers(1, 3))
    rows = prompts * n
    cells = st.lists(st.integers(-3, 3), min_size=rows * tokens, max_size=rows * tokens)
    rewards = torch.tensor(draw(cells), dtype=torch.float32).view(rows, tokens)
    mask = torch.tensor(draw(cells), dtype=torch.float32).view(rows, tokens) > -2
    return rewards, mask, n


def loss_of(name, logps, beta, eps, reduction="none"):
    renamed = {f"{key}_logps" if not key.endswith("lengths") else key: value for key, value in logps.items()}
    return compute_online_dpo_loss(**renamed, beta=beta, label_smoothing=eps, loss_type=name, reduction=reduction)


def swapped(logps):
    mirror = {"chosen": "rejected", "rejected": "chosen"}
    return {"_".join(mirror.get(word, word) for word in key.split("_")): value for key, value in logps.items()}


# ---- losses


@quick
@given(pairs_of_logps(), betas, smoothings)
def test_swapping_chosen_and_rejected_flips_h_and_the_labels(logps, beta, eps):
    pair, mirrored = PairLogps(**logps, beta=beta), PairLogps(**swapped(logps), beta=beta)
    torch.testing.assert_close(mirrored.h, -pair.h, **close)
    # a wrong label with probability eps is, seen from the other side, a wrong one with probability 1 - eps
    for name in ("sigmoid", "exo_pair"):
        ours = LOSSES[name].function(PairLogps(**logps, beta=beta, label_smoothing=eps))
        theirs = LOSSES[name].function(PairLogps(**swapped(logps), beta=beta, label_smoothing=1 - eps))
        torch.testing.assert_close(ours, theirs, **close)


@quick
@given(pairs_of_logps(), betas, smoothings, st.floats(-50, 50))
@pytest.mark.parametrize("name", H_BASED)
def test_a_common_shift_of_a_models_log_probs_cancels(name, logps, beta, eps, shift):
    for model in ("policy", "reference"):
        shifted = {key: value + shift if key.startswith(model) else value for key, value in logps.items()}
        torch.testing.assert_close(
            loss_of(name, shifted, beta, eps), loss_of(name, logps, beta, eps), rtol=1e-8, atol=1e-8
        )


@quick
@given(pairs_of_logps(), betas, smoothings, st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_permuting_pairs_permutes_their_losses(name, logps, beta, eps, random):
    order = list(range(len(logps["policy_chosen"])))
    random.shuffle(order)
    permuted = {key: value[order] for key, value in logps.items()}
    losses, moved = loss_of(name, logps, beta, eps), loss_of(name, permuted, beta, eps)
    torch.testing.assert_close(moved.mean(), losses.mean(), **close)
    if name in PER_PAIR:
        torch.testing.assert_close(moved, losses[order], **close)


@quick
@given(pairs_of_logps(), betas, smoothings)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_reductions_agree_and_weights_scale(name, logps, beta, eps):
    losses = loss_of(name, logps, beta, eps)
    torch.testing.assert_close(loss_of(name, logps, beta, eps, "mean"), losses.mean(), **close)
    torch.testing.assert_close(loss_of([name, name], logps, beta, eps), 2 * losses, **close)


@quick
@given(pairs_of_logps(), betas)
@pytest.mark.parametrize(
    "name", ["sigmoid", "hinge", "bco_pair", "nca_pair", "apo_zero", "sigmoid_norm", "aot", "sppo_hard"]
)
def test_the_gradient_never_raises_the_rejected(name, logps, beta):
    """At the reference itself the chosen goes up and the rejected goes down."""
    policy = {key: value.clone().requires_grad_() for key, value in logps.items() if key.startswith("policy")}
    reference = {key.replace("policy", "reference"): value.detach() for key, value in policy.items()}
    loss_of(name, logps | policy | reference, beta, 0.0, "mean").backward()
    assert (policy["policy_chosen"].grad < 0).all() and (policy["policy_rejected"].grad >= 0).all()


# ---- preferences


def scores_of(rewards, mask):
    return (rewards * mask).sum(1)


def prefer(group, **options):
    rewards, mask, n = group
    return compute_onlineDPO_pref(rewards, mask, n, generator=torch.Generator().manual_seed(0), **options)


options = st.fixed_dictionaries(
    {
        "pairing": st.sampled_from(PAIRINGS),
        "tie_policy": st.sampled_from(TIE_POLICIES),
        "min_margin": st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    }
)


@quick
@given(scored_groups(), options)
def test_pairs_stay_within_their_prompt_and_follow_the_scores(group, options):
    rewards, mask, n = group
    pairs, scores = prefer(group, **options), scores_of(rewards, mask)
    assert torch.equal(pairs.chosen // n, pairs.rejected // n) and (pairs.chosen != pairs.rejected).all()
    assert torch.equal(pairs.chosen // n, (pairs.chosen // n).sort().values)
    difference = scores[pairs.chosen] - scores[pairs.rejected]
    decided = pairs.margin > 0
    assert torch.equal(pairs.margin[decided], difference[decided])
    assert (pairs.margin[decided] >= options["min_margin"]).all()
    assert options["tie_policy"] == "first" or decided.all()
    if options["min_margin"] == 0:
        assert (difference >= 0).all()


@quick
@given(scored_groups(), options)
def test_every_prompt_is_decided_where_it_can_be(group, options):
    rewards, mask, n = group
    pairs, scores = prefer(group, **options), scores_of(rewards, mask).view(-1, n)
    per_prompt = torch.bincount(pairs.chosen // n, minlength=len(scores))
    spread = scores.amax(1) - scores.amin(1)
    decidable = (spread > 0) & (spread >= options["min_margin"])
    assert torch.equal(per_prompt > 0, decidable | (options["tie_policy"] == "first"))
    if options["pairing"] != "all":
        assert (per_prompt <= 1).all()
    totals = torch.zeros(len(scores)).index_add_(0, pairs.chosen // n, pairs.weight)
    torch.testing.assert_close(totals, (per_prompt > 0).float())


@quick
@given(scored_groups())
def test_best_against_worst_is_the_widest_gap(group):
    rewards, mask, n = group
    pairs, scores = prefer(group), scores_of(rewards, mask).view(-1, n)
    prompts = pairs.chosen // n
    assert torch.equal(pairs.margin, (scores.amax(1) - scores.amin(1))[prompts])
    assert torch.equal(pairs.chosen % n, scores.argmax(1)[prompts])
    assert torch.equal(pairs.rejected % n, scores.argmin(1)[prompts])


@quick
@given(scored_groups(), options, st.sampled_from([0.25, 2.0, 8.0]), st.integers(-5, 5))
def test_scaling_and_shifting_scores_leaves_the_pairs(group, options, scale, shift):
    rewards, mask, n = group
    assume(len(rewards))
    scores = scores_of(rewards, mask)[:, None]
    before = prefer((scores, torch.ones_like(scores), n), **options)
    rescaled = options | {"min_margin": options["min_margin"] * scale}
    after = prefer((scores * scale + shift, torch.ones_like(scores), n), **rescaled)
    assert torch.equal(before.chosen, after.chosen) and torch.equal(before.rejected, after.rejected)
    assert torch.equal(before.margin * scale, after.margin)


@quick
@given(scored_groups(), st.sampled_from([0.0, 1.0]))
def test_negating_the_scores_swaps_all_pairs(group, min_margin):
    rewards, mask, n = group
    pairs, mirrored = (prefer((sign * rewards, mask, n), pairing="all", min_margin=min_margin) for sign in (1, -1))
    forward = zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)
    assert set(forward) == set(zip(mirrored.rejected.tolist(), mirrored.chosen.tolist(), strict=True))


@quick
@given(scored_groups(), options, st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_what_is_masked_does_not_matter(group, options, garbage):
    rewards, mask, n = group
    clean, dirty = prefer(group, **options), prefer((rewards.masked_fill(~mask, garbage), mask, n), **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    dirty_logps = rewards.masked_fill(~mask, garbage)
    assert torch.equal(sequence_logps(dirty_logps, mask), scores_of(rewards, mask))


# ---- beta


@quick
@given(st.sampled_from(["linear", "cosine"]), st.floats(0.01, 5), st.floats(0.01, 5), st.integers(1, 50))
def test_schedules_run_monotonically_from_start_to_end(kind, start, end, steps):
    values = [beta_at({"schedule": kind, "start": start, "end": end}, step, steps) for step in range(1, steps + 1)]
    assert values[0] == start and (steps == 1 or values[-1] == end)
    rising = sorted(values, reverse=end < start)
    assert values == pytest.approx(rising)
