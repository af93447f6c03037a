"""Settings that do not fit together are refused before Ray starts, each by a message with the remedy."""

import sys

import pytest

from recipe.spin.checks.rules import around_the_run
from recipe.spin.common.settings import ConfigError
from recipe.spin.core_algos import LOSSES

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
SCORED_BY_REFERENCE = "algorithm.preference_source=reference_source:ReferenceSays"
EXTERNAL = "actor_rollout_ref.model.external_lib"
EXECUTOR = f"{ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend"
QUEUE = "transfer_queue.backend.SimpleStorage.total_storage_size"

BAD = [
    ("data.gen_batch_size=3", ["data.gen_batch_size=3", "a divisor", "data.train_batch_size=4"]),
    ("data.train_max_samples=2", ["data.train_max_samples=2", "data.train_batch_size=4"]),
    (f"{ACTOR}.ppo_mini_batch_size=8", [f"{ACTOR}.ppo_mini_batch_size=8", "at most data.train_batch_size=4"]),
    (
        f"{ACTOR}.ppo_mini_batch_size=8 {ACTOR}.use_dynamic_bsz=False",
        [f"{ACTOR}.ppo_mini_batch_size=8", "at most data.train_batch_size=4"],
    ),
    (
        f"{ACTOR}.use_dynamic_bsz=False data.train_batch_size=3 {ROLLOUT}.n=3 trainer.n_gpus_per_node=2",
        ["data.train_batch_size=3", "its 9 responses", "2 ranks"],
    ),
    (
        f"{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp8",
        [f"{ACTOR}.fsdp_config.mixed_precision=", "param_dtype must be one of fp32, float32, bf16"],
    ),
    (
        f"{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp16",
        [f"{ACTOR}.fsdp_config.mixed_precision=", "param_dtype: fp16 is not supported", "use bf16 or fp32"],
    ),
    (
        f"{ACTOR}.fsdp_config.mixed_precision.reduce_dtype=float16",
        [f"{ACTOR}.fsdp_config.mixed_precision=", "reduce_dtype: fp16 is not supported", "in no checkpoint"],
    ),
    (f"{ACTOR}.fsdp_config.model_dtype=fp16", [f"{ACTOR}.fsdp_config.model_dtype='fp16'", "use bf16 or fp32"]),
    (
        f"{ACTOR}.strategy=fsdp actor_rollout_ref.ref.fsdp_config.param_offload=True",
        ["actor_rollout_ref.ref.fsdp_config.param_offload=True", f"set {ACTOR}.strategy=fsdp2, or False here"],
    ),
    (
        f"{ACTOR}.strategy=fsdp {ACTOR}.fsdp_config.offload_policy=True",
        [f"{ACTOR}.fsdp_config.offload_policy=True", "FSDP1 has none", f"{ACTOR}.fsdp_config.param_offload=True"],
    ),
    (
        f"{ACTOR}.fsdp_config.fsdp_size=0 actor_rollout_ref.ref.fsdp_config.fsdp_size=0",
        [f"{ACTOR}.fsdp_config.fsdp_size=0", "must divide the 1 ranks"],
    ),
    (f"{ROLLOUT}.max_model_len=1000", [f"{ROLLOUT}.max_model_len=1000", "512 tokens at most"]),
    (f"{ROLLOUT}.tensor_model_parallel_size=2", [f"{ROLLOUT}.tensor_model_parallel_size=2", "the 1 ranks"]),
    (
        f"trainer.n_gpus_per_node=2 {ROLLOUT}.tensor_model_parallel_size=2 {EXECUTOR}=uni",
        [f"{EXECUTOR}='uni'", f"{ROLLOUT}.tensor_model_parallel_size is 2", "set mp"],
    ),
    (f"{ROLLOUT}.data_parallel_size=2", [f"{ROLLOUT}.data_parallel_size=2", "groups of 2"]),
    (
        f"trainer.nnodes=2 trainer.n_gpus_per_node=3 data.train_batch_size=6 {ROLLOUT}.tensor_model_parallel_size=2",
        [f"{ROLLOUT}.tensor_model_parallel_size=2", "groups of 2 must lie within a node's 3 ranks"],
    ),
    (f"{ROLLOUT}.expert_parallel_size=2", [f"{ROLLOUT}.expert_parallel_size=2", "or none; set it to 1"]),
    (
        f"trainer.n_gpus_per_node=4 {ROLLOUT}.tensor_model_parallel_size=4 {ROLLOUT}.expert_parallel_size=2",
        [f"{ROLLOUT}.expert_parallel_size=2", "set it to 4 or 1"],
    ),
    (
        f"{ROLLOUT}.log_prob_use_dynamic_bsz=False",
        [f"{ROLLOUT}.log_prob_use_dynamic_bsz=False", f"{ACTOR}.use_dynamic_bsz", "set it to True"],
    ),
    (
        "trainer.n_gpus_per_node=2 ray_kwargs.ray_init.num_gpus=1",
        ["trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=1", "would wait"],
    ),
    (
        f"{ROLLOUT}.max_num_batched_tokens=32 {ROLLOUT}.max_num_seqs=8",
        [f"{ROLLOUT}.max_num_batched_tokens=32", "at least 64", "a whole prompt"],
    ),
    (f"{ROLLOUT}.max_num_batched_tokens=100", [f"{ROLLOUT}.max_num_batched_tokens=100", "at least 128"]),
    (f"{QUEUE}=15", [f"{QUEUE}=15", "a batch has 16 responses"]),
    (f"{QUEUE}=19", [f"{QUEUE}=19", "4 held-out prompts with 5 answers each make 20"]),
    ("algorithm.dpo_beta=end:0.01", ["algorithm.dpo_beta='end:0.01'", "quotes"]),
    (
        "algorithm.filter_groups.enable=True algorithm.missing_eos_penalty=1",
        ["algorithm.missing_eos_penalty=1", "algorithm.filter_groups.enable=True", "set None"],
    ),
    (
        "algorithm.filter_groups.enable=True algorithm.dpo_min_margin=0.1",
        ["algorithm.dpo_min_margin=0.1", "algorithm.filter_groups.enable=True", "set 0"],
    ),
    (
        f"algorithm.filter_groups.enable=True {SCORED_BY_REFERENCE}",
        ["algorithm.filter_groups.enable=True: which prompts tie", SCORED_BY_REFERENCE, "too late to replace them"],
    ),
    (
        f"actor_rollout_ref.model.lora_rank=8 trainer.ref_update_freq=0 {SCORED_BY_REFERENCE}",
        [SCORED_BY_REFERENCE, "with LoRA", "lora_rank=8", "no second model"],
    ),
    (
        f"{EXTERNAL}=no_such_module algorithm.dpo_loss_type=mine",  # which the module may register
        [f"{EXTERNAL}='no_such_module': cannot be imported (ModuleNotFoundError: ", "PYTHONPATH"],
    ),
    (
        f"trainer.rollout_sync_freq=4 {ROLLOUT}.free_cache_engine=False trainer.save_freq=6 trainer.test_freq=4",
        ["trainer.save_freq=6", "a resumed run", "trainer.rollout_sync_freq=4", "trainer.test_freq"],
    ),
    ("trainer.resume_mode=resume_path", ["trainer.resume_from_path=None", "global_step_N"]),
    ("trainer.resume_mode=resume_path trainer.resume_from_path=/absent/global_step_1", ["trainer.resume_from_path="]),
    (
        "+ray_kwargs.ray_init._temp_dir=/scratch/me",
        ["ray_kwargs.ray_init._temp_dir='/scratch/me'", "take it out", "TMPDIR"],
    ),
    (
        "trainer.default_local_dir=/dev/null/run",
        ["trainer.default_local_dir='/dev/null/run'", "/dev/null is no folder"],
    ),
    (
        "trainer.default_local_dir=/proc/run",
        ["trainer.default_local_dir='/proc/run'", "nothing can be written in /proc"],
    ),
]


@pytest.mark.parametrize(("overrides", "words"), BAD)
def test_settings_that_do_not_fit_are_refused(run, overrides, words):
    message = run.refusal(*overrides.split())
    assert "\n" not in message, "one fault brings no other"
    assert [word for word in words if word not in message] == [], message


def test_a_logger_whose_package_is_missing(run, monkeypatch):
    monkeypatch.setattr(around_the_run, "find_spec", lambda package: None)
    message = run.refusal("trainer.logger=[file,wandb]")
    assert message.startswith("trainer.logger=['file', 'wandb']") and "package wandb is not installed" in message
    run.check("trainer.logger=[file,console]")


@pytest.mark.parametrize(
    "overrides",
    [
        f"{ACTOR}.strategy=fsdp actor_rollout_ref.ref.fsdp_config.param_offload=True trainer.ref_update_freq=0",
        "actor_rollout_ref.ref.fsdp_config.param_offload=True",  # FSDP2
        "data.gen_batch_size=2",
        "data.train_max_samples=4",
        f"{ROLLOUT}.max_num_batched_tokens=32 {ROLLOUT}.max_num_seqs=8 {ROLLOUT}.enable_chunked_prefill=True",
        f"{ROLLOUT}.val_kwargs.do_sample=False {ROLLOUT}.val_kwargs.temperature=0",
        f"{QUEUE}=null",
        "trainer.resume_mode=force",
        "algorithm.filter_groups.enable=True",
        f"trainer.rollout_sync_freq=4 {ROLLOUT}.free_cache_engine=False trainer.save_freq=8 trainer.test_freq=-1",
        f"trainer.rollout_sync_freq=4 {ROLLOUT}.free_cache_engine=False trainer.save_freq=6 trainer.test_freq=3",
        f"trainer.rollout_sync_freq=4 {ROLLOUT}.free_cache_engine=False trainer.save_freq=-1",
        "trainer.logger=console",
        "trainer.n_gpus_per_node=2",
        "trainer.n_gpus_per_node=2 actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        f"trainer.n_gpus_per_node=2 {ROLLOUT}.tensor_model_parallel_size=2 {ROLLOUT}.expert_parallel_size=2",
        "trainer.default_local_dir=outputs/new/run",
    ],
)
def test_settings_that_fit_pass(run, overrides):
    run.check(*overrides.split())


OWN_LOSS = """from recipe.spin.core_algos import register_loss

@register_loss("mine")
def mine(pairs):
    return -pairs.beta * pairs.h
"""


def test_a_loss_of_ones_own_is_known_by_its_module(run, tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    assert "loss_type (algorithm.dpo_loss_type) is 'mine': choose from" in run.refusal("algorithm.dpo_loss_type=mine")
    try:
        run.check("algorithm.dpo_loss_type=mine", f"{EXTERNAL}=my_losses")
    finally:
        LOSSES.pop("mine", None)
        sys.modules.pop("my_losses", None)


def test_a_module_of_the_users_is_left_to_verl_where_no_loss_needs_it(run):
    """It may want what this machine lacks, a cluster's head without a GPU for one."""
    run.check(
        f"{EXTERNAL}=no_such_module", "algorithm.dpo_loss_type=[sigmoid,sft]", "algorithm.dpo_loss_weights=[1,0.2]"
    )


def test_an_evaluation_needs_a_folder_without_a_training_run(run, tmp_path):
    """Its summary would mark that run as finished."""
    asked = ("trainer.val_only=True", f"trainer.default_local_dir={tmp_path}")
    run.check(*asked)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ConfigError, match=f"trainer.val_only=True.*{tmp_path}.*RUN_DIR.*MODEL_PATH"):
        run.check(*asked)
    run.check(asked[1], "trainer.resume_mode=force")


def test_an_evaluation_by_a_judge_alone_would_compare_answers_with_themselves(run):
    asked = ["trainer.val_only=True", "algorithm.preference_source=judge", "algorithm.judge.servers=[policy]"]
    asked += ["algorithm.judge.max_tokens=16", "actor_rollout_ref.rollout.max_model_len=512"]
    asked += ["actor_rollout_ref.rollout.max_num_batched_tokens=512"]
    run.check(*asked)
    message = run.refusal(*asked, "reward.custom_reward_function.path=null")
    assert message.startswith("trainer.val_only=True: ") and "REWARD_PATH" in message


SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "VLLM_API_KEY", "HF_HUB_TOKEN", "JUDGE_PASSWORD", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("name", [*SECRETS, "TOKEN", "my_api_key"])
def test_a_secret_among_rays_variables_is_refused(run, name, nodes):
    variable = f"ray_kwargs.ray_init.runtime_env.env_vars.{name}"
    message = run.refusal(f"trainer.nnodes={nodes}", f"+{variable}=s3cret")
    assert message.startswith(f"{variable}: Ray prints") and "before `ray start`" in message
    assert "s3cret" not in message


def test_a_key_to_a_judge_is_a_secret_whatever_it_is_called(run):
    variable = "ray_kwargs.ray_init.runtime_env.env_vars.VLLM_JUDGE"
    run.check(f"+{variable}=s3cret", "algorithm.judge.api_key_env=null")
    message = run.refusal(f"+{variable}=s3cret", "algorithm.judge.api_key_env=VLLM_JUDGE")
    assert message.startswith(f"{variable}: Ray prints") and "s3cret" not in message


def test_a_proxys_password_is_refused(run):
    message = run.refusal("+trainer.wandb_proxy='http://me:s3cret@proxy:80'")
    assert message.startswith("trainer.wandb_proxy holds a password") and "WANDB_HTTPS_PROXY" in message
    assert "s3cret" not in message
    run.check("+trainer.wandb_proxy='http://proxy:80'")
