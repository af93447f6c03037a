"""What the doctor measures on the device, in a process of its own: `python -m recipe.spin.tools.device_probe DEVICE`.

Attention, an update and a refresh of the recipe's own worker, each beside plain PyTorch, without Ray or vLLM. Prints a
JSON object, a line each, `{"name": ..., "verdict": ..., "text": ..., "figures": ...}`.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from recipe.spin.checks import memory
from recipe.spin.checks.finding import FAIL, OK, WARN, Finding, gigabytes, not_finite
from recipe.spin.tools.probe_model import HALF_BILLION, TINY, save_probe_model

TEMPERATURE, BETA = 0.7, 0.5
# What attention is compared on: more keys than a kernel takes at a time (64 to 128), a prompt that is but the common
# beginning, and a response of one token
SEGMENTS = [[300, 310, 7], [290, 5, 320], [140, 300, 1]]  # tokens of a prompt and of its responses, a row
COMMON = 140  # tokens that all prompts begin with
HEAD_SIZES = (64, 128)  # of Qwen2.5-0.5B; of the GPU profile's own model and larger ones
SHARPNESS = 2  # of scores: among hundreds of keys a few then count, and a wrong one shows in the output


@dataclass(frozen=True)
class Probe:
    """What is measured with, by device."""

    shape: dict
    prompts: int
    prompt: int  # tokens
    response: int
    matrix: int  # rows and columns of the matrices whose product is timed
    dtype: torch.dtype  # of arithmetic
    # Relative, of what is compared with plain PyTorch in fp32: values of attention, loss and gradient norm of an update
    attention_tolerance: float
    update_tolerance: float


PROBES = {
    "cpu": Probe(TINY, 8, 32, 16, 1024, torch.float32, 1e-5, 1e-4),
    "cuda": Probe(HALF_BILLION, 64, 200, 300, 8192, torch.bfloat16, 3e-2, 1e-1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measurements of the doctor on the device.")
    parser.add_argument("device", choices=PROBES)
    device = parser.parse_args().device
    for finding in measure(device):
        print(json.dumps(asdict(finding)), flush=True)


def measure(device: str) -> Iterator[Finding]:
    probe = PROBES[device]
    rate, finding = matrix_products(device, probe)
    yield finding
    yield attention(device, probe)
    with tempfile.TemporaryDirectory() as folder:
        model = save_probe_model(Path(folder), **probe.shape)
        worker = Worker(device, model, probe)
        yield worker.update_beside_plain_pytorch()
        yield worker.refresh()
        yield worker.speed(rate)
        yield worker.peak_memory()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, function: Callable[[], object]) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def matrix_products(device: str, probe: Probe) -> tuple[float, Finding]:
    """Operations a second of a square matrix product, the median of ten after a warm-up."""
    left, right = (torch.randn(probe.matrix, probe.matrix, device=device, dtype=probe.dtype) for _ in range(2))
    times = [timed(device, lambda: left @ right) for _ in range(12)][2:]
    rate = 2 * probe.matrix**3 / statistics.median(times)
    text = f"{rate / 1e12:.2f} TFLOP/s in {str(probe.dtype).removeprefix('torch.')}"
    return rate, Finding("matrix products", OK, text, {"flops": rate})


def attention(device: str, probe: Probe) -> Finding:
    """Outputs and gradients of the recipe's attention over packed rows, and of plain attention sequence by sequence."""
    figures = {}
    for size in HEAD_SIZES:
        gaps = attention_gaps(device, probe.dtype, size)
        figures |= {f"{name}, heads of {size}": gap for name, gap in gaps.items()}
    text = f"differs from plain attention by at most {max(figures.values()):.1e} of its largest value, gradients "
    text += f"included (heads of {' and '.join(map(str, HEAD_SIZES))})"
    wrong = not_finite(figures)
    if not wrong and max(figures.values()) < probe.attention_tolerance:
        return Finding("attention", OK, text, figures)
    text = f"not finite: {wrong}" if wrong else text
    return Finding("attention", FAIL, f"{text}; set actor_rollout_ref.share_prompt=False and report it", figures)


def attention_gaps(device: str, dtype: torch.dtype, size: int) -> dict[str, float]:
    """Differences of the output and of the gradients, for one size of heads."""
    from recipe.spin.engine.attention import shared_prompt_attention
    from recipe.spin.engine.packing import pack_rows
    from recipe.spin.engine.rows import nest

    beginning = torch.arange(COMMON)
    rows = [torch.cat([beginning, 1000 * row[0] + torch.arange(sum(row) - COMMON)]) for row in SEGMENTS]
    packed = pack_rows(nest(rows).to(device), nest([torch.tensor(row) for row in SEGMENTS]).to(device))
    torch.manual_seed(0)
    tokens, heads = len(packed.input_ids), 4
    query, key, value = (torch.randn(1, count, tokens, size, device=device) for count in (heads, 2, 2))
    inputs = [tensor.to(dtype) for tensor in (SHARPNESS * query, key, value)]
    weight = torch.randn(tokens, heads, size, device=device)

    def gradients(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]  # gradients of its own
        output = function(*leaves)
        (output.float() * weight).sum().backward()
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    def ours(query, key, value):
        module = torch.nn.Module()
        return shared_prompt_attention(module, query, key, value, None, visibility=packed.visibility)[0][0]

    def plain(query, key, value):
        output = torch.zeros(tokens, heads, size, device=device)
        for segment in packed.visibility.segments:
            places = torch.tensor([place for part in segment.visible() for place in part], device=device)
            keys, values = (tensor[0, :, places].repeat_interleave(2, dim=0) for tensor in (key, value))
            scores = query[0, :, places[-segment.length :]] @ keys.transpose(1, 2) / math.sqrt(size)
            later = torch.ones_like(scores, dtype=torch.bool).triu(len(places) - segment.length + 1)
            part = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
            output = output.index_put((places[-segment.length :],), part.transpose(0, 1))
        return output

    pairs = zip(gradients(ours, dtype), gradients(plain, torch.float32), strict=True)
    return dict(zip(("output", "query", "key", "value"), (difference(*pair) for pair in pairs), strict=True))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


class Worker:
    """The recipe's worker, actor and reference on one device, driven as by the trainer, without Ray."""

    def __init__(self, device: str, model: str, probe: Probe):
        from omegaconf import OmegaConf

        from recipe.spin.dpo_update import DPOUpdate
        from recipe.spin.fsdp_workers import SpinWorker
        from recipe.spin.tools.doctor import compose

        self.device, self.model, self.probe = device, model, probe
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        config = compose(
            "cpu" if device == "cpu" else "gpu",
            f"actor_rollout_ref.model.path={model}",
            f"data.train_batch_size={probe.prompts}",
            f"actor_rollout_ref.rollout.temperature={TEMPERATURE}",
            f"algorithm.dpo_beta={BETA}",
            "actor_rollout_ref.actor.optim.lr=1e-3",
            "actor_rollout_ref.actor.use_torch_compile=False",
            "trainer.n_gpus_per_node=1",
        )
        OmegaConf.resolve(config)
        self.config = config
        self.worker = SpinWorker(config.actor_rollout_ref, role="actor_rollout_ref")
        self.worker.role = "actor_ref"  # no rollout: that starts vLLM
        self.worker.init_model()
        self.dpo = DPOUpdate(config, OneRank(self.worker))

    def rows(self, prompts: int, prompt: int, response: int, common: int = 0):
        """Rows of random tokens, the first of two responses preferred; and the prompts and responses themselves.

        The first `common` tokens are the same in all prompts.
        """
        from tensordict import TensorDict

        from recipe.spin.core_algos import PreferencePairs
        from recipe.spin.engine.rows import nest

        draw = random.Random(0)
        beginning = draw.choices(range(256), k=common)
        questions = [beginning + draw.choices(range(256), k=prompt - common) for _ in range(prompts)]
        answers = [draw.choices(range(256), k=draw.randint(response // 2, response)) for _ in range(2 * prompts)]
        fields = {
            "prompts": [question for question in questions for _ in range(2)],
            "responses": answers,
            "response_mask": [[1] * len(answer) for answer in answers],
        }
        batch = TensorDict(
            {name: nest([torch.tensor(row) for row in part]) for name, part in fields.items()}, batch_size=len(answers)
        )
        chosen = torch.arange(prompts) * 2
        pairs = PreferencePairs(chosen, chosen + 1, torch.ones(prompts), torch.ones(prompts))
        return self.dpo.lay_out(batch, pairs, torch.arange(2 * prompts) // 2), questions, answers

    def update(self, rows) -> dict:
        self.dpo.add_ref_logps(rows)
        return self.dpo.update_actor(rows, BETA, step=1)

    def update_beside_plain_pytorch(self) -> Finding:
        """Loss and gradient norm of the first update, and of plain PyTorch on one sequence at a time in fp32."""
        rows, questions, answers = self.rows(prompts=6, prompt=300, response=300, common=COMMON)
        found = self.update(rows)
        if found["actor/skipped_steps"]:
            text = "the loss or its gradient is not finite, and the optimizer's step was skipped; report it"
            return Finding("update", FAIL, text)
        ours = {"loss": found["actor/loss"], "gradient norm": found["actor/grad_norm"]}
        plain = plain_update(self.device, self.model, questions, answers)
        return judge_update(ours, plain, self.probe.update_tolerance)

    def refresh(self) -> Finding:
        """After an update actor and reference differ; after a refresh their log-probs must not, to the bit."""
        before = self.logp_gap()
        seconds = timed(self.device, self.worker.refresh_reference)
        after = self.logp_gap()
        return judge_refresh(before, after, seconds)

    def logp_gap(self) -> float:
        from verl.utils import tensordict_utils as tu

        rows, _, _ = self.rows(prompts=6, prompt=100, response=40)
        tu.pop(rows, "mini_batches")
        tu.assign_non_tensor(rows, average_log_prob=False)
        reference, actor = (
            compute(rows.copy())["logps"].values().float()
            for compute in (self.worker.compute_ref_logps, self.worker.compute_actor_logps)
        )
        return (reference - actor).abs().max().item()

    def speed(self, rate: float) -> Finding:
        """Of the second of two updates on a batch as in training; the first warms up."""
        rows, questions, answers = self.rows(self.probe.prompts, self.probe.prompt, self.probe.response)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        reference = timed(self.device, lambda: self.dpo.add_ref_logps(rows))
        seconds = [timed(self.device, lambda: self.dpo.update_actor(rows.copy(), BETA, step=1)) for _ in range(2)][-1]
        labels = sum(map(len, answers))
        tokens = sum(map(len, questions)) + labels
        shape = self.shape()
        operations = 6 * (tokens * shape.layers * shape.layer_parameters + labels * shape.hidden * shape.vocabulary)
        share = operations / seconds / rate
        text = f"{tokens / seconds:,.0f} tokens/s, {share:.0%} of the measured matrix products "
        text += f"({shape.parameters / 1e6:.1f} million weights; attention and recomputation not counted)"
        figures = {"seconds": seconds, "tokens": tokens, "share_of_rate": share, "reference_seconds": reference}
        return Finding("update's speed", OK, text, figures)

    def peak_memory(self) -> Finding:
        """The highest so far beside the estimate that a run is checked with."""
        if self.device != "cuda":
            return Finding("memory", OK, "a process on a CPU has no figure to compare with the estimate for GPUs")
        from recipe.spin.checks.fit import layout_of

        return judge_memory(torch.cuda.max_memory_allocated(), memory.training(self.shape(), layout_of(self.config)))

    def shape(self) -> memory.Model:
        from transformers import AutoConfig

        return memory.Model.of(AutoConfig.from_pretrained(self.model))


def judge_update(ours: dict[str, float], plain: dict[str, float], tolerance: float) -> Finding:
    """Loss and gradient norm of the recipe beside those of plain PyTorch; the relative differences are its figures."""
    gaps = {name: abs(ours[name] - plain[name]) / plain[name] for name in ours}
    text = ", ".join(f"{name} {ours[name]:.6g} (plain PyTorch in fp32: {plain[name]:.6g})" for name in ours)
    if wrong := not_finite(gaps):
        return Finding("update", FAIL, f"{text}; not finite: {wrong}; report it", gaps)
    good = max(gaps.values()) < tolerance
    return Finding("update", OK if good else FAIL, text + ("" if good else "; report it"), gaps)


def judge_refresh(before: float, after: float, seconds: float) -> Finding:
    """Largest differences between the log-probs of actor and reference, before a refresh and after it."""
    figures = {"gap_before": before, "gap_after": after, "seconds": seconds}
    text = f"log-probs of responses differ by {before:.3g} before it and by {after:.3g} after it; {seconds:.3f} s"
    if not_finite(figures):
        return Finding("refresh", FAIL, f"{text}; the log-probs are not finite, report it", figures)
    if before == 0 or after > 0.01 * before:
        return Finding("refresh", FAIL, f"{text}; the reference does not follow the actor, report it", figures)
    if after > 0:
        return Finding("refresh", WARN, f"{text}; it should be 0, report it", figures)
    return Finding("refresh", OK, text, figures)


def judge_memory(measured: float, parts: dict[str, float]) -> Finding:
    """Bytes of tensors that torch counted beside the estimate's parts, less what it does not count."""
    estimate = memory.tensor_bytes(parts)
    text = f"the update's tensors took {gigabytes(measured)} GB; the estimate for the profile's fullest micro-batch is "
    text += f"{gigabytes(estimate)} GB, and {gigabytes(sum(parts.values()) - estimate)} GB more for what the allocator "
    text += "cannot use and for processes"
    good = measured < estimate
    text += "" if good else "; it is too low, report it"
    return Finding("memory", OK if good else WARN, text, {"measured": measured, "estimate": estimate})


class OneRank:
    """Stands for the trainer's worker group where the only rank is this process."""

    def __init__(self, worker):
        self.compute_ref_logps, self.update_actor = worker.compute_ref_logps, worker.update_actor
        self.refresh_reference = worker.refresh_reference

    @staticmethod
    def _query_dispatch_info(mesh_name: str) -> list[int]:
        return [0]


def plain_update(device: str, folder: str, questions: list[list[int]], answers: list[list[int]]) -> dict[str, float]:
    """Loss and gradient norm of DPO against the same model, from the definition (arXiv 2305.18290, eq. 7)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device)
    total = 0.0
    for number, question in enumerate(questions):
        chosen, rejected = (response_logp(model, question, answer) for answer in answers[2 * number : 2 * number + 2])
        margin = (chosen - chosen.detach()) - (rejected - rejected.detach())  # the reference is the policy
        loss = -torch.nn.functional.logsigmoid(BETA * margin) / len(questions)
        loss.backward()  # a pair at a time, for memory
        total += loss.item()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    return {"loss": total, "gradient norm": norm.item()}


def response_logp(model, question: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([question + answer], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(question) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1)[range(len(answer)), answer].sum()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
