"""Runs the recipe's real worker (FSDP actor and reference, no rollout) in processes of the tests, without Ray."""

import os
import socket
import traceback
from pathlib import Path

import torch
import torch.multiprocessing as mp
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict

ROOT = Path(__file__).resolve().parent.parent


def compose(*overrides: str) -> DictConfig:
    """The recipe's config for the CPU profile with overrides, as main_spin composes it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    import recipe.spin.main_spin  # noqa: F401 - registers the resolver that the config uses

    with initialize_config_module("recipe.spin.config", version_base=None):
        return hydra_compose("spin_trainer", overrides=["device=cpu", *overrides])


def run_ranks(world_size: int, function, *args) -> list:
    """Calls function(rank, *args) on `world_size` gloo ranks and returns what each returned; raises what one raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, port, results, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        outputs = dict(results.get(timeout=300) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    for output in outputs.values():
        if isinstance(output, _Failure):
            raise RuntimeError(f"rank failed:\n{output.text}")
    return [outputs[rank] for rank in range(world_size)]


class _Failure:
    def __init__(self, text: str):
        self.text = text


def _rank_main(rank, world_size, port, results, function, args) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        output = function(rank, *args)
        results.put((rank, output))
    except BaseException:
        results.put((rank, _Failure(traceback.format_exc())))
        os._exit(1)  # the other ranks may wait for this one in a collective
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def make_worker(*overrides: str):
    """The worker with its actor and reference loaded, as the trainer has it but for the rollout."""
    from recipe.spin.fsdp_workers import SpinWorker

    config = compose(*overrides)
    OmegaConf.resolve(config)
    worker = SpinWorker(config.actor_rollout_ref, role="actor_rollout_ref")
    worker.role = "actor_ref"  # init_model builds what the role's name contains
    worker.init_model()
    return worker
