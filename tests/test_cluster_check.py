"""What a joined Ray cluster lacks for a run is found before models are loaded, and named with its remedy."""

import json
import subprocess
import sys

import pytest
from checkable_run import composed, override
from omegaconf import OmegaConf
from ray_cluster import RayCluster, bare_environment
from worker_harness import ROOT

from recipe.spin.checks import cluster, paths
from recipe.spin.checks.cluster import Node
from recipe.spin.checks.finding import FAIL, OK
from recipe.spin.common.settings import ConfigError
from recipe.spin.main_spin import TaskRunnerClass

EIGHT = "trainer.n_gpus_per_node=8"
TWO = [EIGHT, "trainer.nnodes=2"]
UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"


def settings(*overrides: str):
    config = override(composed("gpu"), list(overrides))
    OmegaConf.resolve(config)
    return config


def pool(nodes: int, gpus: int) -> list[str]:
    """A reward model with devices of its own."""
    model = "reward.reward_model"
    return [
        f"{model}.enable=True",
        f"{model}.enable_resource_pool=True",
        f"{model}.nnodes={nodes}",
        f"{model}.n_gpus_per_node={gpus}",
    ]


def stand_in(monkeypatch, has: list[tuple[int, int]], free: list[tuple[int, int]] | None = None) -> None:
    """A cluster with so many CPUs and GPUs a node, the command on the first."""

    def nodes(units: int, which: bool) -> list[Node]:
        pairs = free if which and free is not None else has
        dealt = [len(range(number, units, len(pairs))) for number in range(len(pairs))]
        return [Node(*pair, units, number == 0) for number, (pair, units) in enumerate(zip(pairs, dealt, strict=True))]

    monkeypatch.setattr(cluster, "nodes_of_cluster", lambda units, free: nodes(units, free))
    monkeypatch.setattr(cluster, "SECONDS_TO_BE_FREE", 0)


@pytest.mark.parametrize(
    ("nodes", "overrides", "words"),
    [
        ([(29, 8)], [EIGHT], None),
        ([(28, 8)], [EIGHT], "up to 29 CPUs are needed"),
        ([(32, 8), (32, 8)], TWO, None),
        ([(96, 8), (8, 8)], TWO, "nodes with 96 CPUs and 8 GPUs, 8 CPUs and 8 GPUs"),
        ([(96, 4), (96, 4)], [EIGHT], "96 CPUs and 4 GPUs"),
        # Beside its ranks' 24 a node has a storage unit or more, and vLLM's servers want 1 that is free there; the
        # command's node holds the TaskRunner and TransferQueue's controller too
        ([(80, 8), (25, 8)], TWO, "8 GPUs and up to 28 CPUs are needed"),
        ([(80, 8), (26, 8)], TWO, None),
        ([(27, 8), (80, 8)], TWO, "nodes with 27 CPUs"),
        ([(28, 8), (80, 8)], TWO, None),
        ([(80, 8), (28, 8)], [*TWO, f"{UNITS}=7"], None),
        ([(80, 8), (27, 8)], [*TWO, f"{UNITS}=7"], "31 CPUs are needed"),
        ([(80, 0), (27, 8), (27, 8)], [*TWO, f"{UNITS}=6"], None),  # a head without GPUs has two
        ([(4, 0), (26, 8), (26, 8)], TWO, None),
        ([(3, 0), (26, 8), (26, 8)], TWO, None),
        ([(2, 0), (26, 8), (26, 8)], TWO, f"its share of {UNITS}=2"),
        ([(80, 8), (1, 0)], [EIGHT], None),
        ([(25, 8), (80, 8), (25, 8)], ["trainer.n_gpus_per_node=8", f"{UNITS}=2"], None),
        ([(80, 8), (80, 8)], ["trainer.n_gpus_per_node=6", "trainer.nnodes=2", *pool(1, 4)], "on one node each"),
        ([(80, 8), (80, 8)], ["trainer.n_gpus_per_node=6", "trainer.nnodes=2", *pool(2, 2)], None),
        ([(80, 8), (80, 4)], ["trainer.n_gpus_per_node=4", *pool(1, 8)], None),
        ([(80, 8), (8, 8)], [EIGHT, *pool(1, 8)], "and 24 CPUs, are needed on one node"),
    ],
)
def test_what_a_cluster_has(monkeypatch, nodes, overrides, words):
    stand_in(monkeypatch, nodes)
    finding = cluster.check_cluster(settings(*overrides))
    assert finding.verdict == (FAIL if words else OK), finding.text
    assert (words or "") in finding.text


def test_what_another_run_holds_is_not_there(monkeypatch):
    """Ray, and verl, compare with what all nodes have, and would wait."""
    stand_in(monkeypatch, has=[(80, 8), (80, 8)], free=[(60, 4), (60, 4)])
    finding = cluster.check_cluster(settings(EIGHT))
    assert finding.verdict == FAIL and "has free nodes with 60 CPUs and 4 GPUs" in finding.text


def test_a_storage_unit_on_a_node_that_others_fill_would_wait(monkeypatch):
    stand_in(monkeypatch, has=[(80, 8), (80, 0)], free=[(80, 8), (0, 0)])
    finding = cluster.check_cluster(settings(EIGHT))
    assert finding.verdict == FAIL and f"its share of {UNITS}=2" in finding.text


def test_what_a_run_held_that_has_just_ended_is_waited_for(monkeypatch):
    stand_in(monkeypatch, has=[(80, 8)])
    answers = [[Node(80, 8)], [Node(60, 4)], [Node(80, 8)]]
    monkeypatch.setattr(cluster, "nodes_of_cluster", lambda units, free: answers.pop(0))
    monkeypatch.setattr(cluster, "SECONDS_TO_BE_FREE", 60)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert cluster.check_cluster(settings(EIGHT)).verdict == OK and answers == []


def test_a_run_on_a_cluster_with_too_little_ends_before_its_task_runner_starts(monkeypatch):
    stand_in(monkeypatch, [(4, 8)])
    monkeypatch.setattr("signal.signal", lambda *args: None)
    with pytest.raises(ConfigError, match="nodes with 4 CPUs"):
        TaskRunnerClass(settings(EIGHT), num_cpus=1).options(name="x").remote()


# ---- Files -----------------------------------------------------------------------------------------------------------
def test_the_files_that_all_nodes_read(tmp_path):
    for name in ("a", "b", "reward.py"):
        (tmp_path / name).touch()
    functions = "reward.custom_reward_function.reward_kwargs.functions"  # of preferences/weighted.py
    config = settings(
        f"data.train_files=[{tmp_path}/a,{tmp_path}/b]",
        f"data.val_files={tmp_path}/a",
        "actor_rollout_ref.model.path=owner/name",  # of the hub
        f"actor_rollout_ref.model.tokenizer_path={tmp_path}/elsewhere",  # on no disk of this machine
        f"trainer.rollout_data_dir={tmp_path}",  # written by the TaskRunner alone
    )
    OmegaConf.update(config, f"{functions}.one.path", f"{tmp_path}/reward.py", force_add=True)
    found = {name for name in paths.files_read(config) if not name.startswith(str(ROOT))}
    assert found == {str(tmp_path / name) for name in ("a", "b", "reward.py")}


ASK = """
import json, sys, ray
from recipe.spin.checks import cluster, paths
ray.init(sys.argv[1], log_to_driver=False)
cluster.SECONDS_TO_BE_SEEN = 0
nodes = [node for free in (False, True) for node in cluster.nodes_of_cluster(2, free)]
nodes = [[node.cpus, node.gpus, node.units, node.has_driver] for node in nodes]
print(json.dumps([nodes, list(cluster._asked_of_nodes(sys.argv[2:]).values())]))
"""


@pytest.mark.slow
def test_a_cluster_is_asked_by_a_process_on_each_node(tmp_path):
    (tmp_path / "here").touch()
    started = RayCluster(gpus=[1], environment=bare_environment())
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK, started.address, *(str(tmp_path / name) for name in ("here", "missing"))],
            env=bare_environment() | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        started.stop()
    assert asked.returncode == 0, asked.stderr[-3000:]
    nodes, lacks = json.loads(asked.stdout.splitlines()[-1])
    assert nodes == [[48, 1, 2, True]] * 2 and lacks == [f"no {tmp_path}/missing"]


@pytest.mark.parametrize("answers", [{}, {"second (10.0.0.2)": "no /runs/a/settings.yaml"}])
def test_a_node_that_does_not_see_the_runs_files_is_named(monkeypatch, answers):
    """Shards would lie on several disks, and a resume would find a part of them."""
    asked = []
    monkeypatch.setattr(cluster, "_asked_of_nodes", lambda paths: asked.append(paths) or answers)
    finding = cluster.check_files(settings("trainer.default_local_dir=/runs/a"), "settings.yaml")
    assert asked[0][:2] == ["/runs/a/settings.yaml", cluster.RECIPE]
    assert finding.verdict == (FAIL if answers else OK)
    assert not answers or "second (10.0.0.2): no /runs/a/settings.yaml; put it on a file system" in finding.text
