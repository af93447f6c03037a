"""`python -m recipe.spin.doctor [--quick] [KEY=VALUE ...]`: whether this machine can train, and does it right.

Looks at versions, driver, compiler, ports, cores, memory and disk; then, on the device, at the recipe's attention,
update and refresh beside plain PyTorch; then trains a tiny model for two steps and reads what the run measured. Prints
a verdict a line and writes all figures to a JSON file that can go into a bug report: it holds no environment variables,
host or user names. KEY=VALUE are the settings of the run that cores, memory and disk are checked for; --quick leaves
the tiny run out.
"""

import argparse
import json
import math
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, OmegaConf

from recipe.spin.checks.finding import FAIL, OK, WARN, Finding, not_finite
from recipe.spin.checks.gpu import devices
from recipe.spin.checks.host import free_shared_memory
from recipe.spin.checks.machine import cpus_needed, findings
from recipe.spin.checks.paths import make_absolute

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = {"verl", "transferqueue"}  # of the constraints, what the recipe's code is made for
SECONDS = 565  # since the doctor's own process began; with what stopping another takes below ten minutes
PROMPTS = 4
# A tiny model, two steps, the reference refreshed in the second; ties train, as its answers are all wrong
TINY_RUN = [
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    # On GPUs no worker is a fork: each of the profile's 16 would import torch and vLLM for 4 prompts
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    f"data.train_batch_size={PROMPTS}",
    "data.max_prompt_length=128",
    "data.max_response_length=16",
    "actor_rollout_ref.rollout.max_model_len=160",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=64",
    "algorithm.dpo_tie_policy=first",
    "trainer.nnodes=1",
    # What it takes was found before; the estimate is of workers for a model of a run's size
    "trainer.check_memory=False",
    "trainer.total_training_steps=2",
    "trainer.ref_update_freq=2",
    "trainer.save_freq=-1",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
]
TINY_RUN_ON = {
    "cpu": ["actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=20000000"],
    "gpu": [
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.3",
        "actor_rollout_ref.rollout.enforce_eager=True",
        # The profile's own would move weights by less than bf16 rounds: vLLM with the old ones would not be seen
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.actor.optim.override_optimizer_config.eps=1e-8",
    ],
}
LOGP_GAP = {"cpu": 1e-3, "gpu": 0.5}  # of a token; docs/metrics.md
PHASES = {"gen": "generation", "update_actor": "update", "update_weights": "weight sync", "refresh_ref": "refresh"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.spin.doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out the tiny run, which starts Ray and vLLM")
    parser.add_argument("--profile", choices=("cpu", "gpu"), help="by what the machine has")
    parser.add_argument("--json", type=Path, default=Path("doctor.json"), help="the report's file (doctor.json)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run to check for")
    options = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)  # it looks at this machine, and not at a cluster
    profile = options.profile or ("gpu" if torch.cuda.device_count() > 0 else "cpu")
    began, found = min(psutil.Process().create_time(), time.time()), []  # in some containers the former lies ahead
    for finding in examine(profile, options.overrides, options.quick, began + SECONDS):
        finding = without_names(finding)
        found.append(finding)
        print(f"{finding.verdict:4}  {finding.name}: {finding.text}", flush=True)
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "profile": profile,
        "quick": options.quick,
        "seconds": round(time.time() - began, 1),
        "findings": [asdict(finding) for finding in found],
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = [finding.name for finding in found if finding.verdict == FAIL]
    end = f"{len(failed)} of {len(found)} failed: {', '.join(failed)}" if failed else f"all {len(found)} passed"
    print(f"\n{end}, after {report['seconds']:.0f} s; the report is {options.json}")
    sys.exit(bool(failed))


def examine(profile: str, overrides: list[str], quick: bool, deadline: float) -> Iterator[Finding]:
    """All findings, the quick ones first; measurements on the device only where they can be made.

    `deadline`, in seconds since the epoch, is when the last of them is stopped.
    """
    yield hardware()
    fit = check_versions(profile)
    yield fit
    yield check_ports()
    config = compose(profile, *default_settings(profile), *overrides)
    OmegaConf.resolve(config)
    make_absolute(config)
    able = fit.verdict != FAIL
    for finding in findings(config):
        able = able and not (finding.verdict == FAIL and finding.name in ("driver", "GPUs", "compiler"))
        yield finding
    if not able:
        yield Finding("device", WARN, "nothing was measured on the device; remove the causes above first")
        return
    yield from probe_device(profile, deadline)
    if not quick:
        with tempfile.TemporaryDirectory(prefix="spin-doctor-") as folder:
            yield from tiny_run(profile, Path(folder), deadline)


def compose(profile: str, *overrides: str) -> DictConfig:
    """The recipe's config for a profile with overrides, as main_spin composes it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    import recipe.spin.main_spin  # noqa: F401 - registers the resolvers that the config uses

    with initialize_config_module("recipe.spin.config", version_base=None):
        return hydra_compose("spin_trainer", overrides=[f"device={profile}", *overrides])


def default_settings(profile: str) -> list[str]:
    """What run_spin.sh sets by itself: all visible GPUs, or the model of the CPU profile."""
    if profile == "gpu":
        count = torch.cuda.device_count()
        return [f"trainer.n_gpus_per_node={count}"] if count else []
    cache = os.environ.get("SPIN_MODEL_CACHE", ROOT / ".cache" / "models")
    return [f"actor_rollout_ref.model.path='{cache}/SmolLM2-135M-Instruct'"]


def without_names(finding: Finding) -> Finding:
    """The finding with `~` for the home folder, which tells a user's name."""
    text = json.dumps(asdict(finding)).replace(json.dumps(str(Path.home()))[1:-1], "~")
    return Finding(**json.loads(text))


# ---- What is there ---------------------------------------------------------------------------------------------------
def hardware() -> Finding:
    memory = psutil.virtual_memory()
    figures = {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory": memory.total,
        "memory_available": memory.available,
        "shared_memory": free_shared_memory(),
        "gpus": [asdict(device) for device in devices() or []],
    }
    names = [gpu["name"] for gpu in figures["gpus"]]
    text = f"{figures['system']}, Python {figures['python']}, {figures['cores']} cores, {memory.total / 1e9:.1f} GB, "
    return Finding("machine", OK, text + (f"{len(names)} x {names[0]}" if names else "no GPU"), figures)


def check_versions(profile: str) -> Finding:
    """Installed packages beside the constraints of the profile; and verl beside REQUIRED_VERL.txt."""
    constraints = ROOT / "constraints" / f"{profile}.txt"
    if not constraints.is_file():  # installed with pip
        text = f"verl {installed('verl')}; there are no constraints to compare with outside a checkout"
        return Finding("versions", WARN, text)
    wanted = pins(constraints.read_text())
    tag = re.search(r"^TAG=v?(\S+)", (ROOT / "REQUIRED_VERL.txt").read_text(), re.MULTILINE)
    found = {name: installed(name) for name in wanted}
    others = {name: (there, wanted[name]) for name, there in found.items() if there and there != wanted[name]}
    missing = sorted(name for name in REQUIRED if not found[name])
    missing += [] if find_spec("vllm") else ["vllm"]
    figures = {"others": others, "missing": missing, "torch": torch.__version__, "cuda": torch.version.cuda}
    figures |= {name: found[name] for name in ("verl", "transferqueue", "ray", "transformers")}
    told = [f"{name} is missing" for name in missing]
    told += [f"{name} is {there}, not {pin}" for name, (there, pin) in sorted(others.items())]
    if tag and found["verl"] and found["verl"] != tag[1]:
        told.append(f"verl is {found['verl']}, and REQUIRED_VERL.txt says {tag[1]}")
    if missing or REQUIRED & others.keys():
        text = f"{'; '.join(told)}; install them with bash run_spin.sh, or as REQUIRED_VERL.txt says"
        return Finding("versions", FAIL, text, figures)
    if told:
        return Finding("versions", WARN, f"{'; '.join(told)}: not what the recipe was tested with", figures)
    same = sum(there is not None for there in found.values())
    return Finding("versions", OK, f"{same} packages as in constraints/{profile}.txt, verl {found['verl']}", figures)


def pins(constraints: str) -> dict[str, str]:
    """Versions by package that apply to this Python."""
    from packaging.requirements import Requirement

    lines = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    requirements = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]
    return {one.name: next(iter(one.specifier)).version for one in requirements}


def installed(package: str) -> str | None:
    """A package's version without a build's local part, such as +cpu."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def check_ports() -> Finding:
    """On several machines Ray, TransferQueue and vLLM talk over ports of each one's own address, chosen by the system.

    A run on one machine keeps to loopback.
    """
    address = "127.0.0.1"
    try:
        address = socket.gethostbyname(socket.gethostname())
        with socket.create_server((address, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        cause = f"no connection to a port of this machine's own address ({error})"
        remedy = (
            "which a run on several machines needs; let /etc/hosts name an address of it, and its firewall allow it"
        )
        return Finding("ports", WARN, f"{cause}, {remedy}")
    return Finding("ports", OK, "this machine reaches its own ports")


# ---- What it does ----------------------------------------------------------------------------------------------------
def command_of(profile: str, *arguments: str) -> list[str]:
    """A Python with the environment of the profile, which must stand before it starts."""
    python = [sys.executable, *arguments]
    if profile == "gpu":
        return python
    (package,) = find_spec("verl_cpu").submodule_search_locations
    return ["bash", "-c", 'source "$0"; exec "$@"', f"{package}/env.sh", *python]


def seconds_until(deadline: float) -> float:
    return max(deadline - time.time(), 0)


def start(command: list[str], seconds: float, folder: Path | None = None) -> tuple[int | None, str, str]:
    """Exit code, None after `seconds`, and what was written to stdout and stderr; nothing is left running."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=folder, env=environment, start_new_session=True, text=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.terminate()  # main_spin then ends Ray
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        for file in (out, err):
            file.seek(0)
        return code, out.read(), err.read()


def last_words(code: int | None, text: str, seconds: float) -> str:
    end = f"no end after {seconds:.0f} s" if code is None else f"ended with {code}"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    error = next((line for line in lines if line.startswith("error: ")), None)
    return f"{end}: {error or ' | '.join(lines[-3:])}"


def probe_device(profile: str, deadline: float) -> Iterator[Finding]:
    """The measurements of device_probe.py, in half of the time that is left: the other half is the tiny run's."""
    seconds = seconds_until(deadline) / 2
    arguments = ("-m", "recipe.spin.tools.device_probe", "cuda" if profile == "gpu" else "cpu")
    code, out, err = start(command_of(profile, *arguments), seconds)
    yield from (Finding(**json.loads(line)) for line in out.splitlines() if line.startswith('{"name": '))
    if code != 0:
        yield Finding("device", FAIL, f"a measurement on the device {last_words(code, err, seconds)}; report it")


def tiny_settings(profile: str, ranks: int) -> list[str]:
    """Ray has as many CPUs as machine.cpus_needed counts: a run that ends shows the count to be enough."""
    settings = [*TINY_RUN, *TINY_RUN_ON[profile], f"trainer.n_gpus_per_node={ranks}"]
    return [*settings, f"ray_kwargs.ray_init.num_cpus={cpus_needed(compose(profile, *settings))}"]


def tiny_run(profile: str, folder: Path, deadline: float) -> Iterator[Finding]:
    """Two steps of the whole recipe on a tiny model, and what they say of themselves."""
    from recipe.spin.tools.probe_model import TINY, save_probe_model

    gpus = torch.cuda.device_count()
    ranks = 2 if profile == "gpu" and gpus > 1 else 1  # two talk over NCCL
    files = {name: write_prompts(folder / f"{name}.parquet", name) for name in ("train", "test")}
    run = folder / "run"
    arguments = ["-m", "recipe.spin.main_spin", f"device={profile}", *tiny_settings(profile, ranks)]
    arguments += [f"actor_rollout_ref.model.path={save_probe_model(folder / 'model', **TINY)}"]
    arguments += [f"data.train_files={files['train']}", f"data.val_files={files['test']}"]
    arguments += [f"reward.custom_reward_function.path={ROOT / 'examples' / 'arithmetic' / 'reward.py'}"]
    arguments += [f"trainer.default_local_dir={run}"]
    left = seconds_until(deadline)
    code, out, err = start(command_of(profile, *arguments), left, folder)
    where = f" on {ranks} of {gpus} visible GPUs" if profile == "gpu" else ""
    if code != 0:
        text = f"two steps of a tiny model{where}: {last_words(code, err + out, left)}"
        yield Finding("tiny run", FAIL, text)
        return
    first, second = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    seconds = {name: second[f"timing_s/{phase}"] for phase, name in PHASES.items() if f"timing_s/{phase}" in second}
    told = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    figures = {"seconds": seconds, "run_seconds": summary["seconds"], "peak_memory_gb": summary["peak_memory_gb"]}
    text = f"two steps{where} in {summary['seconds']:.0f} s from start to end; the second: {told}"
    yield Finding("tiny run", OK, f"{text}; at most {summary['peak_memory_gb']:.1f} GB on the host", figures)
    # A step whose gradient is not finite is skipped, and has no gap
    yield judge_gap([step.get("rollout/logp_gap_max", math.nan) for step in (first, second)], LOGP_GAP[profile])


def judge_gap(gaps: list[float], limit: float) -> Finding:
    """Before and after a push of trained weights vLLM must agree with the policy on the tokens that it drew."""
    text = f"largest difference of a token's log-prob between vLLM and the policy: {gaps[0]:.1e}, then {gaps[1]:.1e}"
    if wrong := not_finite(dict(zip(("step 1", "step 2"), gaps, strict=True))):
        cause = f"log-probs, or the gradient of a step that was skipped, are not finite ({wrong})"
        return Finding("vLLM and the policy", FAIL, f"{text}; {cause}; report it", {"gaps": gaps})
    if max(gaps) < limit:
        return Finding("vLLM and the policy", OK, text, {"gaps": gaps})
    cause = "the model is not the same in both" if gaps[0] >= limit else "weights do not reach vLLM"
    return Finding("vLLM and the policy", FAIL, f"{text}, above {limit}: {cause}; report it", {"gaps": gaps})


def write_prompts(path: Path, name: str) -> str:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "data_source": "doctor",
            "prompt": [{"role": "user", "content": f"{name}: what is {number} + 1?"}],
            "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
            "extra_info": {"index": number},
        }
        for number in range(2 * PROMPTS)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


if __name__ == "__main__":
    main()
