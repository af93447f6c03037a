"""Settings that cannot work are refused before Ray starts, by one message with the remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkable_run import Run, composed, override, write_rows
from hydra.errors import HydraException
from omegaconf import OmegaConf
from worker_harness import ROOT, compose, cpu_environment

from recipe.spin import main_spin
from recipe.spin.checks.rules.preferences import READ_BY
from recipe.spin.checks.rules.reference import adapters_are_gathered_alone
from recipe.spin.common.settings import Settings


# ---- Settings that work ----------------------------------------------------------------------------------------------
def test_cpu_profile(run):
    config = run.check()
    assert config.trainer.device == "cpu" and config.actor_rollout_ref.actor.fsdp_config.model_dtype == "fp32"
    assert config.actor_rollout_ref.ref.strategy == config.actor_rollout_ref.actor.strategy == "fsdp2"
    assert config.algorithm.dpo_beta == 0.1 and config.algorithm.dpo_loss_type == "sigmoid"
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == 4


def conversation(number: int) -> dict:
    """A row of SPIN's published data."""
    question = {"role": "user", "content": f"What is {number} + 1?"}
    return {"real": [question, {"role": "assistant", "content": str(number + 1)}]}


def self_play(run: Run, rows: list[dict]) -> list[str]:
    files = {"train_files": rows, "val_files": rows * 2}  # the same bytes would be refused
    files = {key: write_rows(run.folder / f"{key}.jsonl", content) for key, content in files.items()}
    source = ["algorithm.preference_source=self_play", "actor_rollout_ref.rollout.n=1"]
    return source + [f"data.{key}={file}" for key, file in files.items()]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_self_play_brings_its_data_set_with_it(device):
    config = compose("algorithm.preference_source=self_play", device=device)
    assert config.data.prompt_key == "real" and config.data.custom_cls.name == "SelfPlayDataset"
    assert Path(config.data.custom_cls.path).is_file() and config.actor_rollout_ref.rollout.n == 1
    assert Path(config.reward.custom_reward_function.path).is_file()
    plain = compose(device=device)
    assert plain.data.prompt_key == "prompt" and plain.data.custom_cls.path is None
    assert plain.reward.custom_reward_function.path is None and plain.actor_rollout_ref.rollout.n > 1


def test_self_play_takes_conversations(run):
    assert run.check(*self_play(run, [conversation(number) for number in range(4)])).data.prompt_key == "real"


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": "no response"}], conversation(0)["real"][:1] * 2, []]
)
def test_self_play_refuses_conversations_without_a_response(run, messages):
    message = run.refusal(*self_play(run, [conversation(0), {"real": messages}, conversation(2), conversation(3)]))
    assert "data.train_files" in message and "row 1" in message and "'real'" in message


def test_self_play_refuses_data_without_the_column(run):
    message = run.refusal("algorithm.preference_source=self_play")
    assert "'real'" in message and "data.prompt_key" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.filter_groups.enable=True"], ["algorithm.filter_groups.enable=True", "no rewards to compare"]),
        (
            ["algorithm.dpo_loss_type=aot", "actor_rollout_ref.rollout.n=2"],
            ["actor_rollout_ref.rollout.n=2", "aot", "set actor_rollout_ref.rollout.n=1"],
        ),
    ],
)
def test_self_play_refuses_what_takes_rewards_or_one_pair_a_prompt(run, overrides, words):
    rows = [conversation(number) for number in range(4)]
    names = {override.split("=")[0] for override in overrides}
    given = [override for override in self_play(run, rows) if override.split("=")[0] not in names]
    message = run.refusal(*given, *overrides)
    assert "\n" not in message and [word for word in words if word not in message] == [], message


def test_self_play_refuses_lora(run):
    overrides = self_play(run, [conversation(number) for number in range(4)])
    message = run.refusal(*overrides, "trainer.ref_update_freq=0", "actor_rollout_ref.model.lora_rank=8")
    assert "algorithm.preference_source=self_play" in message and "lora_rank" in message


SHARE_PROMPT = "actor_rollout_ref.share_prompt"
MODE = "trainer.v1.trainer_mode"


def test_gpu_profile(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("recipe.spin.checks.check.machine_faults", lambda _: [])  # test_machine.py has its checks
    config = run.check(device="gpu")
    assert config.trainer.device == "cuda"
    actor, ref, rollout = (config.actor_rollout_ref[name] for name in ("actor", "ref", "rollout"))
    assert (actor.fsdp_config.model_dtype, ref.fsdp_config.model_dtype) == ("fp32", "bf16")
    assert actor.optim.override_optimizer_config == {"eps": 1e-4} and actor.optim.lr == 1e-6
    assert (rollout.n, rollout.val_kwargs.n, rollout.val_kwargs.do_sample) == (8, 1, False)
    assert (config.algorithm.dpo_beta, config.algorithm.dpo_pairing) == (0.1, "best_worst")
    whole = compose(device="gpu")  # the other has small data
    assert (whole.data.train_batch_size, whole.data.val_max_samples, rollout.val_kwargs.temperature) == (64, 512, 0)


def test_adapters_take_larger_steps_on_gpus():
    """Ten times the rate, and of Adam's epsilon what it is made for."""
    optim = compose("actor_rollout_ref.model.lora_rank=32", device="gpu").actor_rollout_ref.actor.optim
    assert (optim.lr, optim.override_optimizer_config) == (1e-5, {"eps": 1e-8})


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_defaults_of_settings_that_some_losses_read_are_the_configs(device):
    algorithm = compose(device=device).algorithm
    assert {name: algorithm[name] for name in READ_BY} == {name: default for name, (default, _) in READ_BY.items()}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_responses_are_seeded_only_where_it_costs_nothing(device):
    assert compose(device=device).actor_rollout_ref.seed_responses is (device == "cpu")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_reference_computes_in_the_actors_precision(run, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("recipe.spin.checks.check.machine_faults", lambda _: [])
    key = "actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype"
    config = run.check(f"{key}=bf16", device=device)
    assert config.actor_rollout_ref.ref.fsdp_config.mixed_precision.reduce_dtype == "bf16"


@pytest.mark.parametrize(
    ("share_prompt", "installed", "expected"),
    [(True, True, "sdpa"), (False, False, "sdpa"), (False, True, "flash_attention_2")],
)
def test_gpu_profile_uses_the_models_flash_attention_only_without_its_own(
    monkeypatch, share_prompt, installed, expected
):
    monkeypatch.setattr("recipe.spin.main_spin.has_flash_attention_2", lambda: installed)
    config = compose(f"{SHARE_PROMPT}={share_prompt}", device="gpu")
    assert config.actor_rollout_ref.model.override_config.attn_implementation == expected


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_no_response_of_a_step_waits_for_another_where_one_rank_generates_all(device):
    config = compose(device=device)
    rollout = config.actor_rollout_ref.rollout
    assert config.data.train_batch_size * rollout.n <= rollout.max_num_seqs <= rollout.max_num_batched_tokens


@pytest.mark.parametrize(("rank", "expected"), [(0, "dummy"), (4, "auto")])
def test_vllm_on_gpus_reads_the_base_model_that_adapters_leave_as_it_is(rank, expected):
    config = compose(f"actor_rollout_ref.model.lora_rank={rank}", device="gpu")
    assert config.actor_rollout_ref.rollout.load_format == expected


def test_gpu_profile_on_a_machine_with_fewer_gpus(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = run.refusal("trainer.n_gpus_per_node=2", device="gpu")
    assert "trainer.n_gpus_per_node=2" in message and "1 GPU" in message and "SPIN_PROFILE=cpu" in message


ULYSSES = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size"
FLASH = "actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2"

LORA = "actor_rollout_ref.model.lora_rank=4"
TWO_GPUS = "trainer.device=cuda trainer.nnodes=2 trainer.n_gpus_per_node=1 "
TWO_GPUS += "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"


@pytest.mark.parametrize(("nodes", "faults"), [(1, 0), (2, 1)])
def test_on_one_gpu_fsdp1_has_nothing_to_gather_for_adapters(nodes, faults):
    asked = [*TWO_GPUS.split(), f"trainer.nnodes={nodes}", LORA, "actor_rollout_ref.actor.strategy=fsdp"]
    settings = Settings(override(composed("cpu"), asked))
    adapters_are_gathered_alone(settings)
    assert len(settings.faults) == faults


@pytest.mark.parametrize("key", ["ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size"])
def test_the_reference_shares_sequences_as_the_actor_does(run, key):
    config = run.check(f"actor_rollout_ref.actor.{key}=2", *TWO_GPUS.split())
    for part in (config.actor_rollout_ref.actor, config.actor_rollout_ref.ref):
        assert part.fsdp_config.ulysses_sequence_parallel_size == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.dpo_beta={schedule:cosine,start:0.5,end:0.1}"],
        ["algorithm.dpo_beta=[0.5,0.1]"],
        ["algorithm.dpo_loss_type=[sigmoid,sft]", "algorithm.dpo_loss_weights=[1,0.2]"],
        ["algorithm.dpo_loss_type=aot"],
        ["algorithm.dpo_label_smoothing=0.5"],
        ["algorithm.dpo_loss_type=simpo", "algorithm.dpo_simpo_gamma=1"],
        ["algorithm.dpo_loss_type=[sigmoid,sft]", "algorithm.dpo_ld_alpha=0.5", "algorithm.dpo_length_penalty=0.01"],
        ["algorithm.dpo_f_divergence_type=alpha_divergence", "algorithm.dpo_use_weighting=True"],
        ["actor_rollout_ref.rollout.n=4", "algorithm.dpo_pairing=all"],
        ["actor_rollout_ref.actor.strategy=fsdp"],
        ["trainer.ref_update_freq=0", "actor_rollout_ref.model.lora_rank=8"],
        ["trainer.ref_update_freq=10", "trainer.ref_update_alpha=0.5"],
        ["actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct"],  # hub names are looked up for GPUs alone
        # prompts are counted, not their tokens
        ["actor_rollout_ref.actor.use_dynamic_bsz=False", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1"],
        # the longest prompt with its two responses fits exactly
        ["data.max_prompt_length=64", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=96"],
        ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=160", f"{SHARE_PROMPT}=False"],
        [f"{ULYSSES}=2", *TWO_GPUS.split(), FLASH, f"{SHARE_PROMPT}=False"],
        [LORA, *TWO_GPUS.split(), "trainer.ref_update_freq=0"],
        [LORA, "actor_rollout_ref.actor.strategy=fsdp", "trainer.ref_update_freq=0"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_settings_that_work(run, overrides):
    run.check(*overrides)


# ---- Settings that do not --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("actor_rollout_ref.rollout.n=1", ["actor_rollout_ref.rollout.n=1", "at least 2"]),
        ("actor_rollout_ref.rollout.n=two", ["actor_rollout_ref.rollout.n=", "two", "at least 2"]),
        ("actor_rollout_ref.rollout.temperature=0", ["actor_rollout_ref.rollout.temperature=0", "above 0"]),
        ("algorithm.dpo_beta=0", ["algorithm.dpo_beta", "> 0"]),
        ("algorithm.dpo_beta=high", ["algorithm.dpo_beta", "high", "> 0"]),
        ("algorithm.dpo_beta=null", ["algorithm.dpo_beta", "> 0"]),
        ("algorithm.dpo_beta=[0.1,-1]", ["algorithm.dpo_beta", "-1"]),
        ("algorithm.dpo_beta={schedule:step,start:1,end:2}", ["algorithm.dpo_beta", "linear or cosine"]),
        ("algorithm.dpo_loss_type=sigmoidal", ["algorithm.dpo_loss_type", "sigmoidal", "choose from sigmoid, "]),
        ("algorithm.dpo_loss_type=[sigmoid,stf]", ["algorithm.dpo_loss_type", "stf"]),
        ("algorithm.dpo_loss_weights=[1,2]", ["algorithm.dpo_loss_weights", "[1, 2]"]),
        ("algorithm.dpo_label_smoothing=0.6", ["algorithm.dpo_label_smoothing", "0.6", "0 to 0.5"]),
        ("algorithm.dpo_label_smoothing=-0.1", ["algorithm.dpo_label_smoothing", "-0.1"]),
        ("algorithm.dpo_loss_type=exo_pair", ["algorithm.dpo_label_smoothing", "above 0 for exo_pair"]),
        ("algorithm.dpo_loss_type=sft algorithm.dpo_average_log_prob=True", ["dpo_average_log_prob", "false"]),
        ("algorithm.dpo_loss_type=dpop algorithm.dpo_reference_free=True", ["dpo_reference_free", "dpop", "false"]),
        ("algorithm.dpo_loss_type=simpo algorithm.dpo_ld_alpha=0.5", ["dpo_ld_alpha", "simpo", "these do: sigmoid"]),
        ("algorithm.dpo_loss_type=aot algorithm.dpo_use_weighting=True", ["dpo_use_weighting", "aot"]),
        ("algorithm.dpo_simpo_gamma=1", ["algorithm.dpo_simpo_gamma=1", "no loss", "these do: simpo. Leave it at 0.5"]),
        (
            "algorithm.dpo_loss_type=[hinge,sft] algorithm.dpo_label_smoothing=0.1",
            ["label_smoothing=0.1", "these do: s"],
        ),
        ("algorithm.dpo_dpop_lambda=5", ["algorithm.dpo_dpop_lambda=5", "these do: dpop"]),
        ("algorithm.dpo_discopop_tau=0.05", ["algorithm.dpo_discopop_tau=0.05", "these do: discopop"]),
        (
            "algorithm.dpo_f_alpha_divergence_coef=0.9",
            ["algorithm.dpo_f_alpha_divergence_coef=0.9", "dpo_f_divergence_type=reverse_kl does not read it"],
        ),
        ("algorithm.dpo_f_divergence_type=kl", ["algorithm.dpo_f_divergence_type", "'kl'", "forward_kl"]),
        ("algorithm.dpo_ld_alpha=2", ["algorithm.dpo_ld_alpha=2", "at least 0 and at most 1"]),
        ("algorithm.dpo_length_penalty=-1", ["algorithm.dpo_length_penalty=-1", "at least 0"]),
        ("algorithm.dpo_loss_type=aot algorithm.dpo_pairing=all", ["algorithm.dpo_pairing=all", "best_worst"]),
        ("algorithm.dpo_pairing=best", ["algorithm.dpo_pairing=", "best_worst, random, all"]),
        ("algorithm.dpo_tie_policy=last", ["algorithm.dpo_tie_policy=", "drop, first"]),
        ("algorithm.dpo_min_margin=-1", ["algorithm.dpo_min_margin=-1", "at least 0"]),
        ("algorithm.missing_eos_penalty=-1", ["algorithm.missing_eos_penalty=-1", "at least 0"]),
        ("trainer.ref_update_freq=1.5", ["trainer.ref_update_freq=1.5", "whole number"]),
        ("trainer.ref_update_alpha=0", ["trainer.ref_update_alpha=0", "above 0"]),
        ("trainer.ref_update_alpha=1.5", ["trainer.ref_update_alpha=1.5", "at most 1"]),
        (
            "trainer.ref_update_alpha=0.5 actor_rollout_ref.ref.fsdp_config.model_dtype=bf16",
            ["trainer.ref_update_alpha=0.5", "actor_rollout_ref.ref.fsdp_config.model_dtype=fp32"],
        ),
        (
            "actor_rollout_ref.model.lora_rank=8",
            ["trainer.ref_update_freq=", "lora_rank=8", "set trainer.ref_update_freq=0"],
        ),
        ("actor_rollout_ref.actor.shuffle=True", ["actor_rollout_ref.actor.shuffle=True", "order of the batch"]),
        ("actor_rollout_ref.seed_responses=1", ["actor_rollout_ref.seed_responses=1", "True or False"]),
        (
            "actor_rollout_ref.ref.fsdp_config.model_dtype=bf16",
            ["actor_rollout_ref.ref.fsdp_config.model_dtype='bf16'", "computes in fp32", "use fp32"],
        ),
        (
            "actor_rollout_ref.ref.fsdp_config.mixed_precision={param_dtype:bf16}",
            ["actor_rollout_ref.ref.fsdp_config.mixed_precision", "computes as the actor does"],
        ),
        (f"{SHARE_PROMPT}=1", [f"{SHARE_PROMPT}=1", "True or False"]),
        ("actor_rollout_ref.actor.ppo_epochs=0", ["actor_rollout_ref.actor.ppo_epochs=0", "at least 1"]),
        ("data.train_batch_size=null", ["data.train_batch_size=None", "whole number"]),
        ("actor_rollout_ref.actor.optim.lr=-1", ["actor_rollout_ref.actor.optim.lr=-1", "at least 0"]),
        ("algorithm.dpo_reference_free=maybe", ["algorithm.dpo_reference_free='maybe'", "True or False"]),
        ("data.train_files=null", ["data.train_files=None", "name a file"]),
        ("actor_rollout_ref.model.path=null", ["actor_rollout_ref.model.path=None", "name a model"]),
        ("critic.enable=True", ["critic.enable=True", "set it to False"]),
        ("actor_rollout_ref.rollout.name=sglang", ["actor_rollout_ref.rollout.name='sglang'", "vllm"]),
        ("actor_rollout_ref.rollout.max_model_len=10", ["actor_rollout_ref.rollout.max_model_len=10", "raise it"]),
        (f"{ULYSSES}=2 trainer.n_gpus_per_node=2", [f"{ULYSSES}=2", "gloo"]),
        (f"{ULYSSES}=2 {TWO_GPUS} {SHARE_PROMPT}=False", [f"{ULYSSES}=2", "sdpa would attend", f"{SHARE_PROMPT}=True"]),
        (f"{ULYSSES}=2 {FLASH}", [f"{ULYSSES}=2", "the 1 ranks"]),
        (f"{ULYSSES}=0", [f"{ULYSSES}=0", "at least 1"]),
        (
            f"{ULYSSES}=2 {TWO_GPUS} actor_rollout_ref.model.use_remove_padding=False",
            [f"{ULYSSES}=2", "use_remove_padding=True"],
        ),
        (
            f"{ULYSSES}=2 {TWO_GPUS} algorithm.dpo_loss_type=aot",
            ["dpo_loss_type", "ulysses_sequence_parallel_size=1"],
        ),
        (
            "actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size=2",
            ["actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size=2", "the actor's, 1"],
        ),
        ("actor_rollout_ref.ref.fsdp_config.fsdp_size=2", ["ref.fsdp_config.fsdp_size=2", "the same"]),
        ("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=9", ["log_prob_max_token_len_per_gpu=9", "raise it"]),
        (
            f"{LORA} {TWO_GPUS} trainer.ref_update_freq=0 actor_rollout_ref.actor.strategy=fsdp",
            ["actor_rollout_ref.actor.strategy='fsdp'", "whole model in fp32 on each GPU", "set fsdp2"],
        ),
        ("actor_rollout_ref.actor.strategy=megatron", ["actor_rollout_ref.actor.strategy=", "fsdp2 or fsdp"]),
        (
            "actor_rollout_ref.ref.strategy=fsdp",
            ["actor_rollout_ref.ref.strategy='fsdp'", "actor_rollout_ref.actor.strategy"],
        ),
        (f"{MODE}=separate_async", [f"{MODE}='separate_async'", "colocate_async", "docs/asynchronous.md"]),
        (f"{MODE}=colocate_async algorithm.preference_source=self_play", [f"{MODE}='colocate_async'", "set sync"]),
        (
            f"{MODE}=colocate_async reward.reward_model.enable=True",
            [f"{MODE}='colocate_async'", "reward.reward_model.enable_resource_pool=True"],
        ),
        (
            f"{MODE}=colocate_async transfer_queue.backend.SimpleStorage.total_storage_size=15",
            ["total_storage_size=15", "1 of them ahead"],
        ),
        (
            f"{MODE}=colocate_async algorithm.preference_source=judge algorithm.judge.servers=[reference]",
            [f"{MODE}='colocate_async'", "set sync"],
        ),
        (f"{MODE}=colocate_async skip.rollout_tq.enable=True", ["skip.rollout_tq.enable=True", "set False"]),
        (
            "actor_rollout_ref.model.enable_activation_offload=True",
            ["enable_activation_offload=True", "set actor_rollout_ref.keep_products=False"],
        ),
        ("trainer.rollout_sync_freq=0", ["trainer.rollout_sync_freq=0", "at least 1"]),
        (
            "trainer.rollout_sync_freq=2",
            ["trainer.rollout_sync_freq=2", "set actor_rollout_ref.rollout.free_cache_engine=False"],
        ),
        (
            "trainer.rollout_sync_freq=2 actor_rollout_ref.rollout.free_cache_engine=False "
            "algorithm.preference_source=self_play",
            ["trainer.rollout_sync_freq=2", "the reference's weights"],
        ),
        (
            "data.max_prompt_length=64 actor_rollout_ref.actor.ppo_max_token_len_per_gpu=95",
            ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=95", "2 responses", "96 tokens", "raise it"],
        ),
        (
            f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu=159 {SHARE_PROMPT}=False",
            ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=159", "160 tokens"],
        ),
        (
            "algorithm.dpo_pairing=all actor_rollout_ref.actor.ppo_max_token_len_per_gpu=127",
            ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=127", "4 responses", "128 tokens"],
        ),
    ],
)
def test_setting_is_refused(run, overrides, words):
    message = run.refusal(*overrides.split())
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", ["algorithm.dpo_betta", "trainer.reference_update_freq", "actor_rollout_ref.ref.freq"])
def test_unknown_key_is_refused(name):
    with pytest.raises(HydraException) as caught:
        compose(f"{name}=1")
    assert name in str(caught.value)


def test_overrides_of_these_tests_are_what_hydra_composes(run):
    overrides = run.overrides(
        "algorithm.dpo_beta={schedule:cosine,start:0.5,end:0.1}", "algorithm.dpo_loss_type=[ipo,sft]"
    )
    assert override(composed("cpu"), overrides) == compose(*overrides)


# ---- The command -----------------------------------------------------------------------------------------------------
def test_command_refuses_before_ray_starts(run, tmp_path):
    """Exit code, message on stderr, no traceback."""
    command = [sys.executable, "-m", "recipe.spin.main_spin", "device=cpu"]
    result = subprocess.run(
        [*command, *run.overrides("algorithm.dpo_beta=-1", "data.seed=one")],
        cwd=tmp_path,
        env=os.environ | cpu_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert result.stderr.count("error: 2 faults\n  1. data.seed='one': must be a whole number") == 1
    assert "algorithm.dpo_beta" in result.stderr and "give a number > 0" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "starting Ray" not in result.stderr
    assert not (tmp_path / "outputs").exists()


MODEL, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.seed=${data.nothing}", ["error: data.seed: ", "'data.nothing' not found", "give data.seed a value"]),
        ("data.seed=${nothing:1}", ["error: data.seed: ", "interpolation type nothing"]),
        ("reward.num_workers=${data.nothing}", ["error: reward.num_workers: "]),
        ("data.train_files=[a,'${data.nothing}']", ["error: data.train_files.1: "]),
        ("trainer=null", ["trainer.n_gpus_per_node: node `trainer` is not a container"]),
        (f"{MODEL}=null", [f"{MODEL}=None: must be a section of keys"]),
        (f"{ROLLOUT}=null", [f"{ROLLOUT}=None: must be a section of keys"]),
        ("reward=null", ["reward=None: must be a section of keys"]),
    ],
)
def test_the_command_names_the_key_that_has_no_value(run, monkeypatch, override, words):
    key, _, value = override.partition("=")
    config = OmegaConf.merge(composed("cpu"), OmegaConf.from_dotlist(run.overrides()))
    OmegaConf.update(config, "data.train_max_samples", "???")  # no fault of an `${...}`
    OmegaConf.update(config, key, yaml.safe_load(value))
    monkeypatch.setattr(main_spin.signals, "honor", lambda: None)  # this process's signals are pytest's
    with pytest.raises(SystemExit) as stopped:
        main_spin.main.__wrapped__(config)
    assert [word for word in words if word not in stopped.value.code] == [], stopped.value.code
