"""The CPU as a verl platform: gloo instead of NCCL, process memory instead of device memory."""

import resource
import types
from contextlib import contextmanager

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from verl_cpu import memory


def _nothing(*args, **kwargs) -> None:
    """Stands for device calls that have no meaning on a CPU (caches, streams, memory fractions)."""


class CPUDevice(types.ModuleType):
    """`torch.cpu`, plus the calls on memory and random state that verl makes on `torch.cuda`."""

    def __getattr__(self, name):
        return getattr(torch.cpu, name)

    @staticmethod
    def memory_allocated(device=None) -> int:
        return psutil.Process().memory_info().rss

    memory_reserved = memory_allocated

    @staticmethod
    def max_memory_allocated(device=None) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    max_memory_reserved = max_memory_allocated

    @staticmethod
    def mem_get_info(device=None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def get_device_properties(device=None) -> types.SimpleNamespace:
        return types.SimpleNamespace(name="CPU", total_memory=psutil.virtual_memory().total)

    @staticmethod
    def get_device_name(device=None) -> str:
        return "CPU"

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    @staticmethod
    def get_rng_state(device=None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device=None) -> None:
        torch.set_rng_state(state)

    # What the C library keeps of a step's activations is a cache like the one of torch.cuda
    empty_cache = staticmethod(memory.offer_heap)
    ipc_collect = reset_peak_memory_stats = reset_accumulated_memory_stats = staticmethod(_nothing)
    set_per_process_memory_fraction = set_device = staticmethod(_nothing)


_DEVICE = CPUDevice("verl_cpu.device")


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Chosen by `VERL_PLATFORM=cpu` alone, never detected, so that it cannot hide a GPU."""

    device_name = "cpu"
    vendor_name = "generic"
    device_module = _DEVICE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False

    def current_device(self) -> str:
        # verl passes this on to tensor.to(); an index would mean "cuda:0" there.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "VERL_CPU_VISIBLE_SLOTS"

    def get_device_uuid(self, device_id: int) -> str:
        return f"CPU-{device_id}"

    def ray_resource_name(self) -> str:
        # verl counts "GPU" in its resource pools; the CPU profile gives Ray logical ones (config/device/cpu.yaml).
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def rollout_env_vars(self) -> dict[str, str]:
        # vLLM's activations are smaller than the trainer's (logits of 25 MB the largest): it may keep less (env.sh).
        return {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}

    def is_ipc_supported(self) -> bool:
        return False  # no device memory to share: weights travel to vLLM through shared memory

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def _ignore(self, *args, **kwargs) -> None:
        """Device calls that have no meaning on a CPU."""

    set_device = synchronize = set_allocator_settings = profiler_start = profiler_stop = cudart = _ignore
    empty_cache = staticmethod(memory.offer_heap)
