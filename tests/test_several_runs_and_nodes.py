"""Runs beside each other from start to end, and a run over two Ray nodes; minutes each, so only when asked for."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import TOKEN, RayCluster, bare_environment
from whole_runs import MARK, ROOT, finish, metrics, processes, start

pytestmark = [pytest.mark.slow, pytest.mark.long]

SECRET = "not-to-be-seen-0123"


def assert_trained(run: Path, steps: int) -> None:
    """As test_end_to_end's run of four steps: the reference refreshed at 2 and 4, vLLM with the actor's weights."""
    history = metrics(run)
    for step in range(1, steps + 1):
        assert history[step]["rollout/logp_gap_max"] < 1e-3
        assert history[step]["training/reference_refreshed"] == (step % 2 == 0)
        expected = math.log(2) if step != 3 else pytest.approx(math.log(2), abs=0.5)
        assert history[step]["actor/loss"] == pytest.approx(expected, abs=1e-6)
    assert json.loads((run / "summary.json").read_text())["steps"] == steps


def two_at_once(task: Path, model: Path, folder: Path) -> list[Path]:
    """Two runs whose seeds differ, started together; both must reach their end."""
    runs = [folder / str(seed) / "run" for seed in (1, 2)]
    started = []
    for run in runs:
        run.parent.mkdir()
        started.append(start(task, model, run, f"data.seed={run.parent.name}", "trainer.val_before_train=False"))
    outputs = [finish(process) for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-5000:]
    assert not [output for output in outputs if SECRET in output]
    return runs


@pytest.fixture
def shared_cluster(monkeypatch):
    cluster = RayCluster(gpus=[2], environment=bare_environment())
    for name, value in {"RAY_ADDRESS": cluster.address, **TOKEN}.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.stop()


def test_two_runs_on_one_machine(task, tiny_llama, tmp_path):
    runs = two_at_once(task, tiny_llama, tmp_path)
    for run in runs:
        assert_trained(run, 4)
        assert processes(run) == []


def test_two_runs_on_one_cluster(shared_cluster, task, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    runs = two_at_once(task, tiny_llama, tmp_path)
    for run in runs:
        assert_trained(run, 4)
        assert json.loads((run / "summary.json").read_text())["peak_memory_gb"] is None
    written = shared_cluster.logs()
    assert "spin-" in written and SECRET not in written and TOKEN["RAY_AUTH_TOKEN"] not in written


def run_spin(task: Path, model: Path, run: Path, address: str, steps: int) -> str:
    """run_spin.sh as docs/clusters.md has it for two nodes, from a folder that is not the checkout."""
    overrides = [
        "data.train_batch_size=4",
        "data.max_response_length=8",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16",
        "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=20000000",
        f"trainer.total_training_steps={steps}",
        "trainer.ref_update_freq=2",
        "trainer.save_freq=2",
        "trainer.test_freq=100",
        "trainer.val_before_train=False",
    ]
    variables = {
        "NNODES": "2",
        "N_GPUS_PER_NODE": "1",
        "RAY_ADDRESS": address,
        "SPIN_PROFILE": "cpu",
        "PYTHON": sys.executable,
        "MODEL_PATH": str(model),
        "DATA_DIR": str(task),
        "RUN_DIR": str(run),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        MARK: str(run),
    }
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    told = subprocess.run(
        ["bash", str(ROOT / "run_spin.sh"), *overrides],
        cwd=elsewhere,
        env=bare_environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=420,
    )
    assert told.returncode == 0, told.stdout[-5000:]
    return told.stdout


def test_two_nodes_train_refresh_save_and_resume(task, tiny_llama, tmp_path):
    run = tmp_path / "run"
    cluster = RayCluster(gpus=[1, 1], environment=bare_environment())
    try:
        run_spin(task, tiny_llama, run, cluster.address, steps=2)
        assert (run / "latest_checkpointed_iteration.txt").read_text() == "2"
        (run / "summary.json").unlink()  # a finished run is not gone on with
        run_spin(task, tiny_llama, run, cluster.address, steps=4)
    finally:
        cluster.stop()
    assert_trained(run, 4)
    ranks = {path.name for path in (run / "global_step_4" / "actor").glob("model_world_size_2_rank_*.pt")}
    assert len(ranks) == 2
