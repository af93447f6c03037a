"""Rows made of prompts, responses and pairs, on tensors made by hand."""

import pytest
import torch
from small_plans import plan
from verl.utils import tensordict_utils as tu
from worker_harness import nest, response_batch

from recipe.spin.core_algos import PreferencePairs
from recipe.spin.dp_actor import split_mini_batches
from recipe.spin.engine.plan import MiniBatch, Plan
from recipe.spin.engine.rows import arrange, build_rows, pad_rows, pair_totals, row_lists

PROMPTS = [[1], [1], [2, 2], [2, 2]]
RESPONSES = [[10, 11, 12], [20], [30, 31], [40, 41, 42, 43]]
PROMPT_OF = torch.tensor([0, 0, 1, 1])


def responses():
    return response_batch(PROMPTS, RESPONSES, [[1] * len(row) for row in RESPONSES])


def pairs(chosen, rejected, weight=None) -> PreferencePairs:
    weight = [1.0] * len(chosen) if weight is None else weight
    return PreferencePairs(torch.tensor(chosen), torch.tensor(rejected), torch.ones(len(chosen)), torch.tensor(weight))


def lists(rows, *names: str) -> list[list[list]]:
    return [row_lists(rows[name]) for name in names]


def test_a_row_holds_a_prompt_and_the_responses_of_its_pairs():
    rows = build_rows(responses(), pairs([1, 2], [0, 3], [0.5, 1.0]), PROMPT_OF)
    assert lists(rows, "input_ids", "segments") == [
        [[1, 10, 11, 12, 20], [2, 2, 30, 31, 40, 41, 42, 43]],
        [[1, 3, 1], [2, 2, 4]],
    ]
    assert row_lists(rows["position_ids"]) == [[0, 1, 2, 3, 1], [0, 1, 2, 3, 2, 3, 4, 5]]
    assert lists(rows, "chosen", "rejected", "pair_weight") == [[[1], [0]], [[0], [1]], [[0.5], [1.0]]]
    assert rows["prompt"].tolist() == [0, 1]


def test_a_response_stands_once_however_many_pairs_it_has():
    batch = response_batch([[7, 8]] * 4, [[1], [2, 2], [3], [4]], [[1], [1, 0], [1], [1]])
    rows = build_rows(batch, pairs([1, 1, 3], [0, 3, 0], [0.25, 0.5, 0.25]), torch.zeros(4, dtype=torch.long))
    assert lists(rows, "input_ids", "segments", "loss_mask") == [[[7, 8, 1, 2, 2, 4]], [[2, 1, 2, 1]], [[1, 1, 0, 1]]]
    assert lists(rows, "chosen", "rejected") == [[[1, 1, 2]], [[0, 2, 0]]]
    assert pair_totals(rows) == ([1.0], [0.25 + 0.5 + 0.25])


def test_prompts_without_a_pair_have_no_row():
    rows = build_rows(responses(), pairs([3], [2]), PROMPT_OF)
    assert rows["prompt"].tolist() == [1] and row_lists(rows["segments"]) == [[2, 2, 4]]


def test_values_of_tokens_and_of_responses_come_along():
    batch = responses()
    batch["rollout_log_probs"] = nest([[-1.0 * token for token in row] for row in RESPONSES])
    batch["opponent_logps"] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    rows = build_rows(batch, pairs([1, 3], [0, 2]), PROMPT_OF)
    assert row_lists(rows["rollout_log_probs"])[0] == [-10.0, -11.0, -12.0, -20.0]
    assert row_lists(rows["opponent_logps"]) == [[0.0, 1.0], [2.0, 3.0]]


def test_a_datas_response_joins_the_row_of_its_prompt():
    """Self-play: it stands behind all generated responses."""
    batch = response_batch([[1], [2], [1], [2]], [[5], [6], [7, 7], [8]], [[1], [1], [1, 1], [1]])
    rows = build_rows(batch, pairs([2, 3], [0, 1]), torch.tensor([0, 1, 0, 1]))
    assert row_lists(rows["input_ids"]) == [[1, 5, 7, 7], [2, 6, 8]]
    assert lists(rows, "chosen", "rejected") == [[[1], [1]], [[0], [0]]]


def test_copies_weigh_nothing():
    """One row on two ranks: the second rank gets a copy."""
    rows = build_rows(responses(), pairs([2], [3]), PROMPT_OF)
    arranged = arrange(rows, plan([1], dp_size=2))
    assert row_lists(arranged["input_ids"]) == [[2, 2, 30, 31, 40, 41, 42, 43]] * 2
    assert sorted(row_lists(arranged["pair_weight"])) == [[0.0], [1.0]]


def test_rows_are_padded_with_zeros():
    assert pad_rows(nest([[1.0, 2.0, 3.0], [4.0], []])).tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]


def test_rows_selected_from_a_longer_batch_are_padded_to_their_own_length():
    batch = tu.index_select_tensor_dict(responses(), [1, 2])
    assert pad_rows(batch["responses"]).tolist() == [[20, 0], [30, 31]]


def test_a_ranks_rows_are_cut_into_its_mini_batches():
    rows = build_rows(responses(), pairs([0, 3], [1, 2]), PROMPT_OF)
    steps = [MiniBatch(1, 1.0, 3.0), MiniBatch(1, 2.0, 3.0)]
    cut = list(split_mini_batches(arrange(rows, Plan(steps, [1, 0], [True, True])), steps))
    assert [part["prompt"].tolist() for part, _ in cut] == [[1], [0]]
    assert [mini_batch for _, mini_batch in cut] == steps


@pytest.mark.parametrize("rows_per_rank", [1, 3])
def test_rows_that_mini_batches_do_not_name_are_refused(rows_per_rank):
    rows = build_rows(responses(), pairs([0, 3], [1, 2]), PROMPT_OF)
    with pytest.raises(ValueError, match=f"2 rows, but its mini-batches name {rows_per_rank}"):
        list(split_mini_batches(rows, [MiniBatch(rows_per_rank, 3.0, 3.0)]))
