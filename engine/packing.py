"""The rows of a micro-batch as one packed sequence, and who sees whom in it.

    [ what all prompts begin with | row 0 | row 1 | ... | padding ],   a row: [ rest of its prompt | response | ... ]

Each stretch of tokens, a `Segment`, sees itself causally and everything of its ancestors: a response sees its prompt,
a prompt's rest sees the common beginning. So every token sees exactly what it would see in a sequence of its own, while
no prompt is computed twice, nor the system prompt that a micro-batch's prompts share.

Symbols: T tokens of the packed sequence, R response tokens, N responses.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from recipe.spin.engine.rows import nest, row_lists


class Segment(NamedTuple):
    """A stretch of tokens of the packed sequence, and the stretches before it that its tokens see whole."""

    start: int
    length: int
    ancestors: tuple["Segment", ...] = ()

    def visible(self) -> list[range]:
        """Places of all that its last token sees, in the order of positions."""
        return [range(part.start, part.start + part.length) for part in (*self.ancestors, self)]


class Visibility:
    """Who sees whom in a packed sequence, in the two forms that attention functions want.

    Built once a micro-batch and read by every layer; no dataclass, as FSDP copies those on their way to a layer.

    Attributes:
        segments: in the order of the sequence, none of them empty.
        rows: start and length of each row's part of the sequence.
        common: number of tokens at the beginning that every row sees.
        position_ids: (T,).
    """

    def __init__(self, segments: list[Segment], rows: list[tuple[int, int]], common: int, position_ids: Tensor):
        self.segments, self.rows, self.common, self.position_ids = segments, rows, common, position_ids
        self._masks: dict[int | None, Tensor] = {}

    # -------------------------------------------------------------- segment by segment, for kernels of variable lengths

    @cached_property
    def by_segment(self) -> "SegmentIndex":
        seen = [segment.visible() for segment in self.segments]
        lengths = [[segment.length for segment in self.segments], [sum(map(len, parts)) for parts in seen]]
        bounds = [torch.tensor([0, *each]).cumsum(0).int() for each in lengths]
        places = torch.cat([torch.arange(part.start, part.stop) for parts in seen for part in parts])
        on_device = (tensor.to(self.position_ids.device) for tensor in (places, *bounds))
        return SegmentIndex(*on_device, *map(max, lengths))

    # --------------------------------------------------------------------------- row by row, for attention under a mask

    @cached_property
    def by_row(self) -> "RowIndex":
        rows, device = self._rows_to_fill(), self.position_ids.device
        starts, lengths = torch.tensor(rows, device=device).unbind(1)
        places = torch.arange(int(lengths.max()), device=device)
        inside = places < lengths[:, None]
        queries = torch.where(inside, starts[:, None] + places, 0)  # (B, L)
        before = torch.arange(self.common, device=device).expand(len(rows), self.common)
        return RowIndex(queries, torch.cat([before, queries], dim=1), inside)

    def _rows_to_fill(self) -> list[tuple[int, int]]:
        """The rows, or all as one where filling them up to the longest would take more pairs of query and key."""
        longest = max(length for _, length in self.rows)
        together = len(self.position_ids) - self.common
        if len(self.rows) * longest * (self.common + longest) <= together * len(self.position_ids):
            return self.rows
        return [(self.common, together)]

    def mask(self, window: int | None = None) -> Tensor:
        """(B, 1, L, C + L) bool: which keys of `by_row` its queries see, at most `window` positions back."""
        if window not in self._masks:
            self._masks[window] = self._row_mask(window)
        return self._masks[window]

    def _row_mask(self, window: int | None) -> Tensor:
        device = self.position_ids.device
        owner = torch.empty(len(self.position_ids), dtype=torch.long, device=device)  # place -> its segment's number
        for number, segment in enumerate(self.segments):
            owner[segment.start : segment.start + segment.length] = number
        numbers = {segment: number for number, segment in enumerate(self.segments)}
        sees = torch.eye(len(self.segments), dtype=torch.bool, device=device)
        for number, segment in enumerate(self.segments):
            sees[number, [numbers[ancestor] for ancestor in segment.ancestors]] = True

        queries, keys, inside = self.by_row
        mask = sees[owner[queries][:, :, None], owner[keys][:, None, :]] & (keys[:, None, :] <= queries[:, :, None])
        if window is not None:
            positions = self.position_ids
            mask &= positions[queries][:, :, None] - positions[keys][:, None, :] < window
        mask[:, :, self.common :] &= inside[:, None, :]
        mask[..., 0] |= ~inside  # a query that only fills up a row sees something, as a softmax over nothing is NaN
        return mask[:, None]


class SegmentIndex(NamedTuple):
    """What variable-length kernels take, for S segments; queries stand in the order of the sequence."""

    keys: Tensor  # (K,) places of the keys, segment by segment
    query_bounds: Tensor  # (S + 1,) int32
    key_bounds: Tensor  # (S + 1,) int32
    longest_query: int
    longest_key: int


class RowIndex(NamedTuple):
    """Places of B rows filled up to L queries and C + L keys, C tokens being seen by all rows."""

    queries: Tensor  # (B, L), 0 where `inside` is false
    keys: Tensor  # (B, C + L)
    inside: Tensor  # (B, L) bool


@dataclass(frozen=True)
class PackedRows:
    """The rows of a micro-batch in one sequence; its R response tokens in the order of rows and responses."""

    input_ids: Tensor  # (T,)
    visibility: Visibility
    predictors: Tensor  # (R,) place of the token that predicts each response token
    labels: Tensor  # (R,) the response tokens

    @property
    def position_ids(self) -> Tensor:
        return self.visibility.position_ids


def pack_rows(input_ids: Tensor, segments: Tensor, multiple_of: int = 1) -> PackedRows:
    """Packs rows, jagged `input_ids` and `segments` (rows.py), into one sequence, padded to a divisible length."""
    rows = list(zip(input_ids.unbind(), row_lists(segments), strict=True))
    common = common_beginning([tokens[: lengths[0]] for tokens, lengths in rows]) if len(rows) > 1 else 0
    place = common
    shared = [Segment(0, common)] if common else []
    found = list(shared)
    spans, tokens, positions, predictors, labels = [], [rows[0][0][:common]], [torch.arange(common)], [], []
    for ids, (prompt, *answers) in rows:
        start = place
        rest = [Segment(place, prompt - common, tuple(shared))] if prompt > common else []
        found += rest
        tokens.append(ids[common:])
        positions.append(torch.arange(common, prompt))
        place += prompt - common
        end_of_prompt = place - 1 if rest else common - 1
        read = prompt
        for length in filter(None, answers):
            found.append(Segment(place, length, (*shared, *rest)))
            positions.append(torch.arange(prompt, prompt + length))
            predictors += [end_of_prompt, *range(place, place + length - 1)]
            labels.append(ids[read : read + length])
            place, read = place + length, read + length
        spans.append((start, place - start))
    padding = -place % multiple_of
    if padding:
        found.append(Segment(place, padding))
        spans.append((place, padding))
        tokens.append(tokens[-1].new_zeros(padding))
        positions.append(torch.arange(padding))
    device = input_ids.device
    return PackedRows(
        torch.cat(tokens),
        Visibility(found, [span for span in spans if span[1]], common, torch.cat(positions).to(device)),
        torch.tensor(predictors, dtype=torch.long, device=device),
        torch.cat([input_ids.values()[:0], *labels]),
    )


def common_beginning(prompts: list[Tensor]) -> int:
    """How many tokens all prompts begin with."""
    shortest = min(map(len, prompts))
    beginnings = torch.stack([prompt[:shortest] for prompt in prompts])
    return int((beginnings == beginnings[0]).all(dim=0).long().cumprod(0).sum())


def copy_prompts(input_ids: Tensor, segments: Tensor) -> Tensor:
    """Rows [ prompt | response 0 | response 1 | ... ] as [ prompt | response 0 | prompt | response 1 | ... ]."""
    rows = []
    for ids, lengths in zip(input_ids.unbind(), row_lists(segments), strict=True):
        prompt, *answers = ids.split(lengths)
        rows.append(torch.cat([part for answer in answers for part in (prompt, answer)]))
    return nest(rows)


def split_copies(input_ids: Tensor, segments: Tensor) -> tuple[list[Tensor], list[int]]:
    """Rows of `copy_prompts` as sequences, one a response, and the lengths of the sequences' prompts."""
    sequences, prompts = [], []
    for ids, (prompt, *answers) in zip(input_ids.unbind(), row_lists(segments), strict=True):
        sequences += ids.split([prompt + answer for answer in answers])
        prompts += [prompt] * len(answers)
    return sequences, prompts
