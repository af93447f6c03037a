"""The Ray worker: FSDP actor and FSDP reference in one process, what sends their weights to vLLM's, and the copy of the
actor into the reference."""

import asyncio
import os
import tempfile
from collections.abc import MutableMapping
from functools import partial

import torch
from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint import fsdp_checkpoint_manager
from verl.utils.device import get_torch_device
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine_workers import ActorRolloutRefWorker

from recipe.spin import verl_patches
from recipe.spin.dp_actor import DataParallelPPOActor, RowWorker
from recipe.spin.rollout.weights import ONE_MACHINE, RUN_NAME, has_own_sockets, own_socket

verl_patches.ignore_trl()
verl_patches.own_transfer_queue()
verl_patches.load_data_alone(fsdp_checkpoint_manager)


class SpinWorker(ActorRolloutRefWorker):
    """verl's hybrid worker with the DPO actor and a reference that can be refreshed from it.

    With LoRA there is no second model: the reference is the base model, the actor with its adapter off.
    """

    actor_worker_cls = DataParallelPPOActor
    ref_worker_cls = RowWorker

    rollout_model = "actor"
    _reference_refreshed = False  # since it was loaded from the model

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        """Builds the models as verl does, on the engine that `actor_rollout_ref.share_prompt` chooses."""
        meet_in_a_file(os.environ)
        # verl would do it with torch's own limit, ten minutes, in which not every disk takes a large model's checkpoint
        initialize_global_process_group_ray(self.config.nccl_timeout)
        own = {name: self.config[name] for name in ("share_prompt", "keep_products")}
        self.actor_worker_cls, self.ref_worker_cls = (
            partial(worker, **own) for worker in (self.actor_worker_cls, self.ref_worker_cls)
        )
        super().init_model()
        if "rollout" in self.role and has_own_sockets(self.config.rollout):
            self.rollout.zmq_handle = own_socket(self.rollout.zmq_handle)
            verl_patches.limit_weight_transfer()

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_ref_logps(self, data: TensorDict) -> TensorDict:
        """Log-probs of the responses under the reference: `logps`, jagged, an entry a response of each row.

        `data` are rows (engine/rows.py) with `temperature` and `average_log_prob` (means over tokens instead of sums);
        with `calculate_token_logps` there are `token_logps` too, an entry a response token.
        """
        tu.assign_non_tensor(data, no_lora_adapter=self.ref is None)
        return _logps(self.ref or self.actor, data)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_actor_logps(self, data: TensorDict) -> TensorDict:
        """The same under the actor."""
        return _logps(self.actor, data)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def advance_learning_rate(self) -> None:
        """Goes on by one step in the learning rate's schedule, which counts steps that train nothing as well."""
        self.actor.engine.lr_scheduler_step()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def choose_rollout_model(self, name: str) -> None:
        """Says whose weights the next pushes send to vLLM: the "actor"'s or the "reference"'s."""
        self.rollout_model = name

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int = None, mode: str = "auto"):
        """Pushes weights to vLLM as verl does, those of the model that `choose_rollout_model` named."""
        if self._wakes_others_devices():
            get_torch_device().empty_cache()
            await asyncio.to_thread(torch.distributed.barrier)
        actor = self.actor
        if self.rollout_model == "reference":
            self.actor = self.ref
        try:
            return await super().update_weights(global_steps=global_steps, mode=mode)
        finally:
            self.actor = actor

    def _wakes_others_devices(self) -> bool:
        """Whether the first of several ranks makes room for vLLM's weights on the devices of all of them.

        verl has it wait for what the others still hold before the cache alone.
        """
        rollout = self.config.rollout
        return rollout.free_cache_engine and rollout.tensor_model_parallel_size * rollout.data_parallel_size > 1

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def refresh_reference(self, alpha: float = 1.0) -> None:
        """Moves the reference towards the actor in memory: reference = alpha * actor + (1 - alpha) * reference.

        alpha 1 copies (SPIN's next opponent); below 1 it is TR-DPO's soft update (arXiv 2404.09656, eq. 8).
        """
        if alpha == 1.0 and not self._reference_refreshed:
            leave_mapped_file(self.ref.engine.module)
        mix_parameters(source=self.actor.engine.module, target=self.ref.engine.module, alpha=alpha)
        self._reference_refreshed = True

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        """Saves the actor as verl does, and beside it the reference once it differs from the model that was loaded."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        if self._reference_refreshed:
            self.ref.save_checkpoint(_reference_path(local_path), global_step=global_step)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False):
        """Loads the actor, and the reference where the checkpoint holds one."""
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)
        if os.path.isdir(_reference_path(local_path)):
            self.ref.load_checkpoint(_reference_path(local_path))
            self._reference_refreshed = True


def meet_in_a_file(environment: MutableMapping[str, str]) -> None:
    """Lets the ranks of a run on one machine find each other through a file, by verl's variable.

    The server that torch would start for it listens on every interface.
    """
    if ONE_MACHINE in environment:
        name = f"{environment[RUN_NAME]}-ranks-{environment['MASTER_PORT']}"
        environment.setdefault("DIST_INIT_METHOD", f"file://{tempfile.gettempdir()}/{name}")


def _reference_path(actor_path: str) -> str:
    return os.path.join(os.path.dirname(actor_path), "reference")


def leave_mapped_file(module: torch.nn.Module) -> None:
    """Gives weights that are to be overwritten memory of their own, its content left open, where FSDP has not yet.

    On a CPU they lie in the model's file, mapped: a page that is written there is read and copied first.
    """
    if not isinstance(module, FSDP | FSDPModule):
        for parameter in module.parameters():
            parameter.data = torch.empty_like(parameter.data)


@torch.no_grad()
def mix_parameters(source: torch.nn.Module, target: torch.nn.Module, alpha: float = 1.0) -> None:
    """target = alpha * source + (1 - alpha) * target for two equally sharded FSDP modules, shard by shard.

    Both are resharded first: FSDP keeps gathered copies of the parameters after a forward, and would go on computing
    with the old ones although the stored shards are new.

    Raises:
        ValueError: when the modules are sharded differently.
    """
    get_torch_device().synchronize()  # verl does not wait for the copies by which it offloads an actor to the host
    _reshard(source)
    _reshard(target)
    _mix(dict(source.named_parameters()), dict(target.named_parameters()), alpha)
    _mix(dict(source.named_buffers()), dict(target.named_buffers()), 1.0)
    get_torch_device().synchronize()  # copies to pinned memory of the host may still be under way


def _mix(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], alpha: float) -> None:
    if source.keys() != target.keys():
        raise ValueError(f"actor and reference have different tensors: {sorted(source.keys() ^ target.keys())[:4]}")
    for name, tensor in target.items():
        new, old = _local(source[name]), _local(tensor)
        if new.shape != old.shape:
            raise ValueError(
                f"{name} has {tuple(new.shape)} in the actor's shard and {tuple(old.shape)} in the reference's; give "
                "actor_rollout_ref.actor.fsdp_config and actor_rollout_ref.ref.fsdp_config the same fsdp_size"
            )
        if alpha == 1.0:
            # Cast where the source lies: copy_ would bring an fp32 shard to the host whole, through pageable memory
            old.copy_(new.to(old.dtype), non_blocking=True)
        else:
            old.lerp_(new.to(old), alpha)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.data


def _logps(model: RowWorker, data: TensorDict) -> TensorDict | None:
    """Log-probs of a pass that no backward pass follows: FSDP would keep what it gathered until the next."""
    logps = model.response_logps(data)
    _reshard(model.engine.module)
    return logps


def _reshard(module: torch.nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FSDP) and part._handle is not None and _can_reshard(part._handle):
            part._handle.reshard(True)


def _can_reshard(handle) -> bool:
    """FSDP1 on one rank does not shard, and a model that nothing was asked of yet has gathered nothing."""
    return handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard")
