"""Runs the recipe's real worker (FSDP actor and reference, no rollout) in processes of the tests, without Ray."""

import os
import pickle
import queue
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.multiprocessing as mp
from omegaconf import DictConfig, OmegaConf
from pretended_gpu import building
from tensordict import TensorDict

from recipe.spin.tools import doctor
from recipe.spin.tools.device_probe import free_port

ROOT = Path(__file__).resolve().parent.parent


def cpu_environment() -> dict[str, str]:
    """What verl_cpu/env.sh exports, one thread a process; set in the ranks alone, so that it changes no other test."""
    command = ["bash", "-c", f"source {ROOT}/verl_cpu/env.sh; env -0"]
    text = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True).stdout
    variables = dict(line.split("=", 1) for line in text.split("\0") if line)
    of_bash = ("PATH", "PWD", "OLDPWD", "SHLVL", "_")
    exported = {name: value for name, value in variables.items() if name not in of_bash}
    return exported | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def compose(*overrides: str, device: str | None = None) -> DictConfig:
    """The recipe's config for a profile, that of this process's device, with overrides, as main_spin composes it."""
    return doctor.compose(device or ("gpu" if building.LIBRARY in os.environ else "cpu"), *overrides)


class Ranks:
    """gloo ranks that live from call to call: importing verl takes each of them seconds.

    Functions that they run must stand in a helper module, not in a test file: processes import them by name.
    `environment` is what they have besides this process's own.
    """

    def __init__(self, world_size: int, environment: dict[str, str] | None = None):
        self.world_size = world_size
        self._environment = cpu_environment() if environment is None else environment
        self._processes: list = []

    def run(self, function, *args, timeout: float = 300) -> list:
        """Calls function(rank, *args) on every rank and returns what each returned; raises what one raised."""
        if not self._processes:
            self._start()
        outputs = {}
        try:
            for calls in self._calls:
                calls.put((function, args))
            while len(outputs) < self.world_size:
                rank, output = self._next_result(time.monotonic() + timeout)
                if isinstance(output, _Failure):  # the others wait for this one
                    raise RuntimeError(f"rank {rank} failed:\n{output.text}")
                outputs[rank] = output
        except BaseException:
            self.stop()
            raise
        return [outputs[rank] for rank in range(self.world_size)]

    def _next_result(self, deadline: float) -> tuple:
        """What a rank puts next; raises where there is none because one died, or at the deadline."""
        while True:
            dead = {rank: process.exitcode for rank, process in enumerate(self._processes) if not process.is_alive()}
            try:
                return self._results.get(timeout=1)
            except queue.Empty:
                if dead:
                    raise RuntimeError(f"ranks that died, with their exit codes: {dead}") from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.world_size} ranks that live did not answer in time") from None

    def stop(self, patience: float = 0) -> None:
        """Ends the processes; with `patience` in seconds they may end by themselves first."""
        for process, calls in zip(self._processes, self._calls, strict=True) if self._processes else ():
            calls.put(None)
            process.join(patience)
            process.kill()
            process.join()
        self._processes = []

    def _start(self) -> None:
        port = free_port()
        context = mp.get_context("spawn")
        self._results = context.Queue()
        self._calls = [context.Queue() for _ in range(self.world_size)]
        before = dict(os.environ)
        os.environ.update(self._environment)
        try:
            for rank, calls in enumerate(self._calls):
                args = (rank, self.world_size, port, calls, self._results)
                self._processes.append(context.Process(target=_rank_main, args=args, daemon=True))
                self._processes[-1].start()
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def ranks_by_number(environment: dict[str, str] | None = None) -> Iterator[dict[int, Ranks]]:
    """One rank and two, started at their first use."""
    worlds = {size: Ranks(size, environment) for size in (1, 2)}
    yield worlds
    for world in worlds.values():
        world.stop(patience=5)


class _Failure:
    def __init__(self, text: str):
        self.text = text


def _rank_main(rank, world_size, port, calls, results) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    while True:
        call = calls.get()
        if call is None:
            return
        function, args = call
        try:
            results.put((rank, function(rank, *args)))
        except BaseException:
            results.put((rank, _Failure(traceback.format_exc())))
            results.close()
            results.join_thread()
            os._exit(1)  # the other ranks may wait for this one in a collective


def make_worker(*overrides: str):
    """The worker with its models loaded, as the trainer has it but for the rollout; with LoRA there is no reference."""
    from recipe.spin.fsdp_workers import SpinWorker

    config = compose(*overrides)
    OmegaConf.resolve(config)
    models = "actor" if config.actor_rollout_ref.model.lora_rank > 0 else "actor_ref"
    worker = SpinWorker(config.actor_rollout_ref, role=models.replace("actor", "actor_rollout"))
    worker.role = models  # init_model builds what the role's name contains
    worker.init_model()
    return worker


class LocalWorkerGroup:
    """Stands for the trainer's worker group where every rank runs the same trainer: each works on its own share.

    Shares are cut, sent and put together again as by verl's dispatch functions: ranks that share a sequence get the
    same rows, and one of them answers.
    """

    def __init__(self, worker):
        self.worker = worker
        self.updates: list[dict] = []  # metrics of every call of update_actor

    def _query_dispatch_info(self, mesh_name: str) -> list[int]:
        return _of_all_ranks(self.worker._query_dispatch_info(mesh_name))

    def _dispatch(self, method, data: TensorDict) -> TensorDict:
        from verl.protocol import BatchData

        places = self._query_dispatch_info("actor")
        answers = _of_all_ranks(self.worker._query_collect_info("actor"))
        share = BatchData(data).chunk(chunks=max(places) + 1)[places[torch.distributed.get_rank()]]
        outputs = _of_all_ranks(method(pickle.loads(pickle.dumps(share))))
        return BatchData([output for output, answer in zip(outputs, answers, strict=True) if answer]).concat()

    def refresh_reference(self, *args) -> None:
        self.worker.refresh_reference(*args)

    def compute_ref_logps(self, data: TensorDict) -> TensorDict:
        return self._dispatch(self.worker.compute_ref_logps, data)

    def update_actor(self, data: TensorDict) -> TensorDict:
        from verl.utils import tensordict_utils as tu

        output = self._dispatch(self.worker.update_actor, data)
        self.updates.append(dict(tu.get(output, "metrics")))
        return output


def _of_all_ranks(value) -> list:
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def make_update(*overrides: str):
    """The trainer's DPOUpdate, with a worker of this process in place of its worker group."""
    from recipe.spin.dpo_update import DPOUpdate

    config = compose(*overrides)
    OmegaConf.resolve(config)
    return DPOUpdate(config, LocalWorkerGroup(make_worker(*overrides)), reference_equals_actor=True)


def nest(rows: list[list] | list[torch.Tensor]) -> torch.Tensor:
    """Rows of unequal length as the jagged tensor that TransferQueue hands out."""
    from recipe.spin.engine.rows import nest

    return nest([torch.as_tensor(row) for row in rows])


def response_batch(prompts: list[list[int]], responses: list[list[int]], masks: list[list[int]]) -> TensorDict:
    """Responses, one an entry, as spin_trainer reads them."""
    fields = {"prompts": prompts, "responses": responses, "response_mask": masks}
    rows = {name: nest([torch.tensor(row, dtype=torch.long) for row in part]) for name, part in fields.items()}
    return TensorDict(rows, batch_size=len(prompts))


def full_parameters(module_engine) -> dict:
    """An engine's parameters by name, whole and on every rank, as arrays, in the precision in which they are kept."""
    from recipe.spin.engine.row_engine import RowEngine

    parameters, _ = super(RowEngine, module_engine).get_per_tensor_param()
    return {name: tensor.detach().clone().cpu().numpy() for name, tensor in parameters}
