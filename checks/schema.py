"""The settings as a typed schema: the recipe's own keys, and those of verl's that the recipe relies on.

A field with a description is in the README's table, which `python -m recipe.spin.checks.schema` prints; its default is
that of the GPU profile as composed. kinds.py has what the schema is made of; what ties keys together stands in rules/.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from recipe.spin.checks.kinds import (
    Count,
    Files,
    Loggers,
    LoraRank,
    NotNegative,
    Positive,
    Precision,
    RolloutPrecision,
    Samples,
    Section,
    Share,
    Text,
    TopK,
    TopP,
    Whole,
    is_section,
    own,
    rule_of,
    unused,
    verl,
)
from recipe.spin.common.settings import ConfigError, Settings
from recipe.spin.core_algos import PAIRINGS, TIE_POLICIES
from recipe.spin.losses import F_DIVERGENCES


class FilterGroups(Section):
    enable: bool = own(
        False,
        "dynamic sampling: replace prompts whose responses all score the same; the run stops when "
        "`algorithm.filter_groups.max_num_gen_batches` (10) batches do not fill one",
    )
    max_num_gen_batches: int


class Judge(Section):
    servers: Annotated[list[Text], Field(min_length=1)] = own(
        ["policy"],
        "OpenAI-compatible servers, each a judge; `policy` is the policy's own, `reference` the same with the "
        "reference's weights ([docs/preferences.md](docs/preferences.md))",
    )
    models: Text | list[Text] | None = own(None, "the model to ask for, one or a name a server; null: the first served")
    api_key_env: Text | list[Text | None] | None = own(
        "OPENAI_API_KEY", "the environment variable that holds the servers' key, one or one a server; null sends none"
    )
    prompt: Text = own(None, "a text file that asks the question", shown="preferences/judge_prompt.txt")
    comparisons: Literal["all", "tournament"] = own("all", "each response meets each, or a knock-out `tournament`")
    temperature: NotNegative = own(0.0, "at which judges answer; policy and reference always at 0")
    max_tokens: Count = own(512, "of an answer")
    extra_body: dict | None = own(
        None, "what a server is asked with besides, or in place; `null` in it removes a parameter"
    )
    concurrency: Count = own(64, "questions under way at a time")
    retries: Whole = own(12, "tries after a failed one")
    timeout_s: Positive = own(60, "seconds for an answer, each try by itself")
    step_timeout_s: Positive | None = own(
        None, "seconds from a step's first question to its last answer, in each process that answers prompts"
    )
    max_unreadable: Share = own(
        0.2, "share of the latest answers, 100 or more, that may hold no verdict before the run stops"
    )


class RolloutCorrection(Section):
    rollout_is: unused(None)
    rollout_is_threshold: unused(2.0)
    rollout_rs: unused(None)
    rollout_rs_threshold: unused(None)
    rollout_is_batch_normalize: unused(False)
    bypass_mode: unused(False)
    loss_type: unused("ppo_clip")


class KLControl(Section):
    type: unused("fixed")
    kl_coef: unused(0.001)
    horizon: unused(10000)
    target_kl: unused(0.1)


class PFPPO(Section):
    reweight_method: unused("pow")
    weight_pow: unused(2.0)


class Algorithm(Section):
    preference_source: Text = own(
        "reward",
        "or `judge`, `self_play` (the data's responses against the opponent's), or a class of your own as "
        "`module:Class` ([docs/preferences.md](docs/preferences.md))",
    )
    judge: Judge
    # Numbers, names, lists and schedules; core_algos says which
    dpo_beta: Any = own(
        0.1,
        "pull towards the reference; a number, a schedule, `'algorithm.dpo_beta={schedule:linear,start:0.1,end:0.01}'` "
        "(or `cosine`), or a list by epoch, `'algorithm.dpo_beta=[0.1,0.05]'`; quoted, as shells read the brackets",
    )
    dpo_loss_type: Any = own("sigmoid", "a loss or a list of losses ([docs/losses.md](docs/losses.md))")
    dpo_loss_weights: Any = own(None, "weights of the losses in a list")
    dpo_label_smoothing: float = own(0.0, "share of preferences believed to be wrong")
    dpo_reference_free: bool = own(False, "leave the reference out of the loss")
    dpo_average_log_prob: bool = own(False, "mean instead of sum of token log-probs")
    dpo_simpo_gamma: NotNegative = own(0.5, "the margin of the loss `simpo`")
    dpo_dpop_lambda: NotNegative = own(50.0, "what the loss `dpop` weighs lost likelihood with")
    dpo_discopop_tau: Positive = own(
        0.2, "of the loss `discopop`, from 0 to 1; TRL's 0.05 [does not learn here](docs/losses.md)"
    )
    dpo_length_penalty: NotNegative = own(0.0, "R-DPO: reward that each token of a response costs")
    dpo_ld_alpha: Share | None = own(None, "LD-DPO: weight of the tokens by which one response is longer")
    dpo_use_weighting: bool = own(False, "WPO: weigh pairs by how likely the policy would be to give them")
    dpo_f_divergence_type: Literal[F_DIVERGENCES] = own(
        "reverse_kl", "or `forward_kl`, `js_divergence`, `alpha_divergence`: what keeps the policy near the reference"
    )
    dpo_f_alpha_divergence_coef: float = own(0.5, "of `alpha_divergence`: from 0 (forward_kl) to 1 (reverse_kl)")
    dpo_pairing: Literal[PAIRINGS] = own("best_worst", "or `random`, or `all` pairs of a prompt's responses")
    dpo_tie_policy: Literal[TIE_POLICIES] = own(
        "drop", "equal scores give no pair; `first` prefers the first response to the last"
    )
    dpo_min_margin: NotNegative = own(0.0, "scores closer than this are equal")
    filter_groups: FilterGroups
    missing_eos_penalty: NotNegative | None = own(None, "taken off the score of a response without an end token")
    reward_error: Literal["raise", "skip"] = own(
        "raise",
        "a reward that fails stops the run; `skip` leaves the response out ([docs/faults.md](docs/faults.md))",
    )
    reward_timeout_s: Positive = own(300, "seconds without any score after which the reward has failed")
    adv_estimator: unused("gae")
    gamma: unused(1.0)
    lam: unused(1.0)
    use_kl_in_reward: unused(False)
    kl_penalty: unused("kl")
    kl_ctrl: KLControl
    norm_adv_by_std_in_grpo: unused(True)
    use_pf_ppo: unused(False)
    pf_ppo: PFPPO
    rollout_correction: RolloutCorrection


class ColocateAsync(Section):
    num_warmup_batches: NotNegative


class Sampler(Section):
    max_off_policy_threshold: Count | None
    max_off_policy_strategy: Literal["drop", "wait"]
    sync_refill_failed_groups: Annotated[
        Literal[False],
        verl(
            "a run whose prompts all fail would ask for others for ever; algorithm.reward_error=skip leaves out "
            "responses whose reward fails"
        ),
    ]


class V1(Section):
    trainer_mode: Literal["sync", "colocate_async"] = verl(
        "sync, or colocate_async, which answers prompts ahead of the steps; separate_async, with GPUs that only "
        "generate, is not there yet (docs/asynchronous.md says what it lacks)"
    )
    colocate_async: ColocateAsync
    sampler: Sampler


class Trainer(Section):
    ref_update_freq: int = own(5, "steps between refreshes of the reference; 0: it stays as loaded")
    ref_update_alpha: TopP = own(
        1.0,
        "share of the actor in a refreshed reference; below 1 (TR-DPO's soft update) takes "
        "`actor_rollout_ref.ref.fsdp_config.model_dtype=fp32`",
    )
    rollout_sync_freq: Count = own(
        1, "steps between which vLLM keeps its weights ([docs/asynchronous.md](docs/asynchronous.md))"
    )
    max_failed_validation: Share = own(0.0, "share of the held-out answers that may fail before the run stops")
    max_skipped_steps: Count = own(
        3, "optimizer steps in a row without a finite gradient after which the run stops; each is skipped"
    )
    max_steps_without_pairs: Count = own(20, "steps in a row in which all responses tie after which the run stops")
    stall_timeout_s: Positive | None = own(
        7200, "seconds in which no step, no phase of one and no answer came to its end after which the run stops"
    )
    check_memory: bool = own(True, "refuse a run for which memory or disk do not suffice by an estimate")
    use_v1: Literal[True]
    v1: V1
    device: Literal["cuda", "cpu"]
    nnodes: Count
    n_gpus_per_node: Count
    total_epochs: Count
    total_training_steps: Count | None
    save_freq: int
    test_freq: int
    val_before_train: bool
    val_only: bool
    max_actor_ckpt_to_keep: Whole | None = verl("null or 0 keeps all")
    resume_mode: Literal["auto", "disable", "resume_path", "force"]
    resume_from_path: Text | None
    default_local_dir: Text
    logger: Loggers
    critic_warmup: unused(0)
    balance_batch: unused(True)
    esi_redundant_time: unused(0)


class Data(Section):
    train_files: Files = verl("name a file of prompts, or a list of files")
    val_files: Files = verl("name a file of prompts, or a list of files")
    train_max_samples: Samples
    val_max_samples: Samples
    train_batch_size: Count
    gen_batch_size: Count | None
    val_batch_size: Count | None
    max_prompt_length: Count
    max_response_length: Count
    filter_overlong_prompts: bool
    prompt_key: Text
    image_key: Text
    video_key: Text
    audio_key: Text
    reward_fn_key: Annotated[
        unused("data_source"), verl("verl's reward managers read data_source alone; give the column that name")
    ]
    shuffle: bool
    seed: Whole | None
    dataloader_num_workers: Whole
    apply_chat_template_kwargs: dict


class Model(Section):
    path: Text = verl("name a model: a folder, or a hub name such as a/b")
    tokenizer_path: Text | None
    custom_chat_template: Text | None
    trust_remote_code: bool
    override_config: dict
    external_lib: Text | None
    use_remove_padding: bool
    use_fused_kernels: Annotated[
        unused(False), verl("verl's fused forward gives no logits, of which SPIN makes log-probs; set it to False")
    ]
    enable_gradient_checkpointing: bool
    enable_activation_offload: bool
    lora_rank: LoraRank = own(
        0, "with LoRA the reference is the base model, the adapter off; takes `trainer.ref_update_freq=0`"
    )
    lora_alpha: Count
    lora_adapter_path: Text | None


class Optim(Section):
    lr: NotNegative
    clip_grad: Positive = verl("gradients are scaled down to this norm; a negative one would turn them round")
    weight_decay: NotNegative
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    lr_warmup_steps: int | None
    lr_warmup_steps_ratio: Share
    lr_scheduler_type: Literal["constant", "cosine"]


class Engine(Section):
    ulysses_sequence_parallel_size: Count
    fsdp_size: int
    model_dtype: Precision
    mixed_precision: dict | None
    param_offload: bool
    optimizer_offload: bool
    offload_policy: bool
    use_no_sync_for_gradient_accumulation: bool


Contents = list[Literal["model", "optimizer", "extra", "hf_model"]]


class Checkpoint(Section):
    save_contents: Contents
    load_contents: Contents


class PolicyLoss(Section):
    loss_mode: unused("vanilla")
    clip_cov_ratio: unused(0.0002)
    clip_cov_lb: unused(1.0)
    clip_cov_ub: unused(5.0)
    kl_cov_ratio: unused(0.0002)
    ppo_kl_coef: unused(0.1)
    dro_beta: unused(None)


class Actor(Section):
    strategy: Literal["fsdp2", "fsdp"] = verl("choose fsdp2 or fsdp")
    ppo_mini_batch_size: Count = own(None, "prompts per optimizer step", shown="train_batch_size")
    ppo_micro_batch_size: unused(None)
    ppo_micro_batch_size_per_gpu: Count
    ppo_max_token_len_per_gpu: Count
    ppo_epochs: Count
    use_dynamic_bsz: bool
    shuffle: Literal[False] = verl("prompts are trained on in the order of the batch; set it to False")
    calculate_entropy: bool
    optim: Optim
    fsdp_config: Engine
    checkpoint: Checkpoint
    grad_clip: Annotated[unused(1.0), verl("verl's FSDP engine does not read it; set optim.clip_grad")]
    use_kl_loss: unused(False)
    kl_loss_coef: unused(0.001)
    kl_loss_type: unused("low_var_kl")
    tau_pos: unused(1.0)
    tau_neg: unused(1.05)
    entropy_coeff: unused(0)
    loss_agg_mode: unused("token-mean")
    loss_scale_factor: unused(None)
    clip_ratio: unused(0.2)
    clip_ratio_low: unused(0.2)
    clip_ratio_high: unused(0.2)
    clip_ratio_c: unused(3.0)
    policy_loss: PolicyLoss
    calculate_sum_pi_squared: unused(False)
    use_prefix_grouper: Annotated[
        unused(False), verl("verl's v1 trainer does not read it; actor_rollout_ref.share_prompt is what it asks for")
    ]
    data_loader_seed: Annotated[
        unused(42), verl("prompts are trained on in the order of the batch; set it to 42, and data.seed for another")
    ]
    freeze_vision_tower: Annotated[unused(False), verl("verl's FSDP engine does not read it; set it to False")]


class Reference(Section):
    strategy: Text
    log_prob_micro_batch_size: unused(None)
    log_prob_micro_batch_size_per_gpu: Count
    log_prob_max_token_len_per_gpu: Count
    log_prob_use_dynamic_bsz: bool
    fsdp_config: Engine


OneStage = Annotated[
    Literal[1], verl("verl's vLLM has no pipeline of ranks; set it to 1, and raise tensor_model_parallel_size")
]


class Agent(Section):
    num_workers: Count


class CheckpointEngine(Section):
    update_weights_bucket_megabytes: Count


class ValKwargs(Section):
    n: Count
    temperature: NotNegative
    top_p: TopP
    top_k: TopK
    do_sample: bool


class Disaggregation(Section):
    enabled: unused(False)


class Rollout(Section):
    name: Literal["vllm"] = verl("SPIN generates with vllm")
    mode: Literal["async"]
    n: Count = own(
        8,
        "responses per prompt (1 with self-play; 4 in the CPU profile)",
        remedy="a pair needs at least 2 responses to a prompt, with self-play 1",
    )
    temperature: Positive = verl("responses must be sampled to differ; use a temperature above 0, for example 1.0")
    do_sample: Literal[True] = verl("responses must be sampled to differ; set it to True")
    top_p: TopP
    top_k: TopK
    seed: Whole
    dtype: RolloutPrecision
    tensor_model_parallel_size: Count
    data_parallel_size: Count
    pipeline_model_parallel_size: OneStage
    expert_parallel_size: Count
    gpu_memory_utilization: TopP
    prompt_length: Any  # the data's, which rules/generation.py sees to
    response_length: Any
    max_model_len: Count | None
    max_num_seqs: Count
    max_num_batched_tokens: Count
    enable_chunked_prefill: bool
    free_cache_engine: bool
    enforce_eager: bool
    log_prob_micro_batch_size: unused(None)
    log_prob_micro_batch_size_per_gpu: Count | None
    log_prob_max_token_len_per_gpu: Count | None
    log_prob_use_dynamic_bsz: bool
    calculate_log_probs: Literal[True] = verl("a step reads vLLM's log-probs of the responses; set it to True")
    over_sample_rate: unused(0)
    moe_load_balance_metrics_interval: unused(0)
    agent: Agent
    checkpoint_engine: CheckpointEngine
    disaggregation: Disaggregation
    val_kwargs: ValKwargs


class ActorRolloutRef(Section):
    seed_responses: bool = own(
        False, "one seed gives one run: each response is sampled by a seed of its own (True in the CPU profile)"
    )
    share_prompt: bool = own(
        True, "compute a prompt once for all its responses; False gives each response a copy of it"
    )
    keep_products: bool = own(
        False,
        "with `actor_rollout_ref.model.enable_gradient_checkpointing` keep the results of matrix products (on a CPU of "
        "attention too) and recompute the rest only (True in the CPU profile)",
    )
    nccl_timeout: Count = own(
        3600, "seconds that ranks wait for each other, as while one of them writes a whole model at a checkpoint"
    )
    model: Model
    rollout: Rollout
    actor: Actor
    ref: Reference


class Critic(Section):
    enable: unused(False)


class Distillation(Section):
    enabled: unused(False)


class RewardFunction(Section):
    path: Text | None
    name: Text
    reward_kwargs: dict = {}


class RewardRollout(Section):
    name: str  # ??? in verl's own config, where no reward model is served
    dtype: RolloutPrecision
    tensor_model_parallel_size: Count
    data_parallel_size: Count
    pipeline_model_parallel_size: OneStage


class RewardModel(Section):
    enable: bool
    enable_resource_pool: bool
    nnodes: Whole
    n_gpus_per_node: Whole
    model_path: Text | None
    rollout: RewardRollout


class Reward(Section):
    num_workers: Count
    custom_reward_function: RewardFunction
    reward_model: RewardModel


class SimpleStorage(Section):
    num_data_storage_units: Count
    total_storage_size: Count | None


class Backend(Section):
    storage_backend: Literal["SimpleStorage"] = verl(
        "other stores serve all runs that reach them, under keys that runs share; set it to SimpleStorage"
    )
    SimpleStorage: SimpleStorage


class TransferQueue(Section):
    enable: Literal[True] = verl("verl's v1 trainer moves data through it")
    backend: Backend


class RuntimeEnv(Section):
    env_vars: dict | None = None


class RayInit(Section):
    num_cpus: Count | None
    num_gpus: Whole | None = None
    object_store_memory: Count | None = None
    runtime_env: RuntimeEnv


class RayKwargs(Section):
    ray_init: RayInit


class Config(Section):
    """The whole config."""

    algorithm: Algorithm
    trainer: Trainer
    actor_rollout_ref: ActorRolloutRef
    data: Data
    reward: Reward
    critic: Critic
    distillation: Distillation
    transfer_queue: TransferQueue
    ray_kwargs: RayKwargs


def check_kinds(settings: Settings) -> None:
    """Notes every setting of the wrong type or out of its range.

    Raises:
        ConfigError: with all of them, when a declared key was taken out: other checks count on it.
    """
    try:
        Config.model_validate(settings.values)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        for fault in faults:
            key, rule = _declared(fault["loc"])
            absent = "give it, as a run reads it" if fault["type"] == "missing" else ""
            settings.require(False, key, "; ".join(filter(None, (absent, rule))))
        if any(fault["type"] == "missing" for fault in faults):
            raise ConfigError(*settings.faults) from error


def _declared(location: tuple[str | int, ...]) -> tuple[str, str]:
    """Key and rule of the declared field at or above a place in the config."""
    section, path = Config, []
    for name in location:
        path.append(name)
        field = section.model_fields[name]
        if not is_section(field):
            break
        rule = "must be a section of keys"
        section = field.annotation
    else:
        return ".".join(path), rule
    return ".".join(path), rule_of(section, name, field)


def described(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The keys that the README describes, in the order of the declarations."""
    for name, field in section.model_fields.items():
        if field.description:
            yield prefix + name, field
        elif is_section(field):
            yield from described(field.annotation, f"{prefix}{name}.")


def readme_table() -> str:
    """The README's table of settings."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, field in described():
        default, shown = field.json_schema_extra["default"], field.json_schema_extra["shown"]
        rows.append(f"| `{key}` | {shown or ('null' if default is None else default)} | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(readme_table())  # noqa: T201 - the command's output
