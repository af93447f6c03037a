"""Whether the Ray cluster that a run has joined can carry it: what its nodes have free, and the files that they see."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipe.spin.checks.finding import FAIL, OK, Finding
from recipe.spin.checks.machine import CPUS_A_RANK, UNITS, judge_cores
from recipe.spin.checks.paths import files_read

SECONDS_TO_BE_FREE = 30.0  # in which Ray has back what a run held that has just ended
SECONDS_TO_BE_SEEN = 10.0  # of a file that was written just now, on a file system whose nodes remember names
SECONDS_TO_ANSWER = 300.0  # of a node whose first Python process reads a file system for the first time
OF_THE_DRIVERS_NODE = 2  # CPUs of the TaskRunner and of TransferQueue's controller, which Ray places there
RECIPE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of a node as Ray counts them, and the CPUs that others than ranks are given there.

    TransferQueue's storage units are dealt out over all nodes, and the TaskRunner and TransferQueue's controller are
    placed where the command runs.
    """

    cpus: float
    gpus: float
    units: int = 0
    has_driver: bool = False

    @property
    def aside(self) -> int:
        return self.units + OF_THE_DRIVERS_NODE * self.has_driver


def nodes_of_cluster(units: int, free: bool) -> list[Node]:
    """The nodes that Ray places processes on, with what they have, or with what of it nobody holds."""
    import ray
    from ray._private.state import available_resources_per_node

    driver, unheld = ray.get_runtime_context().get_node_id(), available_resources_per_node()
    found, nodes = [], sorted(_nodes_with_cpus(ray.nodes()), key=lambda node: node["NodeID"])  # as units are dealt out
    for number, node in enumerate(nodes):
        has = unheld.get(node["NodeID"], {}) if free else node["Resources"]
        dealt = len(range(number, units, len(nodes)))
        found.append(Node(has.get("CPU", 0), has.get("GPU", 0), dealt, node["NodeID"] == driver))
    return found


def _nodes_with_cpus(nodes: list[dict]) -> list[dict]:
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def check_cluster(config: DictConfig) -> Finding:
    """Whether Ray can place the run: with too little free it would wait for ever, and say nothing."""
    deadline, units = time.monotonic() + SECONDS_TO_BE_FREE, OmegaConf.select(config, UNITS)
    whole = _judge(config, nodes_of_cluster(units, free=False), "has")
    if whole.verdict == FAIL:
        return whole
    while (finding := _judge(config, nodes_of_cluster(units, free=True), "has free")).verdict == FAIL:
        if time.monotonic() > deadline:
            return finding
        time.sleep(1)
    return finding


def _judge(config: DictConfig, nodes: list[Node], has: str) -> Finding:
    trainer, ranks = config.trainer, config.trainer.n_gpus_per_node
    told = ", ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes)
    if any(node.cpus < node.aside for node in nodes if node.units):
        text = (
            f"each node of the Ray cluster gets its share of {UNITS}={OmegaConf.select(config, UNITS)}, a CPU each, "
            f"and the command's takes {OF_THE_DRIVERS_NODE} more; the cluster {has} nodes with {told}, and the run "
            "would wait for ever: wait for other runs, or give `ray start` a larger --num-cpus (0 leaves a node out)"
        )
        return Finding("nodes", FAIL, text)
    # Of vLLM's servers, which verl places on their ranks' node and no other, each wants a CPU that is free
    needed = [CPUS_A_RANK * ranks + node.aside + 1 for node in nodes]
    fit = [node for node, cpus in zip(nodes, needed, strict=True) if node.gpus >= ranks and node.cpus >= cpus]
    if len(fit) < trainer.nnodes:
        return Finding(
            "nodes",
            FAIL,
            f"trainer.nnodes={trainer.nnodes}, trainer.n_gpus_per_node={ranks}: so many nodes with {ranks} GPUs and up "
            f"to {max(needed, default=0)} CPUs are needed ({CPUS_A_RANK} a rank, 1 for each of TransferQueue's storage "
            f"units there, 1 to place vLLM's servers, {OF_THE_DRIVERS_NODE} where the command runs); the Ray cluster "
            f"{has} nodes with {told}: the run would wait for ever; start Ray on more machines, wait for other runs, "
            "lower the two keys, or give `ray start` a larger --num-cpus",
        )
    if fault := _reward_pool_fault(config, nodes, fit):
        cause = f"{fault}, and the Ray cluster {has} nodes with {told}"
        return Finding("nodes", FAIL, f"{cause}: the run would wait for ever")
    return judge_cores(config, int(sum(node.cpus for node in nodes)), f"the Ray cluster {has}")


def _reward_pool_fault(config: DictConfig, nodes: list[Node], fit: list[Node]) -> str:
    """What keeps a reward model's own pool from lying beside the ranks, which may be the nodes with the fewest GPUs."""
    reward, ranks = config.reward.reward_model, config.trainer.n_gpus_per_node
    if not (reward.enable and reward.enable_resource_pool):
        return ""
    trained_on = sorted(fit, key=lambda node: node.gpus)[: config.trainer.nnodes]
    left = []
    for node in nodes:
        taken = ranks if any(node is one for one in trained_on) else 0
        left.append([node.gpus - taken, node.cpus - node.aside - CPUS_A_RANK * taken])
    asked = [reward.n_gpus_per_node, CPUS_A_RANK * reward.n_gpus_per_node]
    for _ in range(reward.nnodes):
        rooms = [room for room in left if room[0] >= asked[0] and room[1] >= asked[1]]
        if not rooms:
            return (
                f"reward.reward_model.nnodes={reward.nnodes}, reward.reward_model.n_gpus_per_node={asked[0]}: beside "
                f"the trainer's {config.trainer.nnodes} x {ranks} GPUs so many, and {asked[1]} CPUs, are needed on one "
                "node each; lower them, or trainer.n_gpus_per_node"
            )
        smallest = min(rooms)
        smallest[:] = [has - needs for has, needs in zip(smallest, asked, strict=True)]
    return ""


# ---- Files -----------------------------------------------------------------------------------------------------------
def check_files(config: DictConfig, in_run_folder: str) -> Finding:
    """Whether every node sees what the run reads and writes where the command does, the recipe among it.

    `in_run_folder` is the name of a file that stands in the run's folder by now. Each node is asked by a process there.
    """
    paths = [str(Path(config.trainer.default_local_dir) / in_run_folder), RECIPE, *files_read(config)]
    faults = [f"{node}: {fault}" for node, fault in _asked_of_nodes(paths).items()]
    if not faults:
        return Finding("files", OK, f"all nodes see {', '.join(paths)}")
    return Finding(
        "files",
        FAIL,
        f"nodes of the Ray cluster lack what the run needs on each: {'; '.join(faults)}; put it on a file system that "
        "all see at the same path, the run's folder (RUN_DIR) in any case (examples/cluster/README.md)",
    )


def _asked_of_nodes(paths: list[str]) -> dict[str, str]:
    """What nodes lack of these files and folders, by the nodes' names."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def unseen() -> list[str]:  # inside another function it is sent as it is, as a node may lack the recipe
        deadline = time.monotonic() + SECONDS_TO_BE_SEEN
        while (missing := [path for path in paths if not os.path.exists(path)]) and time.monotonic() < deadline:
            time.sleep(1)
        return missing

    asked = {
        ray.remote(unseen)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(): f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in _nodes_with_cpus(ray.nodes())
    }
    ready, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    lacks = {asked[one]: f"no answer in {SECONDS_TO_ANSWER:.0f} s" for one in waiting}
    for one in ready:
        try:
            missing = ray.get(one)
        except ray.exceptions.RayError as error:  # the node, or its Python
            lacks[asked[one]] = f"no answer ({str(error).strip().splitlines()[-1]})"
            continue
        lacks |= {asked[one]: f"no {', no '.join(missing)}"} if missing else {}
    return lacks
