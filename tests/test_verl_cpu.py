"""The CPU platform's patches: products are right; sampling by inversion follows distribution and seeds; vLLM sleeps."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from verl_cpu import memory, products

ROOT = Path(__file__).resolve().parent.parent
MADV_PAGEOUT = 21  # a name of Python 3.12's mmap


def matrices(rows: int, inner: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, inner), torch.randn(inner, columns)


@pytest.mark.parametrize("shape", [(1, 64, 3), (5, 7, 300), (64, 576, 960), (3, 0, 2), (0, 4, 3), (3, 4, 0)])
@pytest.mark.parametrize(
    "layout", ["as they are", "left transposed", "right transposed", "strided", "unfolded", "double"]
)
def test_products_are_right_in_every_layout(shape, layout):
    a, b = matrices(*shape)
    match layout:
        case "left transposed":
            a = a.t().contiguous().t()
        case "right transposed":
            b = b.t().contiguous().t()
        case "strided":
            a, b = torch.cat([a, a], 1)[:, : shape[1]], torch.cat([b, b], 1)[:, : shape[2]]
        case "unfolded":  # rows of b overlap
            b = torch.randn(shape[1] + shape[2]).unfold(0, shape[2], 1)[: shape[1]]
        case "double":
            a, b = a.double(), b.double()
    expected = torch.einsum("ij,jk->ik", a.double(), b.double())
    found = products.product(a, b)
    assert found.dtype == a.dtype and found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_products_that_do_not_fit_are_torchs_own_error():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        products.product(torch.randn(2, 3), torch.randn(4, 5))
    with pytest.raises(RuntimeError, match="must be a matrix"):
        products.product(torch.randn(3), torch.randn(3, 5))


@pytest.mark.skipif(not products.is_ahead(), reason="only there was it measured to be ahead")
def test_linear_layers_and_what_flows_back_through_them_take_onednns_products():
    """The gradients of the weights do not: their left factor is transposed."""
    products.install()
    products.install()
    layer, inputs = torch.nn.Linear(48, 96, bias=False), torch.randn(2, 8, 48, requires_grad=True)
    with torch.profiler.profile() as profile:
        layer(inputs).square().sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 2  # of three products
    twin, same = torch.nn.Linear(48, 96, bias=False).double(), inputs.detach().double().requires_grad_()
    twin.weight.data = layer.weight.detach().double()
    twin(same).square().sum().backward()
    for found, expected in ((inputs.grad, same.grad), (layer.weight.grad, twin.weight.grad)):
        assert torch.allclose(found.double(), expected, atol=1e-3, rtol=1e-5)


@pytest.fixture(scope="module")
def random_sample():
    from verl_cpu.patches import _sample_by_inversion

    module = types.SimpleNamespace(TopKTopPSampler=types.SimpleNamespace(forward_native=None))
    _sample_by_inversion(module)
    return module.random_sample


def seeded(numbers) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(number) for row, number in enumerate(numbers)}


def test_tokens_are_as_frequent_as_they_are_probable(random_sample):
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    draws = 20_000
    tokens = random_sample(probs.repeat(draws, 1), seeded(range(draws)))
    frequency = torch.bincount(tokens, minlength=6) / draws
    assert tokens.shape == (draws,) and tokens.dtype == torch.long
    assert (frequency[probs == 0] == 0).all()
    # five standard deviations of a frequency near one half
    assert (frequency - probs).abs().max() < 5 * 0.5 / draws**0.5


@pytest.mark.parametrize("size", [256, 1000])
def test_tokens_are_those_of_the_whole_cumulative_distribution(random_sample, size):
    """More than one block of the vocabulary, some of them without any probability."""
    generator = torch.Generator().manual_seed(1)
    probs = (4 * torch.randn(500, size, generator=generator)).softmax(-1)
    probs[:, 300:600] = 0
    probs /= probs.sum(-1, keepdim=True)
    draws = torch.stack([torch.rand(1, dtype=torch.float64, generator=row) for row in seeded(range(500)).values()])
    cumulative = probs.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, (1 - draws) * cumulative[:, -1:]).squeeze(1)
    assert (random_sample(probs, seeded(range(500))) == expected).sum() >= 499  # one may fall on a rounding


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_extreme_draws_fall_on_tokens_that_have_a_probability(random_sample, monkeypatch, draw):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype=None, generator=None: torch.full(shape, draw, dtype=dtype))
    probs = torch.tensor([[0.0, 0.4, 0.6, 0.0]])
    assert random_sample(probs, {}).item() == (2 if draw == 0.0 else 1)


def test_a_seeded_request_does_not_depend_on_its_batch(random_sample):
    probs = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    together = random_sample(probs, seeded(range(8)))
    assert together.tolist() == random_sample(probs, seeded(range(8))).tolist()
    for row in range(8):
        # at another place of a batch in which the others have no seed
        batch = torch.stack([probs[0], probs[1], probs[row]])
        alone = random_sample(batch, {2: torch.Generator().manual_seed(row)})
        assert alone[2] == together[row]


def test_successive_tokens_of_a_request_take_successive_draws(random_sample):
    probs = torch.full((1, 1000), 1e-3)
    generators = seeded([7])
    expected = 1 - torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    tokens = [random_sample(probs, generators).item() for _ in range(5)]
    assert tokens == [int(draw * 1000 - 1e-6) for draw in expected.tolist()]


# ---- sleep -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def worker():
    """vLLM's CPU worker as far as it sleeps, with a model of a buffer and a cache."""
    from verl_cpu.patches import _sleep

    module = types.SimpleNamespace(CPUWorker=type("CPUWorker", (), {}))
    _sleep(module)
    model = torch.nn.Linear(512, 512, bias=False)
    model.register_buffer("frequencies", torch.ones(4096))
    worker = module.CPUWorker()
    worker.model_runner = types.SimpleNamespace(model=model, kv_caches=[torch.ones(2, 64, 1024)])
    return worker


def whole_pages(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies in pages that hold nothing else, whatever its address."""
    return tensor.detach().flatten()[1024:-1024]


def is_offered(tensor: torch.Tensor) -> bool:
    """Whether a system that is short of memory takes the tensor's pages: asks it to, now.

    A few that it has just moved between its lists it takes later.
    """
    memory._call(memory._libc.madvise, *memory._whole_pages(tensor), MADV_PAGEOUT)
    pages = whole_pages(tensor)
    return pages.count_nonzero().item() < pages.numel() / 2


@pytest.mark.parametrize(("level", "keeps_weights"), [(1, True), (2, False)])
def test_a_sleeping_worker_offers_its_cache_and_at_level_2_its_weights(worker, level, keeps_weights):
    model = worker.model_runner.model
    before = model.weight.detach().clone()
    worker.sleep(level)
    assert is_offered(worker.model_runner.kv_caches[0])
    assert is_offered(model.weight) != keeps_weights
    assert not keeps_weights or torch.equal(model.weight, before)
    assert not is_offered(model.frequencies)
    worker.wake_up(["weights"])
    model.weight.data.copy_(before)
    assert torch.equal(model.weight, before)


def test_what_is_offered_is_there_as_long_as_nobody_needs_it():
    tensor = torch.ones(1 << 20)
    memory.offer(tensor)
    assert (tensor == 1).all()
    tensor[:] = 2  # in use again
    assert not is_offered(tensor) and (tensor == 2).all()


def test_offering_a_part_of_a_page_changes_nothing():
    tensor = torch.ones(10)
    memory.offer(tensor)
    assert (tensor == 1).all()


def test_memory_that_cannot_be_offered_is_an_error():
    with pytest.raises(OSError, match="madvise"):
        memory._call(memory._libc.madvise, 1, 4096, 8)


# Freed activations lie between what is kept; the profile's env.sh makes glibc keep them
HEAP = """
import torch
from pathlib import Path
from threading import Thread
from verl_cpu import memory

def offered():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("LazyFree")).split()[1]) >> 10

def offer_what_is_freed():
    freed, kept = [], []
    for number in range(40):
        freed.append(torch.full((5 << 18,), float(number)))
        kept.append(torch.full((1000,), float(number)))
    del freed
    memory.offer_heap()
    print(offered(), all((one == number).all() for number, one in enumerate(kept)))
"""


@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "another thread"])
def test_freed_memory_is_offered_and_what_is_in_use_is_not(thread):
    code = (
        f"{HEAP}\nthread = Thread(target=offer_what_is_freed)\nthread.start()"
        if thread
        else f"{HEAP}\noffer_what_is_freed()"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    offered, kept = process.stdout.split()
    assert int(offered) > 150 and kept == "True", process.stderr  # of 200 MB


# ---- env.sh ----------------------------------------------------------------------------------------------------------
def exported(command: str, **variables: str) -> str:
    command = f"set -eu; nproc() {{ echo 64; }}; source {ROOT}/verl_cpu/env.sh; {command}"
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "9900000 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_a_containers_quota_limits_the_threads(tmp_path, files, cores):
    """docker --cpus=2 on 64 cores would give 64 threads."""
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert exported(f"verl_cpu_count {tmp_path}") == f"{cores}\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "verl_cpu"), ({"VERL_USE_EXTERNAL_MODULES": "mine"}, "verl_cpu,mine")],
)
def test_the_users_external_modules_are_kept(given, expected):
    again = f"source {ROOT}/verl_cpu/env.sh; echo $VERL_USE_EXTERNAL_MODULES"
    assert exported(again, **given) == f"{expected}\n"
