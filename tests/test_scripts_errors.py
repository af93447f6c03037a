"""What run_spin.sh refuses, with the remedy, and which Python it takes; a stand-in for Python, nothing trains."""

import sys
from pathlib import Path

import pytest
from fake_checkout import Checkout, write_program


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
