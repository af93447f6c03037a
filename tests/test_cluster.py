"""What a run brings along to a Ray cluster of its own, and to one that it joins."""

import copy
import inspect
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from checkable_run import composed, override
from omegaconf import DictConfig, OmegaConf
from ray._private import ray_constants, worker
from ray.job_config import JobConfig
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tracking

from recipe.spin import fsdp_workers, verl_patches
from recipe.spin.main_spin import TaskRunner
from recipe.spin.rollout.weights import ONE_MACHINE, RUN_NAME
from recipe.spin.run import cluster, report
from recipe.spin.run import monitor as run_monitor
from recipe.spin.run.monitor import RunMonitor
from recipe.spin.spin_trainer import SpinTrainer

ROOT = Path(__file__).resolve().parent.parent
LINK = str(ROOT / "recipe" / "spin")
SECRETS = {"WANDB_API_KEY": "s3cret-1", "HF_TOKEN": "s3cret-2", "VLLM_API_KEY": "s3cret-3", "HF_HUB_TOKEN": "s3cret-4"}
SETTINGS = {
    "HF_HOME": "/shared/models",
    "NCCL_SOCKET_IFNAME": "eth1",
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "2",
    "VLLM_HOST_IP": "10.0.0.1",  # the driver's own
    "HOME": "/home/me",
    "PYTHONPATH": "/mine",
}


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    variables = {**SETTINGS, **SECRETS}
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    return variables


def config(*overrides: str) -> DictConfig:
    result = copy.deepcopy(composed("cpu"))
    OmegaConf.set_struct(result, False)  # as Hydra's "+key=value" adds a key
    result = override(result, list(overrides))
    OmegaConf.set_struct(result, True)
    OmegaConf.resolve(result)
    return result


def prepared(settings: DictConfig) -> tuple[bool, dict]:
    joins = cluster.prepare(settings)
    return joins, OmegaConf.to_container(settings.ray_kwargs.ray_init)


def test_a_run_on_one_machine_has_a_cluster_of_its_own_on_loopback(environment):
    joins, ray_init = prepared(config())
    assert not joins and ray_init["address"] == "local"  # never one that somebody else started on the machine
    assert ray_init["num_gpus"] == 1 and ray_init["object_store_memory"] == 500000000
    assert list(ray_init["runtime_env"]["env_vars"]) == [RUN_NAME, cluster.LOG_LEVEL]  # the rest is inherited
    kept = {**SETTINGS, "PYTHONPATH": environment["PYTHONPATH"]}
    assert environment.items() >= (cluster.ON_LOOPBACK | kept).items()  # what the user names is kept
    assert environment["PYTHONPATH"].split(":")[:2] == [str(ROOT), "/mine"]
    assert environment["GLOO_SOCKET_IFNAME"] == "lo" and environment["NCCL_SOCKET_IFNAME"] == "eth1"
    assert environment[cluster.CALLS_KEPT] == cluster.CALLS_KEPT_BY_A_RUN
    assert not ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.parametrize(
    ("variables", "overrides", "address"),
    [
        ({}, ["trainer.nnodes=2"], "auto"),
        ({"RAY_ADDRESS": "head:6379"}, [], "head:6379"),
        ({"RAY_ADDRESS": "head:6379"}, ["trainer.nnodes=2"], "head:6379"),
        ({"RAY_ADDRESS": "head:6379"}, ["ray_kwargs.ray_init.address=other:1"], "other:1"),
    ],
)
def test_a_run_joins_the_cluster_that_is_named(environment, variables, overrides, address):
    environment.update(variables)
    before = dict(environment)
    joins, ray_init = prepared(config(*overrides))
    assert joins and ray_init["address"] == address
    assert not ray_init.keys() & {"num_cpus", "num_gpus", "object_store_memory"}  # Ray refuses them from a joiner
    assert environment == before and ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.parametrize(
    ("address", "mode", "token", "warned"),
    [
        ("head:6379", None, False, True),
        ("head:6379", None, True, True),  # which Ray does not look for then
        ("head:6379", "disabled", True, True),
        ("head:6379", "token", False, False),
        ("auto", None, False, True),
        ("auto", None, True, False),
        ("local", None, False, False),  # Ray makes one
    ],
)
def test_a_cluster_that_asks_for_no_token_is_warned_of(environment, tmp_path, capsys, address, mode, token, warned):
    environment |= {"HOME": str(tmp_path), "RAY_ADDRESS": address} | ({"RAY_AUTH_MODE": mode} if mode else {})
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").touch()
    cluster.prepare(config())
    assert ("RAY_AUTH_MODE=token" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(("variable", "value"), [("RAY_AUTH_TOKEN", "s3cret"), ("RAY_AUTH_TOKEN_PATH", "/token")])
def test_a_token_in_the_environment_lies_ready_too(environment, tmp_path, capsys, variable, value):
    environment |= {"HOME": str(tmp_path), "RAY_ADDRESS": "auto", variable: value}
    cluster.prepare(config())
    assert "RAY_AUTH_MODE" not in capsys.readouterr().err


def test_ray_address_local_is_a_cluster_of_its_own(environment):
    environment["RAY_ADDRESS"] = "local"
    assert not cluster.prepare(config())


def test_workers_on_other_nodes_get_the_drivers_settings_and_no_secrets(environment):
    _, ray_init = prepared(config("trainer.nnodes=2"))
    variables = ray_init["runtime_env"]["env_vars"]
    assert variables.pop(RUN_NAME) == ray_init["namespace"] and variables.pop(cluster.LOG_LEVEL) == "WARNING"
    assert variables.pop("PYTHONPATH").split(":")[:2] == [str(ROOT), "/mine"]
    assert variables == {name: SETTINGS[name] for name in list(SETTINGS)[:4]}
    assert not [secret for secret in SECRETS.values() if secret in OmegaConf.to_yaml(OmegaConf.create(ray_init))]


def test_keys_to_judges_stay_out_of_what_ray_shows_whatever_they_are_called(environment):
    environment |= {"VLLM_JUDGE": "s3cret", "HF_PAT": "s3cret", "VLLM_LOGGING_LEVEL": "INFO"}
    settings = config("trainer.nnodes=2", "algorithm.judge.api_key_env=[VLLM_JUDGE,null,HF_PAT]")
    variables = prepared(settings)[1]["runtime_env"]["env_vars"]
    assert "s3cret" not in variables.values() and variables["VLLM_LOGGING_LEVEL"] == "INFO"
    assert prepared(config("algorithm.judge.api_key_env=null"))


def test_what_the_user_sets_for_the_workers_is_kept(environment):
    settings = config("trainer.nnodes=2")
    OmegaConf.update(settings, "ray_kwargs.ray_init.runtime_env.env_vars", {"HF_HOME": "/local"}, force_add=True)
    OmegaConf.update(settings, "ray_kwargs.ray_init.namespace", "mine", force_add=True)
    _, ray_init = prepared(settings)
    assert ray_init["runtime_env"]["env_vars"]["HF_HOME"] == "/local"
    assert ray_init["namespace"] == "mine"


def test_loggers_of_metrics_get_the_settings_without_secrets(environment, monkeypatch):
    class Logged(Exception):
        pass

    def tracking(config, **options):
        raise Logged(config)

    monkeypatch.setattr(trainer_base, "Tracking", tracking)
    trainer = SpinTrainer.__new__(SpinTrainer)
    trainer.config = config()
    cluster.prepare(trainer.config)
    OmegaConf.update(trainer.config, "data.hf_token", "s3cret", force_add=True)
    OmegaConf.update(trainer.config, "trainer.somewhere", "http://me:s3cret@host/v1", force_add=True)
    with pytest.raises(Logged) as caught:
        trainer.fit(None)
    logged = caught.value.args[0]
    assert logged["trainer"]["somewhere"] == "http://host/v1" and logged["algorithm"]["dpo_loss_type"] == "sigmoid"
    assert "s3cret" not in repr(logged) and "env_vars" not in logged["ray_kwargs"]["ray_init"]["runtime_env"]
    assert trainer_base.Tracking is tracking


def test_warnings_are_heard_in_a_process_that_has_imported_vllm(monkeypatch):
    """As the agent loop's have, whose judge warns of what it cannot read."""
    variables = dict(os.environ)
    monkeypatch.setattr(os, "environ", dict(variables))
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    _, ray_init = prepared(config())
    level = ray_init["runtime_env"]["env_vars"][cluster.LOG_LEVEL]
    program = "import logging, recipe.spin.rollout.server; logging.getLogger('recipe.spin.mine').warning('heard')"
    process = subprocess.run(
        [sys.executable, "-c", program], env=variables | {cluster.LOG_LEVEL: level}, capture_output=True, text=True
    )
    assert process.returncode == 0 and "heard" in process.stderr, process.stderr[-2000:]


def test_two_runs_have_different_names(environment):
    names = {prepared(config())[1]["namespace"] for _ in range(2)}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("pythonpath", "looked_in", "expected"),
    [
        ("", ["{call}/scripts"], [str(ROOT), "{call}/scripts"]),
        (f"/a:{ROOT}", [], ["/a", str(ROOT)]),
        ("", [], [str(ROOT)]),
        ("mine:.", [], [str(ROOT), "{call}/mine", "{call}"]),  # workers may run in other folders
        ("", ["{call}"], [str(ROOT), "{call}"]),  # `python -m`
    ],
)
def test_workers_import_from_where_the_driver_does(tmp_path, monkeypatch, pythonpath, looked_in, expected):
    """The checkout once, and the folder of the call not before it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "scripts" / "mine.py")])
    monkeypatch.setattr(sys, "path", [path.format(call=tmp_path) for path in looked_in] + [str(ROOT)])
    monkeypatch.setattr(cluster, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[LINK]))
    assert cluster.import_paths(pythonpath) == [path.format(call=tmp_path) for path in expected]


def test_ray_does_not_put_the_folder_of_the_call_before_the_checkout():
    """It has no setting for that: the place in its source where it would."""
    source = inspect.getsource(worker.connect)
    guard = "if not job_config._client_job and not job_config._runtime_env_has_working_dir():\n"
    assert source.count("code_paths.append(") == 2 and guard in source and "script_directory in sys.path" in source
    assert not JobConfig()._runtime_env_has_working_dir()
    with verl_patches.workers_without_folder_of_the_call():
        assert JobConfig()._runtime_env_has_working_dir()
    assert not JobConfig()._runtime_env_has_working_dir()


def test_keys_of_logging_services_reach_the_process_that_logs(environment):
    mine = {"WANDB_API_KEY": "s3cret-1", "WANDB_MODE": "offline", "TRACKIO_SPACE_ID": "me/mine"}
    assert cluster.logging_settings(environment | mine, Path("/run")) == mine | {"TENSORBOARD_DIR": "/run/tensorboard"}
    elsewhere = cluster.logging_settings({"TENSORBOARD_DIR": "/mine"}, Path("/run"))
    assert elsewhere == {"TENSORBOARD_DIR": "/mine"}
    assert 'os.environ.get("TENSORBOARD_DIR", ' in inspect.getsource(tracking._TensorboardAdapter)
    TaskRunner({"MLFLOW_TRACKING_PASSWORD": "s3cret-5"})
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "s3cret-5"


def test_on_a_joined_cluster_nothing_is_claimed_that_only_a_part_is_seen_of(tmp_path, monkeypatch):
    looked = threading.Event()
    monkeypatch.setenv("TMPDIR", "/somewhere")
    monkeypatch.setattr(run_monitor, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(run_monitor, "process_tree", lambda: [psutil.Process()])
    monkeypatch.setattr(run_monitor, "_ask_task_runner", looked.set)
    with RunMonitor(tmp_path / "logs", joins=True) as monitor:
        assert os.environ["TMPDIR"] == "/somewhere"
        assert looked.wait(10)
    assert monitor.peak_memory_gb is None
    assert "each node" in monitor.logs and str(tmp_path) not in monitor.logs


def test_the_report_of_a_joined_run_tells_no_memory(capsys):
    summary = {"steps": 4, "seconds": 60, "before": {}, "after": {}, "peak_memory_gb": None, "checkpoint": None}
    summary |= {"measure": "accuracy", "held_out_faults": {}, "unreadable_metrics_lines": 0}
    report.print_summary(summary, Path("run"), picture="none")
    assert "4 steps" in (told := capsys.readouterr().out) and "memory" not in told
    report.print_summary(summary | {"peak_memory_gb": 1.5}, Path("run"), picture="none")
    assert "memory of all processes: 1.5 GB" in capsys.readouterr().out


def test_ranks_of_one_machine_meet_without_a_server(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/private")
    alone = {ONE_MACHINE: "1", RUN_NAME: "spin-1", "MASTER_PORT": "4000"}
    fsdp_workers.meet_in_a_file(alone)
    assert alone["DIST_INIT_METHOD"] == "file:///private/spin-1-ranks-4000"
    several = {RUN_NAME: "spin-1", "MASTER_PORT": "4000"}
    fsdp_workers.meet_in_a_file(several)
    assert "DIST_INIT_METHOD" not in several
