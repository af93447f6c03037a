"""The schema of the settings: what it refuses, and that README and config follow from it."""

import re
from pathlib import Path
from typing import get_args

import pytest
import verl.trainer.config
import yaml
from checkable_run import composed
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.tracking import Tracking
from worker_harness import ROOT

from recipe.spin.checks import fit, kinds
from recipe.spin.checks.schema import described, readme_table
from recipe.spin.common.settings import Settings

CONFIG = ROOT / "config" / "spin_trainer.yaml"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


# ---- README and config -----------------------------------------------------------------------------------------------
def test_the_readme_has_the_table_of_the_schema():
    """`python -m recipe.spin.checks.schema` prints it."""
    assert readme_table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("key", [key for key, _ in described()])
def test_defaults_are_those_of_the_config(key):
    field = dict(described())[key]
    value = Settings(composed("gpu")).value(key)
    shown = field.json_schema_extra["shown"]  # another key, or a file of the recipe
    if shown and shown not in composed("gpu").data:
        assert value.endswith(f"/{shown}") and (ROOT / shown).is_file()
    else:
        assert value == (composed("gpu").data[shown] if shown else field.json_schema_extra["default"])


def keys_of(section: dict, path: str = "") -> list[str]:
    """The keys of a section and of those within it."""
    keys = []
    for name, value in section.items():
        keys += keys_of(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}"]
    return keys


def test_every_key_of_the_recipe_is_declared_and_explained():
    """A key that verl does not know stands in the schema, and in the config below a comment."""
    text = CONFIG.read_text()
    verls = yaml.safe_load((Path(verl.trainer.config.__path__[0]) / "_generated_ppo_trainer.yaml").read_text())
    config = yaml.safe_load(text)
    ours = {key for name in ("algorithm", "trainer", "actor_rollout_ref") for key in keys_of(config[name], f"{name}.")}
    of_dataclasses = (".ref.checkpoint.", ".ref.fsdp_config.")  # verl's, whose keys its yaml does not list
    ours = {key for key in ours - set(keys_of(verls)) if not any(part in key for part in of_dataclasses)}
    assert ours <= dict(described()).keys(), "declare them in checks/schema.py"
    for key in ours:
        name = key.rsplit(".", 1)[-1]
        assert re.search(rf"^ +#.*\n +{name}:", text, re.MULTILINE), f"{key} has no comment in {CONFIG.name}"


def test_the_loggers_are_verls():
    assert sorted(kinds.LOGGERS) == sorted(Tracking.supported_backend)


@pytest.mark.parametrize("name", get_args(kinds.Precision))
def test_precisions_are_those_that_verl_and_the_estimate_of_memory_know(name):
    assert PrecisionType.to_dtype(name).itemsize == fit.BYTES[name]


def test_vllms_precisions_are_those_that_it_takes():
    from vllm.config.model import ModelDType

    assert set(get_args(kinds.RolloutPrecision)) == set(get_args(ModelDType))


# ---- Settings that are refused by themselves -------------------------------------------------------------------------
BAD = [
    ("ray_kwargs.ray_init.num_cpus=2k", ["ray_kwargs.ray_init.num_cpus='2k'", "whole number of at least 1"]),
    ("ray_kwargs.ray_init.runtime_env=null", ["ray_kwargs.ray_init.runtime_env=None", "section of keys"]),
    ("ray_kwargs.ray_init.runtime_env=5", ["ray_kwargs.ray_init.runtime_env=5", "section of keys"]),
    ("+ray_kwargs.ray_init.runtime_env.env_vars=5", ["ray_kwargs.ray_init.runtime_env.env_vars=5"]),
    (
        "trainer.total_training_steps=abc",
        ["trainer.total_training_steps='abc'", "a whole number of at least 1 or null"],
    ),
    ("+ray_kwargs.ray_init.object_store_memory=1G", ["object_store_memory='1G'", "whole number"]),
    ("trainer.device=tpu", ["trainer.device='tpu'", "one of cuda, cpu"]),
    ("trainer.total_training_steps=0", ["trainer.total_training_steps=0", "at least 1"]),
    ("trainer.total_training_steps=-5", ["trainer.total_training_steps=-5", "at least 1"]),
    ("trainer.total_training_steps=2.5", ["trainer.total_training_steps=2.5", "whole number"]),
    ("trainer.resume_mode=never", ["trainer.resume_mode='never'", "one of auto, disable, resume_path, force"]),
    ("trainer.logger=[file,wadnb]", ["trainer.logger=['file', 'wadnb']", "wandb"]),
    ("trainer.logger=wadnb", ["trainer.logger='wadnb'", "tensorboard"]),
    ("trainer.n_gpus_per_node=0", ["trainer.n_gpus_per_node=0", "at least 1"]),
    ("trainer.max_actor_ckpt_to_keep=-1", ["trainer.max_actor_ckpt_to_keep=-1", "at least 0", "keeps all"]),
    ("trainer.max_actor_ckpt_to_keep=1.5", ["trainer.max_actor_ckpt_to_keep=1.5", "whole number"]),
    ("trainer.ref_update_alpha=True", ["trainer.ref_update_alpha=True", "a number above 0 and at most 1"]),
    (f"{ROLLOUT}.val_kwargs=null", [f"{ROLLOUT}.val_kwargs=None", "a section of keys"]),
    ("data.seed=one", ["data.seed='one'", "a whole number of at least 0 or null"]),
    ("data.train_files=5", ["data.train_files=5", "name a file"]),
    ("data.train_files=[]", ["data.train_files=[]", "name a file"]),
    ("data.val_files=[5]", ["data.val_files=[5]", "a list, each a text"]),
    ("data.max_response_length=8.0", ["data.max_response_length=8.0", "whole number"]),
    ("data.dataloader_num_workers=-1", ["data.dataloader_num_workers=-1", "at least 0"]),
    ("reward.num_workers=0", ["reward.num_workers=0", "at least 1"]),
    ("actor_rollout_ref.model.lora_rank=null", ["actor_rollout_ref.model.lora_rank=None", "whole number"]),
    ("actor_rollout_ref.model.lora_rank=1024", ["actor_rollout_ref.model.lora_rank=1024", "at most 512"]),
    ("actor_rollout_ref.model.override_config=null", ["override_config=None", "a section of keys"]),
    ("actor_rollout_ref.model.path=5", ["actor_rollout_ref.model.path=5", "name a model"]),
    (f"{ACTOR}.optim=null", [f"{ACTOR}.optim=None", "a section of keys"]),
    (f"{ACTOR}.optim.clip_grad=-1", [f"{ACTOR}.optim.clip_grad=-1", "above 0", "turn them round"]),
    (
        f"{ACTOR}.optim.betas=[0.9,1]",
        [f"{ACTOR}.optim.betas=[0.9, 1]", "each a number of at least 0 and below 1"],
    ),
    (f"{ACTOR}.optim.betas=[0.9]", [f"{ACTOR}.optim.betas=[0.9]", "a list"]),
    (f"{ACTOR}.checkpoint.save_contents=[modell]", ["save_contents=['modell']", "model, optimizer, extra, hf_model"]),
    (f"{ACTOR}.checkpoint.save_contents=[model,extra]", ["look for optimizer", f"out of {ACTOR}.checkpoint.load_con"]),
    (f"{ACTOR}.checkpoint.load_contents=[]", [f"{ACTOR}.checkpoint.load_contents=[]", "from the first model"]),
    (f"{ACTOR}.optim.lr=inf", [f"{ACTOR}.optim.lr=inf", "at least 0"]),
    (f"{ACTOR}.optim.lr=nan", [f"{ACTOR}.optim.lr=nan", "a number"]),
    (f"{ROLLOUT}.agent.num_workers=0", [f"{ROLLOUT}.agent.num_workers=0", "at least 1"]),
    (f"{ROLLOUT}.max_model_len=2k", [f"{ROLLOUT}.max_model_len='2k'", "a whole number of at least 1 or null"]),
    (f"{ROLLOUT}.prompt_length=5", [f"{ROLLOUT}.prompt_length=5", "data.max_prompt_length="]),
    (f"{ROLLOUT}.response_length=4000", [f"{ROLLOUT}.response_length=4000", "data.max_response_length="]),
    (f"{ROLLOUT}.response_length=null", [f"{ROLLOUT}.response_length=None", "data.max_response_length="]),
    (f"{ROLLOUT}.disaggregation.enabled=True", [f"{ROLLOUT}.disaggregation.enabled=True", "set it to False"]),
    (f"{ROLLOUT}.mode=sync", [f"{ROLLOUT}.mode='sync'", "must be async"]),
    (f"{ROLLOUT}.seed=-1", [f"{ROLLOUT}.seed=-1", "at least 0"]),
    (f"{ROLLOUT}.top_p=0", [f"{ROLLOUT}.top_p=0", "above 0 and at most 1"]),
    (f"{ROLLOUT}.top_p=1.5", [f"{ROLLOUT}.top_p=1.5", "at most 1"]),
    (f"{ROLLOUT}.top_k=-2", [f"{ROLLOUT}.top_k=-2", "at least -1"]),
    (f"{ROLLOUT}.val_kwargs.top_p=0", [f"{ROLLOUT}.val_kwargs.top_p=0", "above 0"]),
    (f"{ROLLOUT}.gpu_memory_utilization=1.2", ["gpu_memory_utilization=1.2", "at most 1"]),
    (f"{ROLLOUT}.dtype=fp32", [f"{ROLLOUT}.dtype='fp32'", "one of auto, bfloat16, float16, half, float32, float"]),
    (f"{ACTOR}.fsdp_config.model_dtype=fp8", [f"{ACTOR}.fsdp_config.model_dtype='fp8'", "one of fp32, float32, bf16"]),
    (f"{ROLLOUT}.do_sample=False", [f"{ROLLOUT}.do_sample=False", "must be sampled"]),
    # taken out
    (
        "~ray_kwargs.ray_init.num_cpus",
        ["ray_kwargs.ray_init.num_cpus is missing: give it", "a whole number of at least 1 or null"],
    ),
    ("~reward", ["reward is missing: give it", "a section of keys"]),
    ("~trainer.val_only", ["trainer.val_only is missing: give it", "must be True or False"]),
    ("~algorithm.dpo_beta", ["algorithm.dpo_beta is missing: give it"]),
    ("actor_rollout_ref.model.path='???'", ["actor_rollout_ref.model.path='???'", "name a model"]),
    # taken by verl, and without effect here
    (f"{ACTOR}.grad_clip=0.5", [f"{ACTOR}.grad_clip=0.5", "set optim.clip_grad"]),
    (f"{ACTOR}.entropy_coeff=0.01", [f"{ACTOR}.entropy_coeff=0.01", "SPIN does not use it; set it to 0"]),
    (f"{ACTOR}.loss_agg_mode=token-sum", [f"{ACTOR}.loss_agg_mode='token-sum'", "set it to token-mean"]),
    (f"{ACTOR}.clip_ratio=0.3", [f"{ACTOR}.clip_ratio=0.3", "set it to 0.2"]),
    (f"{ACTOR}.use_kl_loss=True", [f"{ACTOR}.use_kl_loss=True", "set it to False"]),
    (f"{ACTOR}.ppo_micro_batch_size=8", [f"{ACTOR}.ppo_micro_batch_size=8", "set it to None"]),
    ("algorithm.adv_estimator=grpo", ["algorithm.adv_estimator='grpo'", "set it to gae"]),
    ("algorithm.use_kl_in_reward=True", ["algorithm.use_kl_in_reward=True", "set it to False"]),
    ("algorithm.rollout_correction.rollout_is=token", ["rollout_correction.rollout_is='token'", "set it to None"]),
    ("algorithm.rollout_correction.rollout_rs=token_k1", ["rollout_rs='token_k1'", "SPIN does not use it"]),
    ("algorithm.rollout_correction.bypass_mode=True", ["bypass_mode=True", "set it to False"]),
    ("actor_rollout_ref.model.use_fused_kernels=True", ["use_fused_kernels=True", "no logits", "set it to False"]),
    ("distillation.enabled=True", ["distillation.enabled=True", "SPIN does not use it; set it to False"]),
    ("trainer.critic_warmup=10", ["trainer.critic_warmup=10", "set it to 0"]),
    ("trainer.balance_batch=False", ["trainer.balance_batch=False", "set it to True"]),
    ("algorithm.norm_adv_by_std_in_grpo=False", ["norm_adv_by_std_in_grpo=False", "set it to True"]),
    ("algorithm.kl_penalty=mse", ["algorithm.kl_penalty='mse'", "set it to kl"]),
    ("algorithm.kl_ctrl.kl_coef=0.1", ["algorithm.kl_ctrl.kl_coef=0.1", "set it to 0.001"]),
    ("algorithm.kl_ctrl.type=adaptive", ["algorithm.kl_ctrl.type='adaptive'", "set it to fixed"]),
    ("algorithm.rollout_correction.rollout_is_threshold=3", ["rollout_is_threshold=3", "set it to 2.0"]),
    (f"{ACTOR}.kl_loss_type=kl", [f"{ACTOR}.kl_loss_type='kl'", "set it to low_var_kl"]),
    (f"{ACTOR}.tau_neg=1", [f"{ACTOR}.tau_neg=1", "set it to 1.05"]),
    (f"{ACTOR}.policy_loss.clip_cov_ub=4", ["policy_loss.clip_cov_ub=4", "set it to 5.0"]),
    ("algorithm.rollout_correction.loss_type=reinforce", ["loss_type='reinforce'", "set it to ppo_clip"]),
    ("algorithm.pf_ppo.weight_pow=1.0", ["algorithm.pf_ppo.weight_pow=1.0", "set it to 2.0"]),
    ("trainer.esi_redundant_time=60", ["trainer.esi_redundant_time=60", "set it to 0"]),
    (f"{ACTOR}.calculate_sum_pi_squared=True", ["calculate_sum_pi_squared=True", "set it to False"]),
    (f"{ACTOR}.use_prefix_grouper=True", ["use_prefix_grouper=True", "actor_rollout_ref.share_prompt"]),
    (f"{ACTOR}.data_loader_seed=7", ["data_loader_seed=7", "set it to 42", "data.seed"]),
    (f"{ACTOR}.freeze_vision_tower=True", ["freeze_vision_tower=True", "set it to False"]),
    (f"{ROLLOUT}.over_sample_rate=0.1", ["over_sample_rate=0.1", "set it to 0"]),
    (f"{ROLLOUT}.moe_load_balance_metrics_interval=5", ["moe_load_balance_metrics_interval=5", "set it to 0"]),
    # without which a step fails
    (f"{ROLLOUT}.calculate_log_probs=False", ["calculate_log_probs=False", "must be True", "vLLM's log-probs"]),
    (f"{ROLLOUT}.pipeline_model_parallel_size=2", ["pipeline_model_parallel_size=2", "must be 1", "no pipeline"]),
    (f"{ROLLOUT}.log_prob_max_token_len_per_gpu=0", ["log_prob_max_token_len_per_gpu=0", "at least 1"]),
    ("reward.reward_model.rollout.pipeline_model_parallel_size=2", ["pipeline_model_parallel_size=2", "must be 1"]),
    # which runs beside each other would share
    (
        "transfer_queue.backend.storage_backend=MooncakeStore",
        ["transfer_queue.backend.storage_backend='MooncakeStore'", "must be SimpleStorage", "runs share"],
    ),
    ("data.reward_fn_key=source", ["data.reward_fn_key='source'", "read data_source alone"]),
    (
        "trainer.v1.sampler.sync_refill_failed_groups=True",
        ["sync_refill_failed_groups=True", "must be False", "for ever", "algorithm.reward_error=skip"],
    ),
]


@pytest.mark.parametrize(("override", "words"), BAD)
def test_setting_is_refused_by_itself(run, override, words):
    message = run.refusal(override)
    assert "\n" not in message, "one fault brings no other"
    assert [word for word in words if word not in message] == [], message


def test_a_password_in_an_address_is_not_shown(run):
    message = run.refusal("algorithm.judge.servers=['http://me:s3cret@judge/v1',5]")
    assert message.startswith("algorithm.judge.servers=['http://***@judge/v1', 5]: ") and "s3cret" not in message


def test_all_faults_are_told_at_once(run):
    message = run.refusal("data.seed=one", f"{ROLLOUT}.top_p=0", "algorithm.dpo_loss_type=stf", f"{ROLLOUT}.n=1")
    assert message.startswith("4 faults\n  1. ")
    assert all(key in message for key in ("data.seed", f"{ROLLOUT}.top_p", "dpo_loss_type", f"{ROLLOUT}.n=1"))
