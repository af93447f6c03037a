"""The order of rows over ranks and optimizer steps."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import plan

from recipe.spin.engine.plan import MiniBatch


def shares(planned, dp_size) -> list[list[list[tuple[int, bool]]]]:
    """(row, real) by rank and mini-batch: a rank's share is contiguous, its mini-batches in order."""
    entries = list(zip(planned.rows, planned.real, strict=True))
    per_rank = sum(mini_batch.rows_per_rank for mini_batch in planned.mini_batches)
    assert len(entries) == per_rank * dp_size
    result = []
    for rank in range(dp_size):
        share, start = entries[rank * per_rank : (rank + 1) * per_rank], 0
        result.append([])
        for mini_batch in planned.mini_batches:
            result[-1].append(share[start : start + mini_batch.rows_per_rank])
            start += mini_batch.rows_per_rank
    return result


def test_one_rank_gets_the_rows_in_order():
    planned = plan([0, 1, 3], weights=[1.0, 1.0, 1.0], lengths=[2, 4, 6])
    assert planned.rows == [0, 1, 2] and planned.real == [True] * 3
    assert planned.mini_batches == [MiniBatch(3, weight=3.0, mean_chosen_length=4.0)]


def test_a_mini_batch_without_a_chosen_token_counts_one():
    """The sft loss divides by the mean length; core_algos counts at least one token in a batch."""
    planned = plan([0, 1], lengths=[0, 0])
    assert planned.mini_batches == [MiniBatch(2, weight=2.0, mean_chosen_length=0.5)]


def test_mini_batches_are_cut_by_prompts():
    """Prompts 0-1, 2-3 (no pairs: left out) and 4-5; the numbers of rows differ."""
    planned = plan([0, 0, 1, 4], prompts_per_mini_batch=2, weights=[0.5, 0.5, 1.0, 1.0], lengths=[2, 4, 9, 7])
    assert planned.rows == [0, 1, 2, 3]
    assert planned.mini_batches == [MiniBatch(3, 2.0, mean_chosen_length=6.0), MiniBatch(1, 1.0, 7.0)]


def test_copies_are_of_the_shortest_row_and_do_not_count():
    planned = plan([0, 1, 2], dp_size=2, tokens=[30, 8, 20], lengths=[10, 2, 6])
    assert Counter(planned.rows) == {0: 1, 1: 2, 2: 1}
    assert sorted(pair for pair, real in zip(planned.rows, planned.real, strict=True) if not real) == [1]
    assert planned.mini_batches == [MiniBatch(2, weight=3.0, mean_chosen_length=6.0)]


def test_ranks_get_similar_token_counts():
    tokens = [100, 10, 90, 20]
    (first,), (second,) = shares(plan([0, 1, 2, 3], dp_size=2, tokens=tokens), 2)
    assert sorted(sum(tokens[pair] for pair, _ in rank) for rank in (first, second)) == [110, 110]


@pytest.mark.parametrize(
    ("rows", "dp_size", "most", "per_rank", "per_micro"),
    [
        (6, 1, 4, 6, 3),  # two micro-batches of 3, not 4 and 2
        (5, 1, 4, 6, 3),  # one copy
        (7, 1, 3, 9, 3),
        (5, 2, 8, 3, 3),  # 3 and 2+1
        (1, 2, 4, 1, 1),
        (4, 2, 1, 2, 1),
    ],
)
def test_static_micro_batches_are_equal(rows, dp_size, most, per_rank, per_micro):
    (mini_batch,) = plan(list(range(rows)), dp_size=dp_size, micro=most).mini_batches
    assert (mini_batch.rows_per_rank, mini_batch.rows_per_micro_batch) == (per_rank, per_micro)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    prompts=st.lists(st.integers(0, 30), min_size=1, max_size=40).map(sorted),
    prompts_per_mini_batch=st.integers(1, 31),
    dp_size=st.integers(1, 6),
    most=st.none() | st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_a_step_holds_the_same_rows_for_any_number_of_ranks(prompts, prompts_per_mini_batch, dp_size, most, seed):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 500, (len(prompts),), generator=draw).tolist()
    weights = torch.rand(len(prompts), generator=draw).add(0.1).tolist()
    lengths = torch.randint(0, 200, (len(prompts),), generator=draw).tolist()
    planned = plan(prompts, dp_size, prompts_per_mini_batch, tokens, weights, lengths, most)

    expected: dict[int, set[int]] = {}
    for pair, prompt in enumerate(prompts):
        expected.setdefault(prompt // prompts_per_mini_batch, set()).add(pair)
    expected_steps = [expected[step] for step in sorted(expected)]
    by_rank = shares(planned, dp_size)
    assert len(planned.mini_batches) == len(expected_steps)
    for step, (mini_batch, members) in enumerate(zip(planned.mini_batches, expected_steps, strict=True)):
        entries = [entry for rank in by_rank for entry in rank[step]]
        real = [pair for pair, is_real in entries if is_real]
        assert sorted(real) == sorted(members)  # each once
        assert {pair for pair, _ in entries} == members
        assert mini_batch.weight == pytest.approx(sum(weights[pair] for pair in members))
        mean_length = sum(weights[pair] * lengths[pair] for pair in members) / mini_batch.weight
        assert mini_batch.mean_chosen_length == pytest.approx(mean_length or 1 / len(members))
        if most is None:
            assert mini_batch.rows_per_micro_batch is None
            assert mini_batch.rows_per_rank == math.ceil(len(members) / dp_size)
        else:
            assert mini_batch.rows_per_rank % mini_batch.rows_per_micro_batch == 0
            assert 1 <= mini_batch.rows_per_micro_batch <= most
            # at most one copy a micro-batch beyond what equal ranks need
            micro_batches = mini_batch.rows_per_rank // mini_batch.rows_per_micro_batch
            assert mini_batch.rows_per_rank - math.ceil(len(members) / dp_size) < micro_batches
