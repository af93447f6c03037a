"""Gives a process a device that torch calls "cuda" (device.cpp), for what only a GPU's run does of FSDP and torch.

To be imported before torch: a process gets it by this folder on its PYTHONPATH (sitecustomize.py). `torch.cuda` then
has one device; no kernel of CUDA's runs, and no time is the one a GPU would take.
"""

import ctypes
import os
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

TORCH = Path(find_spec("torch").origin).parent / "lib"
MEMORY = 80 * 10**9


def _load() -> ctypes.CDLL:
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(TORCH / name), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(os.environ["PRETENDED_GPU"])
    loaded.pretended_used.restype = loaded.pretended_peak.restype = ctypes.c_size_t
    loaded.pretended_resize.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.pretended_collectives.argtypes = [ctypes.c_char_p, ctypes.c_bool]
    return loaded


device_memory = _load()

import torch  # noqa: E402  (torch asks once, as it is imported, what a GPU can do)
from as_on_gpus import standing_in_for_the_kernel  # noqa: E402
from torch.distributed import distributed_c10d  # noqa: E402
from torch.nn.attention import varlen  # noqa: E402

DEVICE = torch.device("cuda:0")


# ---- torch.cuda ------------------------------------------------------------------------------------------------------
class Stream(torch.Stream):
    """Everything has happened when it is asked for."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls, device=DEVICE)

    def __init__(self, *args, **kwargs):
        pass

    def wait_event(self, event) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def record_event(self, event=None):
        return event or Event()


class Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None) -> None:
        pass

    wait = record

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


@contextmanager
def _in_stream(stream):
    yield


def _only_device(device) -> None:
    if torch.device("cuda", device if isinstance(device, int) else torch.device(device).index or 0) != DEVICE:
        raise RuntimeError(f"there is one device, and not {device}")


def _always(value=None):
    """A function of its own for each name: torch.compile keeps rules by function."""
    return lambda *args, **kwargs: value


STREAM = Stream()
torch.cuda.__dict__.update(
    _lazy_init=_always(),
    is_available=_always(True),
    is_initialized=_always(True),
    device_count=_always(1),
    current_device=_always(0),
    set_device=_only_device,
    get_device_name=_always("the host, pretended to be a GPU"),
    get_device_capability=_always((9, 0)),
    get_device_properties=_always(SimpleNamespace(name="pretended", total_memory=MEMORY, major=9, minor=0)),
    is_bf16_supported=_always(True),
    is_current_stream_capturing=_always(False),
    synchronize=_always(),
    empty_cache=_always(),
    ipc_collect=_always(),
    manual_seed=_always(),
    manual_seed_all=_always(),
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=_always(),
    Stream=Stream,
    Event=Event,
    stream=_in_stream,
    current_stream=_always(STREAM),
    default_stream=_always(STREAM),
    mem_get_info=lambda device=None: (MEMORY - device_memory.pretended_used(), MEMORY),
    memory_allocated=lambda device=None: device_memory.pretended_used(),
    memory_reserved=lambda device=None: device_memory.pretended_used(),
    max_memory_allocated=lambda device=None: device_memory.pretended_peak(),
    max_memory_reserved=lambda device=None: device_memory.pretended_peak(),
    reset_peak_memory_stats=lambda device=None: device_memory.pretended_reset_peak(),
)


# ---- What torch does for devices that it was built for --------------------------------------------------------------
_resize = torch.UntypedStorage.resize_


def _resize_storage(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    if storage.device != DEVICE:
        return _resize(storage, size)
    if size != storage.nbytes():
        device_memory.pretended_resize(storage._cdata, size)
    return storage


torch.UntypedStorage.resize_ = _resize_storage


def _to_where_it_was(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """What torch.load makes of a storage that was saved from the device."""
    if not location.startswith("cuda"):
        return None
    saved = torch.empty(0, dtype=torch.uint8).set_(storage)
    return saved.to(DEVICE).untyped_storage()


torch.serialization.register_package(0, _always(), _to_where_it_was)


# ---- NCCL ------------------------------------------------------------------------------------------------------------
_new_group = distributed_c10d._new_process_group_helper


def _with_collectives(group_size, group_rank, ranks, backend, *args, **kwargs):
    """A group that was to have NCCL for the device has gloo, whose collectives those of device.cpp call."""
    asked = str(backend)
    if "nccl" not in asked:
        return _new_group(group_size, group_rank, ranks, backend, *args, **kwargs)
    made = _new_group(group_size, group_rank, ranks, "cpu:gloo", *args, **kwargs)
    group = made[0]
    if group is distributed_c10d.GroupMember.NON_GROUP_MEMBER:
        return made
    device_memory.pretended_collectives(group.group_name.encode(), "gloo" not in asked)
    world = distributed_c10d._world
    world.pg_map[group] = (asked, world.pg_map[group][1])
    world.pg_backend_config[group] = str(distributed_c10d.BackendConfig(distributed_c10d.Backend(asked)))
    return made


distributed_c10d._new_process_group_helper = _with_collectives
torch.cuda.nccl.version = _always((0, 0, 0))  # that an error of a group of NCCL's is told with


# ---- torch's attention kernel of variable lengths --------------------------------------------------------------------
class _Kernel(torch.autograd.Function):
    """In plain operations, keeping for the backward pass what the kernel keeps: inputs, output, a number a query."""

    @staticmethod
    def forward(ctx, query, key, value, attend):
        output = attend(query, key, value)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        ctx.attend = attend
        return output

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors[:3]]
            output = ctx.attend(*inputs)
        return *torch.autograd.grad(output, inputs, gradient), None


@wraps(standing_in_for_the_kernel)  # whose signature the recipe looks at
def _kernel(query, key, value, *bounds, **options):
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"flash attention takes fp16 and bf16, and got {query.dtype}")
    return _Kernel.apply(query, key, value, lambda *inputs: standing_in_for_the_kernel(*inputs, *bounds, **options))


varlen.varlen_attn = _kernel
