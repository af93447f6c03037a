"""What verl 0.9.1, and Ray, TransferQueue, vLLM and torch under it, get wrong for this recipe and offer no hook for.

Every patch stands here, but for those that let verl train without a GPU: verl_cpu/patches.py.
"""

import asyncio
import importlib
import ipaddress
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import hydra

from recipe.spin.common.secrets import without_secrets

WEIGHTS_WAIT_SECONDS = 300.0  # a bucket of gigabytes is gathered, or loaded, in far less


def ignore_trl() -> None:
    """With TRL installed verl imports its value-head model to patch it; TRL 1.x has none, and loading a model fails."""
    from verl.models.transformers import monkey_patch

    monkey_patch.is_trl_available = lambda: False


def draw_class_ids_from_the_system() -> None:
    """Ray's own generator of random ids is copied by forks, once it was used, as it is when a class is declared remote.

    All forks would draw the same ids then, those of objects among them.
    """
    from ray import ActorClassID, actor

    actor.ActorClassID = SimpleNamespace(from_random=lambda: ActorClassID(os.urandom(ActorClassID.size())))


def build_agent_loops_once(stateless: str) -> None:
    """verl builds an agent loop for every response, through hydra, in 6 ms; one of the class named serves them all."""
    from verl.experimental.agent_loop import agent_loop

    build = hydra.utils.instantiate
    built = []

    def instantiate(config, **parts):
        if config["_target_"] != stateless:
            return build(config=config, **parts)
        if not built:
            built.append(build(config=config, **parts))
        return built[0]

    agent_loop.hydra = SimpleNamespace(utils=SimpleNamespace(instantiate=instantiate))


def write_together(outbox) -> None:
    """verl's agent loop worker writes each response, and each prompt's status, by a call of its own to TransferQueue.

    `outbox` (rollout/queue.py) takes them in its place, the fields of responses as the dicts that verl made.
    """
    from verl.trainer.ppo.v1 import agent_loop_tq

    agent_loop_tq.list_of_dict_to_tensordict = list
    agent_loop_tq.tq = SimpleNamespace(
        init=agent_loop_tq.tq.init, async_kv_put=outbox.put, async_kv_batch_put=outbox.batch_put
    )


def without_load_balancer() -> None:
    """verl starts a process that spreads requests by their arrival; RolloutClient spreads them and never asks it."""
    from verl.workers.rollout.llm_server import LLMServerManager

    async def keep_none(self) -> None:
        self.global_load_balancer = None

    LLMServerManager._init_global_load_balancer = keep_none


def use_reward_worker(worker: type) -> None:
    """verl's trainer builds its reward loop in the midst of all else, and that starts verl's own class of workers.

    To be called in the process that starts them, with a class derived from verl's.
    """
    from verl.experimental.reward_loop import reward_loop

    reward_loop.RewardLoopWorker = worker


@contextmanager
def secrets_kept_from_loggers() -> Iterator[None]:
    """verl hands the loggers of metrics (wandb, MLflow and others) all settings, the secrets among them."""
    from verl.trainer.ppo.v1 import trainer_base

    tracking = trainer_base.Tracking

    def tracking_without_secrets(*args, config: dict, **options):
        return tracking(*args, config=without_secrets(config), **options)

    trainer_base.Tracking = tracking_without_secrets
    try:
        yield
    finally:
        trainer_base.Tracking = tracking


def load_data_alone(module: ModuleType) -> None:
    """verl loads checkpoints with `torch.load(weights_only=False)`, which runs whatever code a file names.

    In that module of verl's `torch.load` takes tensors and plain values, numpy's random state among them, and what
    `torch.serialization.add_safe_globals` was told of. Anything else is refused by an UnpicklingError.
    """
    import numpy as np
    import torch

    state = np.zeros(1, np.uint32)
    torch.serialization.add_safe_globals([np.ndarray, np.dtype, type(state.dtype), state.__reduce__()[0]])

    def load(file, weights_only=False, **options):
        try:
            return torch.load(file, weights_only=True, **options)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(  # on one line, which alone stands as the cause on the console
                f"{file} is damaged, or names code, which is not run: go on from another checkpoint; where a data set "
                "or sampler of your own keeps what the whole error names, its module has to allow that with "
                "torch.serialization.add_safe_globals"
            ) from error

    class TorchThatLoadsData(ModuleType):
        def __getattr__(self, name: str):
            return getattr(torch, name)

    module.torch = TorchThatLoadsData("torch")
    module.torch.load = load


def _all_have_servers(manager) -> bool:
    replicas = getattr(manager, "rollout_replicas", [])
    return bool(replicas) and all(replica.servers for replica in replicas)


def start_servers_early(config, worker_group) -> None:
    """verl starts vLLM's servers after the workers have loaded the models. Starts them now, and verl's call waits.

    Returns when the workers have told the servers where they are; busy with loading they could not.
    """
    from verl.workers.rollout.llm_server import LLMServerManager

    manager = LLMServerManager(config=config, worker_group=worker_group)
    started: Future[None] = Future()

    def start() -> None:
        try:
            started.set_result(asyncio.run(manager._initialize_llm_servers()))
        except BaseException as error:  # handed to the thread that waits
            started.set_exception(error)

    threading.Thread(target=start, name="start-servers", daemon=True).start()
    while not started.done() and not _all_have_servers(manager):
        time.sleep(0.02)

    verls = LLMServerManager.__dict__["create"]

    def create(*args, **kwargs) -> LLMServerManager:
        LLMServerManager.create = verls
        started.result()
        asyncio.run(manager._init_global_load_balancer())
        return manager

    LLMServerManager.create = staticmethod(create)


def own_transfer_queue() -> None:
    """TransferQueue's actor has one name in one namespace of the whole cluster: a second run would take the first's.

    Here it is looked for, and made, in the namespace of the run's own job.
    """
    import ray
    from transfer_queue import interface

    controller = interface.TransferQueueController
    if interface.ray is not ray:
        return  # another module of this process has seen to it
    interface.TransferQueueController = SimpleNamespace(
        options=lambda namespace=None, **options: controller.options(**options)
    )
    interface.ray = SimpleNamespace(
        get=ray.get, kill=ray.kill, get_actor=lambda name, namespace=None: ray.get_actor(name)
    )


def keep_ray_on_loopback() -> None:
    """Ray reads its switch for loopback when it is imported, which Hydra does in looking for verl's config.

    Before the settings are there, that is, by which a run joins a cluster or not. An address of `ray.init`'s is no way:
    Ray puts the machine's in place of 127.0.0.1.
    """
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


@contextmanager
def sigterm_kept_from_ray() -> Iterator[None]:
    """`ray.init` sets a handler of SIGTERM that ends the process without a chance to clean up. Here it sets none."""
    from ray._private import utils

    original = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = original


@contextmanager
def workers_without_folder_of_the_call() -> Iterator[None]:
    """Lets workers import by their PYTHONPATH alone. Held around verl's run_ppo, which calls `ray.init`.

    It would put the folder of the call before all others, and a `recipe/spin` in there, which older trees of verl have,
    would be run in place of this one. Ray leaves it out where it is told of a working folder, and has no other switch.
    """
    from ray.job_config import JobConfig

    original = JobConfig._runtime_env_has_working_dir
    JobConfig._runtime_env_has_working_dir = lambda job: True
    try:
        yield
    finally:
        JobConfig._runtime_env_has_working_dir = original


def limit_weight_transfer(seconds: float = WEIGHTS_WAIT_SECONDS) -> None:
    """verl's sender and receiver of weights wait for each other without end, for one that died or failed too."""
    from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer as transfer

    sender, receiver = transfer.BucketedWeightSender, transfer.BucketedWeightReceiver
    send, receive = sender.async_send_weights, receiver.receive_weights

    async def async_send_weights(self, weights) -> None:
        with _naming_the_silent("vLLM's worker did not take", self.zmq_handle, seconds):
            await send(self, weights)

    def receive_weights(self, on_bucket_received) -> None:
        def on_bucket(weights, is_last: bool) -> None:
            try:
                on_bucket_received(weights, is_last)
            except Exception as error:
                self.socket.send_string(f"{type(error).__name__}: {error}")
                raise

        with _naming_the_silent("the trainer's rank did not send", self.zmq_handle, seconds):
            receive(self, on_bucket)

    sender.async_send_weights, receiver.receive_weights = async_send_weights, receive_weights
    _wrap_socket(sender, seconds, _SocketThatHearsOfFailures)
    _wrap_socket(receiver, seconds, lambda socket: socket)


def _wrap_socket(side: type, seconds: float, wrap: Callable) -> None:
    open_socket = side._init_socket

    def _init_socket(self) -> None:
        open_socket(self)
        self.socket.rcvtimeo = self.socket.sndtimeo = int(1000 * seconds)
        self.socket = wrap(self.socket)

    side._init_socket = _init_socket


class _SocketThatHearsOfFailures:
    """The sender's. verl throws away what the receiver answers, which is nothing unless it failed."""

    def __init__(self, socket):
        self._socket = socket

    def __getattr__(self, name: str):
        return getattr(self._socket, name)

    def recv(self) -> bytes:
        if failure := self._socket.recv():
            raise RuntimeError(f"vLLM's worker could not load the weights: {failure.decode()}")
        return failure


@contextmanager
def _naming_the_silent(who_did_not: str, address: str, seconds: float) -> Iterator[None]:
    import zmq

    try:
        yield
    except zmq.Again as error:
        raise TimeoutError(
            f"{who_did_not} weights for {seconds:g} s ({address}): it has died or hangs; its last words are in the logs"
        ) from error


def keep_rendezvous_on_loopback() -> None:
    """torch's rendezvous listens on every interface, whatever address it is given: vLLM before 0.28 meets there.

    A rendezvous at a loopback address then listens there alone; at others as torch has it.
    """
    from torch.distributed import TCPStore

    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # the package has a function of that name
    create = rendezvous._create_c10d_store

    def create_store(hostname, port, rank, world_size, timeout, use_libuv=True) -> TCPStore:
        if rank != 0 or not _is_loopback(hostname):
            return create(hostname, port, rank, world_size, timeout, use_libuv)
        listener = socket.create_server((hostname, port))
        return TCPStore(
            host_name=hostname,
            port=port,
            world_size=world_size,
            is_master=True,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
            use_libuv=use_libuv,
        )

    rendezvous._create_c10d_store = create_store


def _is_loopback(hostname: str) -> bool:
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:  # a name
        return hostname == "localhost"
