"""Whether the Ray cluster that a run has joined can carry it: what its nodes have free, and the files that they see."""

import os
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipe.spin.checks.finding import FAIL, OK, Finding
from recipe.spin.checks.machine import CPUS_A_RANK, UNITS, judge_cores

SECONDS_TO_BE_FREE = 30.0  # in which Ray has back what a run held that has just ended
SECONDS_TO_ANSWER = 300.0  # of a node whose first Python process reads a file system for the first time
OF_THE_DRIVERS_NODE = 2  # CPUs of the TaskRunner and of TransferQueue's controller, which Ray places there
RECIPE = str(Path(__file__).parents[1])
# What processes on all nodes read, a folder or a file each where it is no name on the hub
READ_BY_ALL = (
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.tokenizer_path",
    "actor_rollout_ref.model.lora_adapter_path",
    "data.train_files",
    "data.val_files",
    "reward.custom_reward_function.path",
    "reward.reward_model.model_path",
)


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of a node as Ray counts them."""

    cpus: float
    gpus: float
    has_driver: bool = False


def nodes_of_cluster(free: bool) -> list[Node]:
    """The nodes that Ray places processes on, with what they have, or with what of it nobody holds."""
    import ray
    from ray._private.state import available_resources_per_node

    driver, unheld = ray.get_runtime_context().get_node_id(), available_resources_per_node()
    found = []
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
            has = unheld.get(node["NodeID"], {}) if free else node["Resources"]
            found.append(Node(has.get("CPU", 0), has.get("GPU", 0), node["NodeID"] == driver))
    return found


def check_cluster(config: DictConfig) -> Finding:
    """Whether Ray can place the run: with too little free it would wait for ever, and say nothing."""
    deadline = time.monotonic() + SECONDS_TO_BE_FREE
    whole = _judge(config, nodes_of_cluster(free=False), "has")
    if whole.verdict == FAIL:
        return whole
    while (finding := _judge(config, nodes_of_cluster(free=True), "has free")).verdict == FAIL:
        if time.monotonic() > deadline:
            return finding
        time.sleep(1)
    return finding


def cpus_of_a_node(config: DictConfig, node: Node, nodes: int) -> int:
    """The CPUs that a node with ranks is asked for, of so many nodes.

    Its ranks', its share of TransferQueue's storage units, which are dealt out over all nodes, and 1 that is free: verl
    places a vLLM server on its ranks' node and no other.
    """
    ranks, units = config.trainer.n_gpus_per_node, OmegaConf.select(config, UNITS)
    return CPUS_A_RANK * ranks + ceil(units / nodes) + 1 + OF_THE_DRIVERS_NODE * node.has_driver


def _judge(config: DictConfig, nodes: list[Node], has: str) -> Finding:
    trainer, ranks = config.trainer, config.trainer.n_gpus_per_node
    fit = [node for node in nodes if node.gpus >= ranks and node.cpus >= cpus_of_a_node(config, node, len(nodes))]
    told = ", ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes)
    if len(fit) < trainer.nnodes:
        most = max((cpus_of_a_node(config, node, len(nodes)) for node in nodes), default=0)
        return Finding(
            "nodes",
            FAIL,
            f"trainer.nnodes={trainer.nnodes}, trainer.n_gpus_per_node={ranks}: so many nodes with {ranks} GPUs and up "
            f"to {most} CPUs are needed ({CPUS_A_RANK} a rank, 1 for each of TransferQueue's storage units there, 1 to "
            f"place vLLM's servers, {OF_THE_DRIVERS_NODE} where the command runs), and the Ray cluster {has} nodes "
            f"with {told}: the run would wait for ever; start Ray on more machines, wait for other runs, lower the two "
            "keys, or give `ray start` a larger --num-cpus",
        )
    if fault := _reward_pool_fault(config, nodes, fit):
        return Finding(
            "nodes", FAIL, f"{fault}, and the Ray cluster {has} nodes with {told}: the run would wait for ever"
        )
    return judge_cores(config, int(sum(node.cpus for node in nodes)), f"the Ray cluster {has}")


def _reward_pool_fault(config: DictConfig, nodes: list[Node], fit: list[Node]) -> str:
    """What keeps a reward model's own pool from lying beside the ranks, which may be the nodes with the fewest GPUs."""
    reward = config.reward.reward_model
    if not (reward.enable and reward.enable_resource_pool):
        return ""
    trained_on = sorted(fit, key=lambda node: node.gpus)[: config.trainer.nnodes]
    others = [node.gpus for node in nodes if not any(node is one for one in trained_on)]
    left = sorted([*others, *(node.gpus - config.trainer.n_gpus_per_node for node in trained_on)])
    for _ in range(reward.nnodes):
        place = next((number for number, gpus in enumerate(left) if gpus >= reward.n_gpus_per_node), None)
        if place is None:
            return (
                f"reward.reward_model.nnodes={reward.nnodes}, reward.reward_model.n_gpus_per_node="
                f"{reward.n_gpus_per_node}: beside the trainer's {config.trainer.nnodes} x "
                f"{config.trainer.n_gpus_per_node} GPUs so many are needed on one node each; lower them, or "
                "trainer.n_gpus_per_node"
            )
        left[place] -= reward.n_gpus_per_node
    return ""


# ---- Files -----------------------------------------------------------------------------------------------------------
def check_files(config: DictConfig, in_run_folder: str) -> Finding:
    """Whether every node sees what the run reads and writes where the command does, the recipe among it.

    `in_run_folder` is the name of a file that stands in the run's folder by now. Each node is asked by a process there.
    """
    paths = [str(Path(config.trainer.default_local_dir) / in_run_folder), RECIPE, *files_of(config)]
    faults = [f"{node}: {fault}" for node, fault in _asked_of_nodes(paths).items()]
    if not faults:
        return Finding("files", OK, f"all nodes see {', '.join(paths)}")
    return Finding(
        "files",
        FAIL,
        f"nodes of the Ray cluster lack what the run needs on each: {'; '.join(faults)}; put it on a file system that "
        "all see at the same path, the run's folder (RUN_DIR) in any case (examples/cluster/README.md)",
    )


def files_of(config: DictConfig) -> list[str]:
    """The files and folders that processes on all nodes read, as far as this machine has them."""
    found = []
    for key in READ_BY_ALL:
        named = OmegaConf.select(config, key)
        for path in named if OmegaConf.is_list(named) else [named]:
            if isinstance(path, str) and os.path.isabs(path) and os.path.exists(path):
                found.append(path)
    return found


def _asked_of_nodes(paths: list[str]) -> dict[str, str]:
    """What nodes lack of these files and folders, by the nodes' names."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def unseen() -> list[str]:  # inside another function it is sent as it is, as a node may lack the recipe
        return [path for path in paths if not os.path.exists(path)]

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    asked = {
        ray.remote(unseen)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(): f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in nodes
    }
    ready, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    answers = {asked[one]: f"no {', no '.join(missing)}" for one in ready if (missing := ray.get(one))}
    return answers | {asked[one]: f"no answer in {SECONDS_TO_ANSWER:.0f} s" for one in waiting}
