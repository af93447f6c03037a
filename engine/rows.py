"""The row: a prompt with those of its responses that take part in a pair, each once.

    input_ids          [ prompt (p) | response 0 (t0) | response 1 (t1) | ... ]
    position_ids       [ 0 .. p-1   | p .. p+t0-1     | p .. p+t1-1     | ... ]
    segments           [ p, t0, t1, ... ]
    loss_mask          which of the t0 + t1 + ... response tokens count
    chosen, rejected   one entry a pair: the response's number within the row
    pair_weight        one entry a pair: its weight in the loss, 0 in rows that only make ranks equal

Rows are what ranks, optimizer steps and micro-batches are made of, so that a pair is always whole. All fields are
jagged tensors with one entry a row.
"""

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from recipe.spin.core_algos import PreferencePairs
from recipe.spin.engine.plan import Plan


def nest(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of unequal length as a jagged tensor."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def row_lists(nested: torch.Tensor) -> list[list[int]]:
    """A jagged tensor's rows as lists; one transfer from a device."""
    values, bounds = nested.values().tolist(), nested.offsets().tolist()
    return [values[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


def pad_rows(nested: torch.Tensor) -> torch.Tensor:
    """A jagged tensor of B rows as (B, T), zeros behind the rows' ends.

    `to_padded_tensor` would do, but takes T from a cache that is wrong once rows were selected and sent to a worker.
    """
    return torch.nn.utils.rnn.pad_sequence(list(nested.unbind()), batch_first=True)


def pad_parts(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Stretches of a flat tensor, of these lengths, as rows of a table (N, T), zeros behind their ends."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)


def make_rows(prompts: list[torch.Tensor], responses: list[list[torch.Tensor]]) -> TensorDict:
    """Rows of N prompts with their responses, token ids each; every response token counts, and there are no pairs."""
    positions = [
        torch.cat([torch.arange(len(prompt)), *(len(prompt) + torch.arange(len(one)) for one in answers)])
        for prompt, answers in zip(prompts, responses, strict=True)
    ]
    pairs = list(zip(prompts, responses, strict=True))
    fields = {
        "input_ids": [torch.cat([prompt, *answers]) for prompt, answers in pairs],
        "position_ids": positions,
        "segments": [torch.tensor([len(prompt), *map(len, answers)]) for prompt, answers in pairs],
        "loss_mask": [torch.ones(sum(map(len, answers)), dtype=torch.long) for answers in responses],
    }
    return TensorDict({name: nest(values) for name, values in fields.items()}, batch_size=len(prompts))


def build_rows(responses: TensorDict, pairs: PreferencePairs, prompt_of: torch.Tensor) -> TensorDict:
    """The rows of all prompts that have a pair, in the order of the prompts.

    Args:
        responses: N responses with `prompts`, `responses`, `response_mask` and maybe more: jagged fields with an entry
            a token, dense ones (N,) with an entry a response. Those come along as jagged fields of the rows.
        pairs: which of the N responses make pairs.
        prompt_of: (N,) number of each response's prompt; adds `prompt` (rows,) to the rows.
    """
    members: dict[int, list[int]] = {}  # prompt -> its pairs
    for pair, prompt in enumerate(prompt_of[pairs.chosen].tolist()):
        members.setdefault(prompt, []).append(pair)
    numbers = sorted(members)
    both = torch.stack([pairs.chosen, pairs.rejected])
    taking_part = [both[:, members[prompt]].unique().tolist() for prompt in numbers]  # row -> its responses
    columns = {name: values.unbind() for name, values in responses.items()}
    prompts, answers = columns.pop("prompts"), columns.pop("responses")

    rows = make_rows([prompts[part[0]] for part in taking_part], [[answers[i] for i in part] for part in taking_part])
    for name, values in columns.items():
        field = "loss_mask" if name == "response_mask" else name
        rows[field] = nest([torch.cat([values[i].reshape(-1) for i in part]) for part in taking_part])
    for name, response in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        rows[name] = nest(
            [
                torch.tensor([part.index(response[pair].item()) for pair in members[prompt]])
                for prompt, part in zip(numbers, taking_part, strict=True)
            ]
        )
    rows["pair_weight"] = nest([pairs.weight[members[prompt]].float() for prompt in numbers])
    rows["prompt"] = torch.tensor(numbers)
    return rows


def pair_totals(rows: TensorDict) -> tuple[list[float], list[float]]:
    """Per row the sum of its pairs' weights, and that of their chosen responses' lengths times these weights."""
    columns = (rows[name].unbind() for name in ("pair_weight", "chosen", "loss_mask"))
    weights, lengths = [], []
    for weight, chosen, mask, (_, *answers) in zip(*columns, row_lists(rows["segments"]), strict=True):
        counted = pad_parts(mask, answers).sum(-1)
        weights.append(weight.sum().item())
        lengths.append((weight * counted[chosen]).sum().item())
    return weights, lengths


def arrange(rows: TensorDict, plan: Plan) -> TensorDict:
    """The rows in the order of a plan; the pairs of its copies weigh nothing."""
    arranged = tu.index_select_tensor_dict(rows, plan.rows)
    weights = zip(arranged["pair_weight"].unbind(), plan.real, strict=True)
    arranged["pair_weight"] = nest([weight * is_real for weight, is_real in weights])
    return arranged
