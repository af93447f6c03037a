"""What tests/test_pretended_gpu.py runs on its ranks, of the device itself and of its memory."""

from collections.abc import Callable

from worker_harness import make_update
from worker_jobs import Batch, lay_out, optimize


def probe_pretended_gpu(rank: int) -> list:
    """The doctor's findings of the device, as on a GPU but for sizes."""
    from dataclasses import replace
    from unittest import mock

    from recipe.spin.tools import device_probe
    from recipe.spin.tools.probe_model import TINY

    small = replace(device_probe.PROBES["cuda"], shape=TINY, prompts=8, prompt=32, response=16, matrix=256)
    with mock.patch.dict(device_probe.PROBES, cuda=small):
        return list(device_probe.measure("cuda"))


def try_the_device(rank: int, folder: str) -> dict:
    """What a device that is not the host does to tensors, or says; of two ranks."""
    import torch

    def attempt(function: Callable):
        try:
            return function()
        except RuntimeError as error:
            return str(error)

    meeting = {"init_method": f"file://{folder}/ranks", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", **meeting)
    nccl = torch.distributed.new_group(backend="nccl")
    here, there = torch.arange(4.0), torch.arange(4.0, device="cuda")
    before = torch.cuda.memory_allocated()
    more = there.repeat(1000)
    used = torch.cuda.memory_allocated() - before
    more.untyped_storage().resize_(0)
    freed = torch.cuda.memory_allocated() - before
    more.untyped_storage().resize_(16000)
    total = there.clone()
    torch.distributed.all_reduce(total)
    torch.save(there, f"{folder}/{rank}.pt")
    seen = {
        "mixed": [
            attempt(lambda: here + there),
            attempt(lambda: there.index_select(0, torch.tensor([1]))),
            attempt(lambda: torch.tensor(0.0).add_(there[0])),
            attempt(lambda: torch.stack([torch.tensor(0.0), there[0]])),
        ],
        "numbers of the host's": (there * torch.tensor(2.0)).tolist(),
        "resized": torch.add(there[:2], 1, out=torch.empty(3, device="cuda")).tolist(),
        "pinned": (here.pin_memory().is_pinned(), here.is_pinned()),
        "bytes": (used, freed),
        "given back": more.isnan().all().item(),
        "sum over ranks": total.tolist(),
        "strided to NCCL": attempt(lambda: torch.distributed.all_reduce(there.view(2, 2).t())),
        "the host's to NCCL": attempt(lambda: torch.distributed.all_reduce(here, group=nccl)),
        "loaded": torch.load(f"{folder}/{rank}.pt", weights_only=True).device.type,
    }
    torch.distributed.destroy_process_group()
    return seen


def count_memory(rank: int, overrides: list[str], batch: Batch, folder: str) -> dict[str, int]:
    """Bytes of the device: at the most in the second update, in a push of the weights and as a checkpoint is saved, and
    between these.

    What earlier jobs left in the process does not count.
    """
    import torch

    before = _memory_of_others()
    dpo = make_update(*overrides)
    worker = dpo.workers.worker
    for step in (1, 2):  # AdamW has its moments after the first
        rows = lay_out(dpo, batch)
        dpo.reference_equals_actor = False
        dpo.add_ref_logps(rows)
        torch.cuda.reset_peak_memory_stats()
        optimize(dpo, rows, step)
    counted = {"training": torch.cuda.max_memory_allocated(), "waiting": torch.cuda.memory_allocated()}
    torch.cuda.reset_peak_memory_stats()
    weights, _ = worker.actor.engine.get_per_tensor_param(base_sync_done=True)
    for _ in weights:
        pass
    counted["weights to vLLM"] = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    worker.save_checkpoint(folder)
    counted["saving"] = torch.cuda.max_memory_allocated()
    return {phase: bytes_ - before for phase, bytes_ in counted.items()}


def count_memory_of_a_resume(rank: int, overrides: list[str], folder: str) -> int:
    """Bytes of the device at the most as a new worker loads what `count_memory` saved."""
    import torch

    before = _memory_of_others()
    worker = make_update(*overrides).workers.worker
    torch.cuda.reset_peak_memory_stats()
    worker.load_checkpoint(folder)
    return torch.cuda.max_memory_allocated() - before


def compare_pushes(rank: int, overrides: list[str]) -> dict[str, bool]:
    """By name, whether a weight for vLLM is to the bit what verl gathers of it, rounded to bf16."""
    import torch

    from recipe.spin.engine.row_engine import RowEngine

    engine = make_update(*overrides).workers.worker.actor.engine
    verls, _ = super(RowEngine, engine).get_per_tensor_param()
    expected = {name: weight.to(torch.bfloat16) for name, weight in verls}
    ours, _ = engine.get_per_tensor_param()
    same = {name: torch.equal(weight, expected.pop(name)) for name, weight in ours}
    return same | dict.fromkeys(expected, False)


def _memory_of_others() -> int:
    import gc

    import torch

    gc.collect()
    return torch.cuda.memory_allocated()
