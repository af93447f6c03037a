"""What verl 0.9.1 gets wrong for this recipe and offers no hook for."""

import asyncio
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import hydra
from verl.models.transformers import monkey_patch


def ignore_trl() -> None:
    """With TRL installed verl imports its value-head model to patch it; TRL 1.x has none, and loading a model fails."""
    monkey_patch.is_trl_available = lambda: False


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


def without_load_balancer() -> None:
    """verl starts a process that spreads requests by their arrival; RolloutClient spreads them and never asks it."""
    from verl.workers.rollout.llm_server import LLMServerManager

    async def keep_none(self) -> None:
        self.global_load_balancer = None

    LLMServerManager._init_global_load_balancer = keep_none


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
