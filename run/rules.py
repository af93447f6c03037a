"""The rules that tie settings together; what a setting may be by itself stands in schema.py."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch

from recipe.spin.common.settings import ConfigError, Settings, Unusable
from recipe.spin.core_algos import LOSSES, LossOptions, beta_at, check_loss_settings
from recipe.spin.preferences.source import PreferenceSource, source_class
from recipe.spin.run import cluster
from recipe.spin.run.schema import Precision
from recipe.spin.run_folder import TRACKER, nearest_existing

ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
MODEL, SHARE_PROMPT = "actor_rollout_ref.model", "actor_rollout_ref.share_prompt"
MODE = "trainer.v1.trainer_mode"
ULYSSES = "fsdp_config.ulysses_sequence_parallel_size"
FP32 = ("fp32", "float32", "32", 32)  # verl's names for it
FP16 = ("fp16", "float16")
LOSS_OPTIONS = [field.name for field in fields(LossOptions)]
# Packages that verl's loggers import
LOGGER_PACKAGES = {name: name for name in ("wandb", "tensorboard", "mlflow", "swanlab", "clearml", "trackio")}


def is_self_play(settings: Settings) -> bool:
    return settings["algorithm.preference_source"] == "self_play"


def scores_groups(settings: Settings) -> bool:
    """Whether the source scores a prompt's responses itself, so that training takes no reward."""
    return source_of(settings).scores_groups()


def ranks(settings: Settings) -> int:
    return settings["trainer.nnodes"] * settings["trainer.n_gpus_per_node"]


# ---- Preferences and loss --------------------------------------------------------------------------------------------
def a_source_prefers(settings: Settings) -> None:
    name = settings["algorithm.preference_source"]
    try:
        source = source_class(name)
    except ValueError as error:
        raise ConfigError(f"algorithm.preference_source={name!r}: {error}") from error
    if not settings.faults:  # all kinds are right, and a source may look at any setting
        try:
            source.check(settings.config)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def source_of(settings: Settings) -> type[PreferenceSource]:
    """The class that prefers."""
    try:
        return source_class(settings["algorithm.preference_source"])
    except ValueError as error:  # a_source_prefers says which
        raise Unusable("algorithm.preference_source") from error


def _sound_source(settings: Settings) -> type[PreferenceSource]:
    """The source where it may be asked about `algorithm`, whose settings are all of the right kind."""
    source = source_of(settings)
    if not settings.is_sound("algorithm"):
        raise Unusable("algorithm")
    return source


def _takes_reference(settings: Settings) -> bool:
    return _sound_source(settings).takes_reference(settings.config)


def _scores_with_reference(settings: Settings) -> bool:
    return _sound_source(settings).scores_with_reference(settings.config)


def a_pair_has_two_responses(settings: Settings) -> None:
    n = settings[f"{ROLLOUT}.n"]
    settings.require(n >= 2 or is_self_play(settings), f"{ROLLOUT}.n", "a pair needs at least 2 responses to a prompt")


def prompts_are_filtered_by_what_pairs_are_made_of(settings: Settings) -> None:
    """Dynamic sampling compares the rewards as they come, before anything is taken off or called equal."""
    key, algorithm = "algorithm.filter_groups.enable", "algorithm"
    if not settings[key]:
        return
    settings.require(
        not is_self_play(settings),
        key,
        "self-play prefers the data's responses and has no rewards to compare; set False",
    )
    for name, off in (("missing_eos_penalty", None), ("dpo_min_margin", 0.0)):
        settings.require(
            not settings[f"{algorithm}.{name}"],
            f"{algorithm}.{name}",
            f"{key}=True tells prompts apart by the rewards without it, and would keep and replace others than those "
            f"that give pairs; set {off}, or let the reward itself do that",
        )
    settings.require(
        not _scores_with_reference(settings),
        key,
        f"which prompts tie is known only when algorithm.preference_source={settings['algorithm.preference_source']} "
        "has scored all of a step's responses with the reference's weights, too late to replace them; set False",
    )


def beta_is_a_number_or_a_schedule(settings: Settings) -> None:
    beta = settings["algorithm.dpo_beta"]
    if isinstance(beta, str) and ":" in beta:
        raise ConfigError(
            f"algorithm.dpo_beta={beta!r}: the shell took a schedule apart; put the argument in quotes, "
            "'algorithm.dpo_beta={schedule:linear,start:0.1,end:0.01}'"
        )
    try:
        beta_at(beta, step=1, total_steps=1, steps_per_epoch=1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"algorithm.dpo_*: {error}") from error


def the_users_module_is_imported(settings: Settings) -> None:
    """Where a loss is asked for that it may register; verl imports it too late for the rules, in its own processes.

    Else it is left to them: it may want a GPU, which a cluster's head has not.
    """
    key, asked = f"{MODEL}.external_lib", settings["algorithm.dpo_loss_type"]
    if settings[key] is None or all(str(name) in LOSSES for name in (asked if isinstance(asked, list) else [asked])):
        return
    try:
        import_module(settings[key])
    except Exception as error:  # a module is a program, which may raise what it likes
        fault = f"{type(error).__name__}: {error}"
        settings.require(False, key, f"cannot be imported ({fault}); correct it, and let PYTHONPATH lead to it")


def losses_are_known(settings: Settings) -> None:
    settings[f"{MODEL}.external_lib"]  # leaves, where a module that may register some has a fault
    try:
        losses = check_loss_settings(
            settings["algorithm.dpo_loss_type"],
            beta=1.0,
            label_smoothing=settings["algorithm.dpo_label_smoothing"],
            loss_weights=settings["algorithm.dpo_loss_weights"],
            average_log_prob=settings["algorithm.dpo_average_log_prob"],
            reference_free=settings["algorithm.dpo_reference_free"],
            options=LossOptions.of({f"dpo_{name}": settings[f"algorithm.dpo_{name}"] for name in LOSS_OPTIONS}),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"algorithm.dpo_*: {error}") from error
    if not any(LOSSES[name].batch_coupled for name, _ in losses):
        return
    if settings[f"{ACTOR}.{ULYSSES}"] > 1:
        raise ConfigError("algorithm.dpo_loss_type: aot and aot_unpaired need ulysses_sequence_parallel_size=1")
    if settings["algorithm.dpo_pairing"] == "all":
        raise ConfigError(
            "algorithm.dpo_pairing=all weighs pairs, which a loss that sorts them cannot; use best_worst or random"
        )
    n = settings[f"{ROLLOUT}.n"]
    if is_self_play(settings) and n > 1:
        raise ConfigError(
            f"{ROLLOUT}.n={n} with algorithm.preference_source=self_play weighs a prompt's {n} pairs, which a loss "
            f"that sorts them (algorithm.dpo_loss_type: aot, aot_unpaired) cannot; set {ROLLOUT}.n=1"
        )


# ---- Reference -------------------------------------------------------------------------------------------------------
def lora_has_no_second_model(settings: Settings) -> None:
    rank = settings[f"{MODEL}.lora_rank"]
    if rank == 0 and not settings[f"{MODEL}.lora_adapter_path"]:
        return
    if _takes_reference(settings):
        raise ConfigError(
            f"algorithm.preference_source={settings['algorithm.preference_source']} with LoRA ({MODEL}.lora_rank="
            f"{rank}): vLLM is to take the reference's weights, and with LoRA there is no second model to send; train "
            "without LoRA, or where it is to judge serve the base model and give its address (algorithm.judge.servers)"
        )
    frequency = settings["trainer.ref_update_freq"]
    if frequency > 0:
        raise ConfigError(
            f"trainer.ref_update_freq={frequency} with LoRA ({MODEL}.lora_rank={rank}): the reference is the base "
            "model with the adapter off and cannot be refreshed; set trainer.ref_update_freq=0 or train without LoRA"
        )


def adapters_are_gathered_alone(settings: Settings) -> None:
    """verl's way to FSDP1's adapters gathers all there is, and would on every GPU at every push to vLLM."""
    key = f"{ACTOR}.strategy"
    alone = settings[key] != "fsdp" or settings[f"{ROLLOUT}.layered_summon"] or ranks(settings) == 1
    settings.require(
        alone or not settings[f"{MODEL}.lora_rank"] or settings["trainer.device"] != "cuda",
        key,
        f"with LoRA ({MODEL}.lora_rank) FSDP1 gathers the whole model in fp32 on each GPU whenever adapters go to "
        "vLLM; set fsdp2",
    )


def small_steps_need_fp32(settings: Settings) -> None:
    settings.require(
        settings["trainer.ref_update_alpha"] == 1 or settings[f"{REF}.fsdp_config.model_dtype"] == "fp32",
        "trainer.ref_update_alpha",
        f"needs {REF}.fsdp_config.model_dtype=fp32: small steps towards the actor are lost in bf16",
    )


def reference_is_sharded_as_the_actor(settings: Settings) -> None:
    same = f"the reference is copied shard by shard; give {ACTOR}.fsdp_config and {REF}.fsdp_config the same"
    for key, remedy in (
        ("strategy", f"the reference is copied shard by shard and must be sharded as {ACTOR}.strategy says"),
        ("fsdp_config.fsdp_size", same),
    ):
        settings.require(settings[f"{REF}.{key}"] == settings[f"{ACTOR}.{key}"], f"{REF}.{key}", remedy)


def precisions_are_known(settings: Settings) -> None:
    key = f"{ACTOR}.fsdp_config.mixed_precision"
    known = get_args(Precision)
    unknown = [name for name, value in (settings[key] or {}).items() if value not in known]
    settings.require(not unknown, key, f"{', '.join(unknown)} must be one of {', '.join(known)}")


def the_actor_trains_without_fp16(settings: Settings) -> None:
    """verl scales an fp16 loss by a factor that it adapts from step to step, and keeps that in no checkpoint."""
    key = f"{ACTOR}.fsdp_config"
    reason = "fp16 is not supported, as the scale of its gradients is in no checkpoint; use bf16 or fp32"
    settings.require(settings[f"{key}.model_dtype"] not in FP16, f"{key}.model_dtype", reason)
    asked = [name for name, value in (settings[f"{key}.mixed_precision"] or {}).items() if value in FP16]
    settings.require(not asked, f"{key}.mixed_precision", f"{', '.join(asked)}: {reason}")


def shared_prompts_meet_half_precision(settings: Settings) -> None:
    key = f"{ACTOR}.fsdp_config.mixed_precision"
    computed = (settings[key] or {}).get("param_dtype", "bf16")  # verl's default
    settings.require(
        computed not in FP32 or settings["trainer.device"] != "cuda" or not settings[SHARE_PROMPT],
        f"{key}.param_dtype",
        f"attention kernels on a GPU compute in half precision; set bf16, or {SHARE_PROMPT}=False: each response then "
        "gets a copy of the prompt, and the model's own attention",
    )


def reference_holds_what_the_actor_computes_with(settings: Settings) -> None:
    """A refreshed reference then equals the actor to the bit."""
    actor, ref = f"{ACTOR}.fsdp_config", f"{REF}.fsdp_config"
    precision = settings[f"{actor}.mixed_precision"]
    settings.require(
        settings[f"{ref}.mixed_precision"] == precision,
        f"{ref}.mixed_precision",
        f"the reference computes as the actor does; leave it out, and it follows {actor}.mixed_precision",
    )
    computed = (precision or {}).get("param_dtype", "bf16")  # verl's default
    settings.require(
        settings[f"{ref}.model_dtype"] in ("fp32", computed),
        f"{ref}.model_dtype",
        f"the actor computes in {computed}, and the reference must hold the same numbers; use {computed} or fp32",
    )


# ---- Batches ---------------------------------------------------------------------------------------------------------
def batches_divide(settings: Settings) -> None:
    batch = settings["data.train_batch_size"]
    settings.require(
        settings[f"{ACTOR}.ppo_mini_batch_size"] <= batch,
        f"{ACTOR}.ppo_mini_batch_size",
        f"an optimizer step takes its prompts from one batch; at most data.train_batch_size={batch}",
    )
    fetched = settings["data.gen_batch_size"]
    settings.require(
        not fetched or batch % fetched == 0,
        "data.gen_batch_size",
        f"data.train_batch_size={batch} prompts are fetched in whole parts of this size; set a divisor, or null",
    )
    responses, count = batch * settings[f"{ROLLOUT}.n"], ranks(settings)
    settings.require(
        settings[f"{ACTOR}.use_dynamic_bsz"] or responses % count == 0,
        "data.train_batch_size",
        f"without {ACTOR}.use_dynamic_bsz verl wants its {responses} responses to divide over the {count} ranks",
    )


def longest_row(setting: Callable[[str], Any]) -> tuple[int, int, int]:
    """Tokens of the longest prompt with its responses that take part, of those responses, and how many they are."""
    n = setting(f"{ROLLOUT}.n")
    if setting("algorithm.preference_source") == "self_play":
        responses = n + 1  # the data's own
    else:
        responses = n if setting("algorithm.dpo_pairing") == "all" else 2
    answers = responses * setting("data.max_response_length")
    prompts = 1 if setting(SHARE_PROMPT) else responses
    return prompts * setting("data.max_prompt_length") + answers, answers, responses


def a_prompt_with_its_responses_fits_one_micro_batch(settings: Settings) -> None:
    longest, _, responses = longest_row(settings.__getitem__)
    for part, by_tokens, limit in (
        (ACTOR, "use_dynamic_bsz", "ppo_max_token_len_per_gpu"),
        (REF, "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu"),
    ):
        tokens = settings[f"{part}.{limit}"] * settings[f"{part}.{ULYSSES}"]
        settings.require(
            not settings[f"{part}.{by_tokens}"] or longest <= tokens,
            f"{part}.{limit}",
            f"the longest prompt with its {responses} responses has {longest} tokens and must fit into one "
            "micro-batch; raise it or lower data.max_prompt_length or data.max_response_length",
        )


# ---- Ranks -----------------------------------------------------------------------------------------------------------
def ranks_fall_into_groups(settings: Settings) -> None:
    count = ranks(settings)
    settings.require(
        count % settings[f"{ACTOR}.{ULYSSES}"] == 0,
        f"{ACTOR}.{ULYSSES}",
        f"the {count} ranks must fall into groups of that size",
    )
    size = 1
    for key in (f"{ROLLOUT}.tensor_model_parallel_size", f"{ROLLOUT}.data_parallel_size"):
        size *= settings[key]
        settings.require(
            settings[key] == 1 or count % size == 0, key, f"the {count} ranks must fall into groups of {size} for vLLM"
        )


def the_machine_has_the_ranks(settings: Settings) -> None:
    if _joins_a_cluster(settings):
        return  # which is looked at once it is joined
    key, pool = "trainer.n_gpus_per_node", _reward_pool(settings)
    asked = settings[key] + pool
    whom = f"them and the {pool} of the reward model's own pool" if pool else "them"
    if settings["trainer.device"] == "cuda":
        gpus = torch.cuda.device_count()
        remedy = f"this machine shows {gpus} GPUs for {whom}; lower it, or use device=cpu on a machine without GPUs"
        settings.require(asked <= gpus, key, remedy)
    logical = settings["ray_kwargs.ray_init.num_gpus"]
    settings.require(
        logical is None or asked <= logical,
        key,
        f"Ray has ray_kwargs.ray_init.num_gpus={logical} places for {whom}, and the rest would wait; set it to {asked}",
    )


def _joins_a_cluster(settings: Settings) -> bool:
    for key in ("trainer.nnodes", "ray_kwargs.ray_init"):
        settings[key]  # leaves, where it has a fault
    return cluster.joins(settings.config)


def _reward_pool(settings: Settings) -> int:
    """The devices that verl sets aside for a reward model alone."""
    model = "reward.reward_model"
    if not settings[f"{model}.enable_resource_pool"]:
        return 0
    return settings[f"{model}.nnodes"] * settings[f"{model}.n_gpus_per_node"]


def sequence_parallelism_can_work(settings: Settings) -> None:
    """Ulysses cuts sequences over ranks; the recipe's attention and verl's flash attention put them together again."""
    key, size = f"{ACTOR}.{ULYSSES}", settings[f"{ACTOR}.{ULYSSES}"]
    settings.require(
        settings[f"{REF}.{ULYSSES}"] == size,
        f"{REF}.{ULYSSES}",
        f"the reference gets the actor's rows; give it the actor's, {size}",
    )
    if size == 1:
        return
    settings.require(settings["trainer.device"] != "cpu", key, "gloo, which CPUs use, lacks its exchange; set 1")
    attention = settings[f"{MODEL}.override_config"].get("attn_implementation", "flash_attention_2")  # verl's default
    settings.require(
        settings[SHARE_PROMPT] or str(attention).startswith("flash_attention"),
        key,
        f"{attention} would attend within each rank's part of a sequence alone; set {SHARE_PROMPT}=True, or install "
        f"flash-attn and set {MODEL}.override_config.attn_implementation=flash_attention_2",
    )
    settings.require(settings[f"{MODEL}.use_remove_padding"], key, f"needs {MODEL}.use_remove_padding=True")


def activations_wait_in_one_way(settings: Settings) -> None:
    key = f"{MODEL}.enable_activation_offload"
    settings.require(
        not (settings[key] and settings["actor_rollout_ref.keep_products"]),
        key,
        "verl recomputes layers in a way of its own then, which keeps no products; set "
        "actor_rollout_ref.keep_products=False",
    )


def fsdp1_gathers_no_model_on_cpus(settings: Settings) -> None:
    fsdp1 = settings["trainer.device"] == "cpu" and settings[f"{ACTOR}.strategy"] == "fsdp" and ranks(settings) > 1
    settings.require(
        not fsdp1 or "hf_model" not in settings[f"{ACTOR}.checkpoint.save_contents"],
        f"{ACTOR}.checkpoint.save_contents",
        "torch's FSDP1 cannot gather a model over several CPU ranks; leave out hf_model, or use strategy fsdp2",
    )


# ---- Generation ------------------------------------------------------------------------------------------------------
def sequences_fit_vllm(settings: Settings) -> None:
    prompt = settings["data.max_prompt_length"]
    tokens = prompt + settings["data.max_response_length"]
    length = settings[f"{ROLLOUT}.max_model_len"]
    settings.require(
        length is None or length >= tokens,
        f"{ROLLOUT}.max_model_len",
        f"a prompt and its response have up to {tokens} tokens; raise it or lower their lengths in data",
    )
    least = settings[f"{ROLLOUT}.max_num_seqs"]
    if not settings[f"{ROLLOUT}.enable_chunked_prefill"]:
        least = max(least, prompt)
    settings.require(
        settings[f"{ROLLOUT}.max_num_batched_tokens"] >= least,
        f"{ROLLOUT}.max_num_batched_tokens",
        f"vLLM needs at least {least}: a token for each of max_num_seqs sequences and, without "
        "enable_chunked_prefill, a whole prompt of data.max_prompt_length",
    )


def the_queue_holds_a_batch(settings: Settings) -> None:
    """Asynchronous steps leave a part of the batches before them in it."""
    answers = settings["data.train_batch_size"] * settings[f"{ROLLOUT}.n"]
    if settings[MODE] == "colocate_async":
        ahead = math.ceil(settings["trainer.v1.colocate_async.num_warmup_batches"])
        answers += settings["data.train_batch_size"]  # prompts, which a checkpoint holds too
        who = f"batches of {answers} prompts and responses, {ahead} of them ahead of the step, are kept at a time"
        answers *= 1 + ahead
    else:
        who = f"a batch has {answers} responses"
    require_queue(settings, answers, who, "lower data.train_batch_size")


def require_queue(settings: Settings, answers: float, who: str, remedy: str) -> None:
    """Notes a fault when TransferQueue is too small for so many responses at a time."""
    key = "transfer_queue.backend.SimpleStorage.total_storage_size"
    if settings["transfer_queue.backend.storage_backend"] == "SimpleStorage":
        size = settings[key] or math.inf
        settings.require(answers <= size, key, f"{who}, which are kept at once; raise it or {remedy}")


def weights_stay_where_they_are_not_sent(settings: Settings) -> None:
    frequency, key = settings["trainer.rollout_sync_freq"], "trainer.rollout_sync_freq"
    settings.require(
        frequency == 1 or not settings[f"{ROLLOUT}.free_cache_engine"],
        key,
        f"vLLM gives its weights back after every step and needs them anew; set {ROLLOUT}.free_cache_engine=False, "
        "which keeps them and its cache in memory",
    )
    settings.require(
        frequency == 1 or not _takes_reference(settings), key, "vLLM has the reference's weights at times; set 1"
    )
    save, test = settings["trainer.save_freq"], settings["trainer.test_freq"]
    settings.require(
        save <= 0 or save % frequency == 0 or (test > 0 and save % test == 0),
        "trainer.save_freq",
        f"a resumed run begins with the checkpoint's weights in vLLM, which the run that goes on must have too; save "
        f"when they are sent, with a multiple of {key}={frequency} or of trainer.test_freq",
    )


def an_asynchronous_run_shares_its_engine_with_nobody(settings: Settings) -> None:
    """Its requests are under way at every moment, when vLLM would get another's weights or have to give way."""
    if settings[MODE] != "colocate_async":
        return
    settings.require(
        not settings["skip.rollout_tq.enable"],
        "skip.rollout_tq.enable",
        f"it replays whole steps, which {MODE}=colocate_async does not have; set False",
    )
    settings.require(
        not _takes_reference(settings),
        MODE,
        f"with algorithm.preference_source={settings['algorithm.preference_source']} vLLM takes the reference's "
        "weights at times, with responses of the policy half done; set sync",
    )
    model = "reward.reward_model"
    settings.require(
        not settings[f"{model}.enable"] or settings[f"{model}.enable_resource_pool"],
        MODE,
        f"the reward model takes turns with vLLM on its GPUs; give it its own, {model}.enable_resource_pool=True",
    )


def a_reward_model_has_devices(settings: Settings) -> None:
    model, devices = "reward.reward_model", ranks(settings)
    if not settings[f"{model}.enable"]:
        return
    name, pool = f"{model}.rollout.name", settings[f"{model}.enable_resource_pool"]
    settings.require(settings[name] == "vllm", name, "vllm serves it; set vllm")
    if pool:
        for key in (f"{model}.nnodes", f"{model}.n_gpus_per_node"):
            settings.require(settings[key] > 0, key, "the reward model's own pool needs devices; at least 1")
        devices = settings[f"{model}.nnodes"] * settings[f"{model}.n_gpus_per_node"]
    size = 1
    for kind in ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size"):
        key = f"{model}.rollout.{kind}"
        size *= settings[key]
        settings.require(
            settings[key] == 1 or devices % size == 0,
            key,
            f"the reward model's {devices} devices must fall into groups of {size}; lower it, for example to 1",
        )


def a_source_that_scores_is_not_overruled(settings: Settings) -> None:
    """verl writes the scores of a reward model in the trainer's pool over those that a source gave before.

    One that scores with the reference's weights does so later, and the reward model is for held-out answers alone.
    """
    model = "reward.reward_model"
    settings.require(
        not settings[f"{model}.enable"]
        or settings[f"{model}.enable_resource_pool"]
        or not scores_groups(settings)
        or _scores_with_reference(settings),
        f"{model}.enable",
        "in the policy's pool it scores after algorithm.preference_source="
        f"{settings['algorithm.preference_source']} and would decide in its place; set False, or give it its own "
        f"devices, {model}.enable_resource_pool=True",
    )


# ---- Around the run --------------------------------------------------------------------------------------------------
def loggers_are_installed(settings: Settings) -> None:
    names = settings["trainer.logger"]
    for name in [names] if isinstance(names, str) else names:
        package = LOGGER_PACKAGES.get(name)
        settings.require(
            package is None or find_spec(package) is not None,
            "trainer.logger",
            f"the package {package} is not installed; install it or leave {name} out",
        )


def the_run_folder_can_be_written(settings: Settings) -> None:
    key, folder = "trainer.default_local_dir", Path(settings["trainer.default_local_dir"]).absolute()
    existing = nearest_existing(folder)
    settings.require(existing.is_dir(), key, f"{existing} is no folder; name another folder (RUN_DIR)")
    if existing.is_dir():
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            settings.require(False, key, f"nothing can be written in {existing} ({error}); name another (RUN_DIR)")


def an_evaluation_finishes_no_run(settings: Settings) -> None:
    """It ends with a summary, by which the run of its folder would count as finished."""
    folder = Path(settings["trainer.default_local_dir"])
    settings.require(
        not settings["trainer.val_only"] or not (folder / TRACKER).exists(),
        "trainer.val_only",
        f"{folder} holds a training run; name another folder (RUN_DIR), and the checkpoint's actor/huggingface as "
        "model (MODEL_PATH)",
    )


def a_path_to_resume_from_is_there(settings: Settings) -> None:
    path = settings["trainer.resume_from_path"]
    settings.require(
        settings["trainer.resume_mode"] != "resume_path"
        or (path is not None and "global_step_" in path and Path(path).is_dir()),
        "trainer.resume_from_path",
        "trainer.resume_mode=resume_path needs a folder global_step_N of a run; name one",
    )


RULES: tuple[Callable[[Settings], None], ...] = (
    a_source_prefers,
    a_pair_has_two_responses,
    prompts_are_filtered_by_what_pairs_are_made_of,
    beta_is_a_number_or_a_schedule,
    the_users_module_is_imported,
    losses_are_known,
    lora_has_no_second_model,
    adapters_are_gathered_alone,
    small_steps_need_fp32,
    reference_is_sharded_as_the_actor,
    precisions_are_known,
    the_actor_trains_without_fp16,
    shared_prompts_meet_half_precision,
    reference_holds_what_the_actor_computes_with,
    batches_divide,
    a_prompt_with_its_responses_fits_one_micro_batch,
    ranks_fall_into_groups,
    the_machine_has_the_ranks,
    sequence_parallelism_can_work,
    activations_wait_in_one_way,
    fsdp1_gathers_no_model_on_cpus,
    sequences_fit_vllm,
    the_queue_holds_a_batch,
    weights_stay_where_they_are_not_sent,
    an_asynchronous_run_shares_its_engine_with_nobody,
    a_reward_model_has_devices,
    a_source_that_scores_is_not_overruled,
    loggers_are_installed,
    the_run_folder_can_be_written,
    an_evaluation_finishes_no_run,
    a_path_to_resume_from_is_there,
)
