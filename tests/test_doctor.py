"""The doctor on this machine: what it finds, what it says of faults, and a report that tells no names."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import psutil
import pytest
import torch
from as_on_gpus import segments_on_a_cpu
from transformers import AutoConfig, AutoModelForCausalLM
from worker_harness import ROOT, Ranks, cpu_environment
from worker_jobs import probe_update, run_within
from wrong_attention import blind_beyond_a_tile, wrong_for_heads_above_64, wrong_with_a_common_beginning

from recipe.spin.checks.check import check_settings
from recipe.spin.checks.finding import FAIL, OK, WARN, Finding
from recipe.spin.checks.machine import cpus_needed
from recipe.spin.tools import device_probe, doctor
from recipe.spin.tools.probe_model import TINY, save_probe_model

PROBED = ["matrix products", "attention", "update", "refresh", "update's speed", "memory"]


def run_doctor(folder: Path, *arguments: str, timeout: float) -> tuple[subprocess.CompletedProcess, dict]:
    """The command as a user of a cluster gives it, which it is not to look at, and its report."""
    result = subprocess.run(
        [sys.executable, "-m", "recipe.spin.doctor", "--profile", "cpu", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SPIN_A_SECRET": "hunter2", "RAY_ADDRESS": "10.0.0.1:6379"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (folder / "doctor.json").exists(), result.stderr
    return result, json.loads((folder / "doctor.json").read_text())


def verdicts(report: dict) -> dict[str, str]:
    return {finding["name"]: finding["verdict"] for finding in report["findings"]}


def finished_tiny_run(monkeypatch, folder: Path, profile: str, gpus: int, *steps: dict) -> list:
    """The arguments that a tiny run gets on a machine with so many GPUs, and the findings from metrics of its steps."""
    steps = steps or [{"rollout/logp_gap_max": 1e-6}] * 2
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    (folder / "run" / "summary.json").write_text('{"seconds": 1, "peak_memory_gb": 1}')
    given = []
    monkeypatch.setattr(doctor, "command_of", lambda *arguments: given.append(arguments) or ["true"])
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: gpus)
    findings = list(doctor.tiny_run(profile, folder, time.time() + 60))
    return [given[0], *findings]


@pytest.mark.slow
def test_the_quick_doctor(tmp_path, tiny_models):
    """Without Ray: versions and machine, and the worker beside plain PyTorch."""
    model = f"actor_rollout_ref.model.path={tiny_models['llama']}"
    result, report = run_doctor(tmp_path, "--quick", model, timeout=600)
    found = verdicts(report)
    assert result.returncode == 0, result.stdout
    assert list(found) == ["machine", "versions", "ports", "CPU cores", "shared memory", "disk", "host memory", *PROBED]
    assert FAIL not in found.values() and f"all {len(found)} passed" in result.stdout
    assert [line[:4].strip() for line in result.stdout.splitlines()[: len(found)]] == list(found.values())
    figures = {finding["name"]: finding["figures"] for finding in report["findings"]}
    assert figures["refresh"]["gap_after"] == 0 < figures["refresh"]["gap_before"]
    assert max(figures["update"].values()) < 1e-4 and figures["update's speed"]["tokens"] > 0
    for name in ("hunter2", socket.gethostname(), str(Path.home())):
        assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", json.dumps(report))  # a host may be called vm


@pytest.mark.long
def test_the_whole_doctor(tmp_path):
    result, report = run_doctor(tmp_path, timeout=900)
    assert result.returncode == 0, result.stdout
    assert list(verdicts(report))[-2:] == ["tiny run", "vLLM and the policy"]
    assert {"generation", "update", "weight sync", "refresh"} == set(report["findings"][-2]["figures"]["seconds"])


@pytest.mark.parametrize(
    ("profile", "gpus", "ranks", "cpus"),
    [("cpu", 0, 1, 7), ("cpu", 8, 1, 7), ("gpu", 1, 1, 7), ("gpu", 2, 2, 10), ("gpu", 8, 2, 10)],
)
def test_the_tiny_run_takes_two_gpus_where_there_are_two(profile, gpus, ranks, cpus, monkeypatch, tmp_path):
    """With 4 CPUs and 3 a rank; and the rules for settings have nothing against it, whatever memory there is."""
    arguments = finished_tiny_run(monkeypatch, tmp_path, profile, gpus)[0]
    config = doctor.compose(profile, *[argument for argument in arguments if "=" in argument][1:])
    assert (config.trainer.n_gpus_per_node, config.ray_kwargs.ray_init.num_cpus) == (ranks, cpus)
    assert cpus_needed(config) == cpus and not config.trainer.check_memory
    check_settings(config)


@pytest.mark.parametrize(
    ("profile", "gpus", "words"),
    [("cpu", 0, "two steps in"), ("gpu", 1, "steps on 1 of 1 visible GPUs in"), ("gpu", 8, "steps on 2 of 8 visible")],
)
def test_the_tiny_run_says_how_many_gpus_it_took(profile, gpus, words, monkeypatch, tmp_path):
    _, run, gap = finished_tiny_run(monkeypatch, tmp_path, profile, gpus)
    assert (run.verdict, gap.verdict) == (OK, OK) and words in run.text


def largest_change(model, optim) -> float:
    """Of a token's log-prob in bf16, by a first step with an optimizer's settings."""
    ids = torch.arange(200)[None]

    def logps(model) -> torch.Tensor:
        return model(ids).logits[0, :-1].float().log_softmax(-1)[range(199), ids[0, 1:]]

    before = logps(deepcopy(model).bfloat16())
    logps(model).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
    torch.optim.AdamW(model.parameters(), lr=optim.lr, **optim.override_optimizer_config).step()
    return (logps(deepcopy(model).bfloat16()) - before).abs().max().item()


def test_on_gpus_the_tiny_run_would_show_weights_that_do_not_reach_vllm(tmp_path):
    """One step must change log-probs by more than bf16 may; those of the profile's own do not."""
    folder = save_probe_model(tmp_path, **TINY)
    changes = []
    for overrides in ([], doctor.TINY_RUN_ON["gpu"]):
        optim = doctor.compose("gpu", *overrides).actor_rollout_ref.actor.optim
        changes.append(largest_change(AutoModelForCausalLM.from_pretrained(folder), optim))
    profiles, tiny_runs = changes
    assert profiles < doctor.LOGP_GAP["gpu"] < tiny_runs / 2


# ---- Versions --------------------------------------------------------------------------------------------------------
def version_finding(monkeypatch, **versions: str | None) -> Finding:
    """With the constraints' versions but for these."""
    wanted = doctor.pins((ROOT / "constraints" / "cpu.txt").read_text())
    found = wanted | versions
    monkeypatch.setattr(doctor, "installed", lambda name: found[name])
    return doctor.check_versions("cpu")


@pytest.mark.parametrize(
    ("versions", "verdict", "words"),
    [
        ({}, OK, "verl 0.9.1"),
        ({"verl": "0.8.0"}, FAIL, "verl is 0.8.0, not 0.9.1"),
        ({"transferqueue": None}, FAIL, "transferqueue is missing"),
        ({"tqdm": "1.0"}, WARN, "tqdm is 1.0, not"),
        ({"wandb": None}, OK, "packages as in constraints/cpu.txt"),
    ],
)
def test_versions_are_compared_with_the_constraints(monkeypatch, versions, verdict, words):
    finding = version_finding(monkeypatch, **versions)
    assert finding.verdict == verdict and words in finding.text


def test_constraints_for_other_pythons_do_not_count():
    text = "a==1 ; python_version < '3.0'\na==2 ; python_version >= '3.0'\n# b==1\nc==3\n"
    assert doctor.pins(text) == {"a": "2", "c": "3"}


# ---- What it says of faults ------------------------------------------------------------------------------------------
def test_an_address_that_is_not_this_machines_is_told(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "192.0.2.1")
    finding = doctor.check_ports()
    assert finding.verdict == WARN and "/etc/hosts" in finding.text
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    assert doctor.check_ports().verdict == OK


@pytest.mark.parametrize(("measured", "verdict"), [(2.9e9, OK), (4e9, WARN)])
def test_what_tensors_took_is_compared_with_the_estimate_of_tensors(measured, verdict):
    """torch counts neither CUDA's contexts nor vLLM's process: with them an estimate 2.5 GB too low would pass."""
    finding = device_probe.judge_memory(measured, {"weights": 3e9, "fragments": 2e8, "processes": 2.5e9})
    assert finding.verdict == verdict and "3.0 GB, and 2.7 GB more for what" in finding.text
    assert ("too low" in finding.text) == (verdict == WARN)


@pytest.mark.parametrize(
    ("gaps", "verdict", "words"),
    [
        ([1e-6, 2e-6], OK, "1.0e-06, then 2.0e-06"),
        ([1e-6, 0.2], FAIL, "weights do not reach vLLM"),
        ([0.2, 0.2], FAIL, "the model is not the same in both"),
        ([1e-6, math.nan], FAIL, "not finite (step 2)"),
        ([math.nan, math.nan], FAIL, "not finite (step 1, step 2)"),
    ],
)
def test_a_gap_between_vllm_and_the_policy_fails(gaps, verdict, words):
    finding = doctor.judge_gap(gaps, limit=1e-3)
    assert finding.verdict == verdict and words in finding.text


@pytest.mark.parametrize(
    ("plain", "verdict", "words"),
    [
        ({"loss": 0.7, "gradient norm": 2.00001}, OK, "gradient norm 2 (plain PyTorch in fp32: 2.00001)"),
        ({"loss": 0.7, "gradient norm": 2.1}, FAIL, "2.1); report it"),
        ({"loss": 0.7, "gradient norm": math.nan}, FAIL, "not finite: gradient norm"),
        ({"loss": math.nan, "gradient norm": 2.0}, FAIL, "not finite: loss"),
    ],
)
def test_an_update_beside_plain_pytorch(plain, verdict, words):
    finding = device_probe.judge_update({"loss": 0.7, "gradient norm": 2.0}, plain, tolerance=1e-4)
    assert finding.verdict == verdict and words in finding.text


def test_an_update_that_was_skipped_is_told():
    """It has neither loss nor gradient norm."""
    worker = device_probe.Worker.__new__(device_probe.Worker)
    worker.rows = lambda **sizes: ({}, [], [])
    worker.update = lambda rows: {"actor/skipped_steps": 1}
    finding = worker.update_beside_plain_pytorch()
    assert finding.verdict == FAIL and "was skipped" in finding.text


@pytest.mark.parametrize(
    ("before", "after", "verdict", "words"),
    [
        (0.5, 0.0, OK, "0.5 before it"),
        (0.5, 1e-4, WARN, "it should be 0"),
        (0.5, 0.5, FAIL, "does not follow"),
        (0.0, 0.0, FAIL, "does not follow"),
        (math.nan, math.nan, FAIL, "not finite"),
        (0.5, math.nan, FAIL, "not finite"),
    ],
)
def test_a_refresh_that_leaves_a_difference_or_none_that_is_a_number(before, after, verdict, words):
    finding = device_probe.judge_refresh(before, after, seconds=0.1)
    assert finding.verdict == verdict and words in finding.text


def test_a_measurement_that_fails_is_told_with_its_last_words(monkeypatch):
    script = 'import sys; print(\'{"name": "x", "verdict": "ok", "text": "t", "figures": {}}\'); sys.exit("no device")'
    monkeypatch.setattr(doctor, "command_of", lambda *arguments: [sys.executable, "-c", script])
    first, second = doctor.probe_device("cpu", time.time() + 60)
    assert first == Finding("x", OK, "t", {})
    assert second.verdict == FAIL and "ended with 1: no device" in second.text


def test_a_measurement_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(doctor, "command_of", lambda *arguments: ["sleep", "60"])
    (finding,) = doctor.probe_device("cpu", time.time() + 2)
    assert finding.verdict == FAIL and "no end after 1 s" in finding.text


def test_a_tiny_run_has_the_time_that_is_left(monkeypatch, tmp_path):
    """Of ten minutes; what took long before it, as first imports do, leaves it less."""
    given = []
    monkeypatch.setattr(doctor, "start", lambda command, seconds, folder: given.append(seconds) or (None, "", "x"))
    for left in (500, -1):
        (finding,) = doctor.tiny_run("cpu", tmp_path, time.time() + left)
        assert finding.verdict == FAIL and f"no end after {given[-1]:.0f} s" in finding.text
    assert 400 < given[0] < 500 and given[1] == 0


def test_the_time_counts_from_the_start_of_the_process(monkeypatch, tmp_path):
    """Python's imports are before main."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # as main does, which the tests after it are not to see
    deadlines = []
    monkeypatch.setattr(doctor, "examine", lambda *arguments: deadlines.append(arguments[-1]) or [])
    monkeypatch.setattr(sys, "argv", ["doctor", "--profile", "cpu", "--json", str(tmp_path / "doctor.json")])
    with pytest.raises(SystemExit):
        doctor.main()
    assert deadlines == [psutil.Process().create_time() + doctor.SECONDS] and doctor.SECONDS + 30 < 600


def test_a_run_that_is_refused_is_told_by_its_error(monkeypatch, tmp_path):
    script = 'import sys; sys.exit("noise\\nerror: data.train_files is missing\\nlogs: x")'
    monkeypatch.setattr(doctor, "command_of", lambda *arguments: [sys.executable, "-c", script])
    (finding,) = doctor.tiny_run("cpu", tmp_path, time.time() + 60)
    assert finding.verdict == FAIL and "ended with 1: error: data.train_files is missing" in finding.text


def test_a_step_of_the_tiny_run_that_was_skipped_is_told(monkeypatch, tmp_path):
    """It has no gap."""
    steps = {"rollout/logp_gap_max": 1e-6}, {"actor/skipped_steps": 1}
    *_, finding = finished_tiny_run(monkeypatch, tmp_path, "cpu", 0, *steps)
    assert finding.verdict == FAIL and "not finite (step 2)" in finding.text


def test_nothing_is_measured_with_another_verl(monkeypatch):
    monkeypatch.setattr(doctor, "check_versions", lambda profile: Finding("versions", FAIL, "verl is 0.8.0"))
    monkeypatch.setattr(doctor, "probe_device", None)
    *_, last = doctor.examine("cpu", [], quick=False, deadline=0)
    assert (last.name, last.verdict) == ("device", WARN)


def test_the_doctor_looks_where_the_run_would(monkeypatch):
    """Not into a folder called ~."""
    monkeypatch.setenv("HOME", "/home/me")
    checked = []
    monkeypatch.setattr(doctor, "findings", lambda config: checked.append(config) or [Finding("driver", FAIL, "none")])
    list(doctor.examine("cpu", ["trainer.default_local_dir='~/run'"], quick=True, deadline=0))
    assert [config.trainer.default_local_dir for config in checked] == ["/home/me/run"]


def test_cores_and_memory_are_checked_for_the_gpus_that_are_there(monkeypatch):
    """As run_spin.sh counts them; verl's own default is 8."""
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 2)
    checked = []
    monkeypatch.setattr(doctor, "findings", lambda config: checked.append(config) or [Finding("driver", FAIL, "none")])
    for overrides in ([], ["trainer.n_gpus_per_node=1"]):
        list(doctor.examine("gpu", overrides, quick=True, deadline=0))
    assert [config.trainer.n_gpus_per_node for config in checked] == [2, 1]


def test_the_home_folder_is_not_told(monkeypatch):
    finding = Finding("disk", OK, f"{Path.home()}/outputs", {"folder": f"{Path.home()}/x"})
    told = doctor.without_names(finding)
    assert (told.text, told.figures) == ("~/outputs", {"folder": "~/x"})


def test_attention_is_compared_in_the_precision_of_gpus():
    """Plain attention takes copies of the inputs in fp32, and both have gradients."""
    probe = device_probe.PROBES["cuda"]
    finding = device_probe.attention("cpu", probe)
    assert finding.verdict == OK, finding.text
    assert all(0 < gap < probe.attention_tolerance for gap in finding.figures.values())


def test_wrong_gradients_of_attention_are_found(monkeypatch):
    from recipe.spin.engine import attention

    right = attention.attend_by_row

    def wrong_for_keys(query, key, *others):
        return right(query, 2 * key - key.detach(), *others)  # the same output, twice the gradient

    monkeypatch.setattr(attention, "attend_by_row", wrong_for_keys)
    finding = device_probe.attention("cpu", device_probe.PROBES["cpu"])
    wrong = [name for name, gap in finding.figures.items() if gap > 1e-5]
    assert finding.verdict == FAIL and wrong == ["key, heads of 64", "key, heads of 128"]


def test_attention_that_is_not_finite_is_found(monkeypatch):
    """The largest of differences passes over a NaN that is not the first."""
    from recipe.spin.engine import attention

    right = attention.attend_by_row

    def not_finite_for_keys(query, key, *others):
        key = key.clone()
        key.register_hook(lambda gradient: gradient * math.nan)
        return right(query, key, *others)

    monkeypatch.setattr(attention, "attend_by_row", not_finite_for_keys)
    finding = device_probe.attention("cpu", device_probe.PROBES["cpu"])
    assert finding.verdict == FAIL and "not finite: key, heads of 64, key, heads of 128;" in finding.text


def test_wrong_attention_is_found(monkeypatch):
    assert device_probe.attention("cpu", device_probe.PROBES["cpu"]).verdict == OK
    from recipe.spin.engine import attention

    right = attention.attend_by_row
    monkeypatch.setattr(attention, "attend_by_row", lambda *arguments: right(*arguments) * 1.01)
    finding = device_probe.attention("cpu", device_probe.PROBES["cpu"])
    assert finding.verdict == FAIL and "share_prompt=False" in finding.text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("wrong", [blind_beyond_a_tile, wrong_with_a_common_beginning, wrong_for_heads_above_64])
def test_attention_is_compared_beyond_what_a_short_sequence_shows(device, wrong):
    """In the precision of either device."""
    with wrong():
        finding = device_probe.attention("cpu", device_probe.PROBES[device])
    wrong_heads = {name.split(", ")[1] for name, gap in finding.figures.items() if gap > 0.1}
    assert finding.verdict == FAIL
    assert wrong_heads == {"heads of 128"} | ({"heads of 64"} if wrong is not wrong_for_heads_above_64 else set())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_as_gpus_compute_it_is_right(device):
    with segments_on_a_cpu():
        finding = device_probe.attention("cpu", device_probe.PROBES[device])
    assert finding.verdict == OK, finding.text


@pytest.mark.slow
def test_an_update_is_compared_on_long_sequences_with_a_common_beginning(tmp_path):
    ranks = Ranks(1)
    folder = save_probe_model(tmp_path, **TINY)
    contexts = ([], [blind_beyond_a_tile], [wrong_with_a_common_beginning])
    try:
        findings = [ranks.run(run_within, context, probe_update, folder)[0] for context in contexts]
    finally:
        ranks.stop()
    assert [finding.verdict for finding in findings] == [OK, FAIL, FAIL], findings


def test_the_probes_model_has_a_token_for_every_byte():
    from recipe.spin.tools.probe_model import make_tokenizer

    tokenizer = make_tokenizer()
    text = "What is 1 + 2? \N{GREEK SMALL LETTER ALPHA}"
    assert len(tokenizer) == 259 and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).endswith("<|im_end|>\n")


def test_the_probes_model_is_of_the_kind_of_the_gpu_profiles_own(tmp_path):
    """vLLM takes another model runner for a Llama; and its weights are the same every time."""
    from safetensors.torch import load_file

    folders = [save_probe_model(tmp_path / name, **TINY) for name in "ab"]
    assert AutoConfig.from_pretrained(folders[0]).architectures == ["Qwen2ForCausalLM"]
    first, second = (load_file(Path(folder) / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_the_cpu_profiles_environment_stands_before_python_starts():
    script = "import os; print(os.environ['VERL_PLATFORM'], os.environ['TORCH_COMPILE_DISABLE'])"
    result = subprocess.run(doctor.command_of("cpu", "-c", script), capture_output=True, text=True, timeout=300)
    expected = cpu_environment()
    assert result.stdout.split() == [expected["VERL_PLATFORM"], expected["TORCH_COMPILE_DISABLE"]]
