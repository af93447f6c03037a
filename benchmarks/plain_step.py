"""One DPO optimizer step in plain PyTorch, without FSDP, Ray or vLLM: how fast the arithmetic of a step can be here.

    .venv/bin/python -m benchmarks.plain_step [--model DIR] [--pairs 32] [--longest 16] [--rounds 3] [--record]

Reference pass, update, clipping and AdamW on pairs of the arithmetic example's prompts with random responses, fp32, in
three layouts that must agree in the responses' log-probs:

- padded: one row a response, padded to the longest, logits of every token
- packed: rows one behind the other, one row a response, logits of response tokens alone
- shared: as packed, the prompt once for both of its responses

Prints the medians over rounds in seconds and the share of the machine's matrix-product rate that they reach.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.arithmetic import Model, Work, forward_flop, necessary, update_flop
from benchmarks.inputs import MODEL, make_missing
from benchmarks.machine import matrix_product_rates, provenance, write_result
from recipe.spin.examples.arithmetic.prepare import row as question

BETA = 0.1
PHASES = ("ref", "update", "optimizer")


@dataclass(frozen=True)
class Row:
    """A prompt with two responses, the first of them preferred."""

    prompt: list[int]
    responses: list[list[int]]

    @property
    def lengths(self) -> tuple[int, list[int]]:
        return len(self.prompt), [len(response) for response in self.responses]

    def apart(self) -> list["Row"]:
        """A row for each response."""
        return [Row(self.prompt, [response]) for response in self.responses]


def make_rows(tokenizer, count: int, longest: int, seed: int = 0) -> list[Row]:
    """Prompts of the arithmetic example, with two responses each of longest/2 to longest random tokens."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        messages = question(index, "train", draw.randint(0, 20), draw.randint(0, 20))["prompt"]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        lengths = [draw.randint((longest + 1) // 2, longest) for _ in range(2)]
        responses = [draw.choices(range(100, tokenizer.vocab_size), k=length) for length in lengths]
        rows.append(Row(tokenizer.encode(text, add_special_tokens=False), responses))
    return rows


# ---- Layouts: log-probs of all responses of some rows, in order ------------------------------------------------------
def padded_logps(model, rows: list[Row]) -> torch.Tensor:
    rows = [single for row in rows for single in row.apart()]
    sequences = [torch.tensor(row.prompt + row.responses[0]) for row in rows]
    inputs = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    attention_mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=inputs, attention_mask=attention_mask, use_cache=False).logits
    following = inputs.roll(-1, dims=1)  # the last column's is never used
    token_logps = -F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view_as(inputs)
    starts = torch.tensor([len(row.prompt) - 1 for row in rows])
    places = torch.arange(inputs.shape[1])
    return (token_logps * ((places >= starts[:, None]) & (places < lengths[:, None] - 1))).sum(1)


def packed_logps(model, rows: list[Row]) -> torch.Tensor:
    return shared_logps(model, [single for row in rows for single in row.apart()])


def shared_logps(model, rows: list[Row]) -> torch.Tensor:
    pack = Pack.of(rows)
    logits = model(
        input_ids=pack.tokens[None],
        position_ids=pack.positions[None],
        attention_mask=pack.mask()[None, None],
        logits_to_keep=pack.predicting,
        use_cache=False,
    ).logits[0]
    token_logps = -F.cross_entropy(logits, pack.predicted, reduction="none")
    return torch.stack([part.sum() for part in token_logps.split(pack.response_lengths)])


@dataclass(frozen=True)
class Pack:
    """Rows one behind the other in one sequence.

    row, response: which row a token belongs to, and which of its responses (-1: the prompt).
    predicting, predicted: where the logits of the response tokens stand, and these tokens.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    row: torch.Tensor
    response: torch.Tensor
    predicting: torch.Tensor
    predicted: torch.Tensor
    response_lengths: list[int]

    @classmethod
    def of(cls, rows: list[Row]) -> "Pack":
        tokens, positions, owners, predicting = [], [], [], []
        for number, row in enumerate(rows):
            tokens += row.prompt
            positions += range(len(row.prompt))
            owners += [(number, -1)] * len(row.prompt)
            end_of_prompt = len(tokens) - 1
            for index, response in enumerate(row.responses):
                predicting += [end_of_prompt, *range(len(tokens), len(tokens) + len(response) - 1)]
                tokens += response
                positions += range(len(row.prompt), len(row.prompt) + len(response))
                owners += [(number, index)] * len(response)
        responses = [response for row in rows for response in row.responses]
        row, response = torch.tensor(owners).unbind(1)
        return cls(
            torch.tensor(tokens),
            torch.tensor(positions),
            row,
            response,
            torch.tensor(predicting),
            torch.tensor([token for response in responses for token in response]),
            [len(response) for response in responses],
        )

    def mask(self) -> torch.Tensor:
        """(tokens, tokens), whether a query sees a key: its own row's prompt and its own response, up to itself."""
        same_row = self.row[:, None] == self.row
        visible = (self.response == -1) | (self.response[:, None] == self.response)
        return (same_row & visible).tril()


def padded_work(rows: list[Row]) -> Work:
    rows = [single for row in rows for single in row.apart()]
    length = max(prompt + sum(responses) for prompt, responses in (row.lengths for row in rows))
    return Work(len(rows) * length, len(rows) * length**2, len(rows) * length)


def packed_work(rows: list[Row]) -> Work:
    return shared_work([single for row in rows for single in row.apart()])


def shared_work(rows: list[Row]) -> Work:
    """The dense mask makes attention compute every pair of tokens of a micro-batch."""
    tokens = sum(prompt + sum(responses) for prompt, responses in (row.lengths for row in rows))
    return Work(tokens, tokens**2, sum(sum(row.lengths[1]) for row in rows))


@dataclass(frozen=True)
class Layout:
    """How log-probs are computed, what that takes, and the prompts of a micro-batch."""

    logps: Callable[[torch.nn.Module, list[Row]], torch.Tensor]
    work: Callable[[list[Row]], Work]
    micro_batch: int


LAYOUTS = {
    "padded": Layout(padded_logps, padded_work, 8),
    "packed": Layout(packed_logps, packed_work, 4),
    "shared": Layout(shared_logps, shared_work, 8),
}


# ---- The step --------------------------------------------------------------------------------------------------------
@dataclass
class Players:
    """Policy, reference and AdamW."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def load(cls, folder: str) -> "Players":
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
            for _ in range(2)
        )
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        return cls(policy, reference.eval(), optimizer)


def micro_batches(rows: list[Row], size: int) -> list[list[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def dpo_step(players: Players, rows: list[Row], layout: Layout, size: int) -> dict[str, float]:
    """One optimizer step on all rows; returns the seconds of its phases."""
    parts = micro_batches(rows, size)
    times = [time.perf_counter()]
    with torch.no_grad():
        references = [layout.logps(players.reference, part) for part in parts]
    times.append(time.perf_counter())
    players.optimizer.zero_grad()
    for part, reference in zip(parts, references, strict=True):
        ratio = layout.logps(players.policy, part) - reference
        (-F.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).sum() / len(rows)).backward()
    times.append(time.perf_counter())
    torch.nn.utils.clip_grad_norm_(players.policy.parameters(), 1.0)
    players.optimizer.step()
    times.append(time.perf_counter())
    return {phase: end - start for phase, start, end in zip(PHASES, times, times[1:], strict=False)}


def largest_difference(model, rows: list[Row]) -> float:
    """How far the layouts' log-probs of responses lie apart.

    Raises:
        AssertionError: when that is more than rounding, so that the layouts do not compute the same.
    """
    with torch.no_grad():
        padded, *others = (layout.logps(model, rows) for layout in LAYOUTS.values())
    difference = max((other - padded).abs().max().item() for other in others)
    if difference > 1e-3:
        raise AssertionError(f"the layouts differ by {difference} in a response's log-prob; they must compute the same")
    return difference


def shares(model: Model, work: Work, seconds: dict[str, float], rate: float) -> dict[str, float]:
    """Share of the matrix-product rate (GFLOP/s) that the phases reach, and reference and update together."""
    flop = {"ref": forward_flop(model, work), "update": update_flop(model, work)}
    found = {phase: flop[phase] / seconds[phase] / rate / 1e9 for phase in flop}
    return found | {"both": sum(flop.values()) / (seconds["ref"] + seconds["update"]) / rate / 1e9}


def measure(folder: str, pairs: int = 32, longest: int = 16, rounds: int = 3, layouts=None, sizes=None) -> dict:
    """Medians over rounds by layout, the layouts in turn after one step each that is not counted."""
    players = Players.load(folder)
    rows = make_rows(AutoTokenizer.from_pretrained(folder), pairs, longest)
    layouts = {name: LAYOUTS[name] for name in layouts or LAYOUTS}
    sizes = {name: (sizes or {}).get(name, layout.micro_batch) for name, layout in layouts.items()}
    difference = largest_difference(players.reference, rows[:4])
    rates = matrix_product_rates()
    steps: dict[str, list[dict]] = {name: [] for name in layouts}
    for turn in range(rounds + 1):
        for name, layout in layouts.items():
            seconds = dpo_step(players, rows, layout, sizes[name])
            if turn > 0:
                steps[name].append(seconds)
    model = Model.of(players.policy.config)
    result = {
        "pairs": pairs,
        "prompt_tokens": sum(len(row.prompt) for row in rows),
        "response_tokens": sum(sum(row.lengths[1]) for row in rows),
        "largest_difference": difference,
        "gflops": rates,
        "floor_seconds": floor_seconds(model, rows, max(rates.values())),
        "layouts": {},
    }
    for name, layout in layouts.items():
        seconds = {phase: statistics.median(step[phase] for step in steps[name]) for phase in PHASES}
        work = sum((layout.work(part) for part in micro_batches(rows, sizes[name])), Work(0, 0, 0))
        result["layouts"][name] = {
            "micro_batch": sizes[name],
            "tokens": work.tokens,
            "seconds": seconds,
            "step_seconds": statistics.median(sum(step.values()) for step in steps[name]),
            "rounds": steps[name],
            "share_of_rate": shares(model, work, seconds, max(rates.values())),
        }
    return result


def floor_seconds(model: Model, rows: list[Row], rate: float) -> float:
    """Reference pass and update of the rows, nothing computed twice, at the measured rate (GFLOP/s)."""
    work = necessary([row.lengths for row in rows])
    return (forward_flop(model, work) + update_flop(model, work)) / rate / 1e9


def table(result: dict) -> str:
    lines = [
        f"matrix products: {', '.join(f'{name} {rate:.0f}' for name, rate in result['gflops'].items())} GFLOP/s; "
        f"{result['pairs']} pairs, {result['prompt_tokens']} tokens of prompts, {result['response_tokens']} of "
        f"responses; at least {result['floor_seconds']:.1f} s at that rate",
        "",
        "| layout | tokens | reference, s | update, s | optimizer, s | sum, s | share of rate: reference, update |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in result["layouts"].items():
        seconds = " | ".join(f"{found['seconds'][phase]:.2f}" for phase in PHASES)
        share = ", ".join(f"{found['share_of_rate'][phase]:.0%}" for phase in ("ref", "update"))
        lines.append(f"| {name} | {found['tokens']} | {seconds} | {found['step_seconds']:.2f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="One DPO optimizer step in plain PyTorch.")
    parser.add_argument("--model", default=MODEL, help="folder of the model (the embedded one)")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of a step (32)")
    parser.add_argument("--longest", type=int, default=16, help="most tokens of a response (16)")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each layout that count (3)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="some of the layouts (all)")
    parser.add_argument("--micro-batch", type=int, help="prompts of a micro-batch (8; packed 4)")
    parser.add_argument("--output", type=Path, help="a file for the result as JSON")
    parser.add_argument("--record", action="store_true", help="keep it as benchmarks/results/DATE-plain-step.json")
    options = parser.parse_args()
    make_missing(options.model)
    sizes = {name: options.micro_batch for name in LAYOUTS} if options.micro_batch else None
    result = measure(options.model, options.pairs, options.longest, options.rounds, options.layouts, sizes)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.record:
        write_result("plain-step", provenance() | result)
    print(table(result))


if __name__ == "__main__":
    main()
