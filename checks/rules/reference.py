"""What the reference is, how it is sharded, and the precision of both models."""

from typing import get_args

from recipe.spin.checks.derived import ACTOR, MODEL, REF, ROLLOUT, SHARE_PROMPT, computes_in, ranks, takes_reference
from recipe.spin.checks.kinds import Precision
from recipe.spin.common.settings import ConfigError, Settings

FP32 = ("fp32", "float32", "32", 32)  # verl's names for it
FP16 = ("fp16", "float16")


def lora_has_no_second_model(settings: Settings) -> None:
    rank = settings[f"{MODEL}.lora_rank"]
    if rank == 0 and not settings[f"{MODEL}.lora_adapter_path"]:
        return
    if takes_reference(settings):
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


def fsdp1_wraps_both_models(settings: Settings) -> None:
    """One rank in fp32 goes without FSDP (RowEngine._needs_no_fsdp) unless a model is to lie on the host.

    FSDP1 then has one tensor of many weights where the other model has them one by one.
    """
    precision = computes_in(settings[f"{ACTOR}.fsdp_config.mixed_precision"])
    plain = ranks(settings) == 1 and {precision, settings[f"{REF}.fsdp_config.model_dtype"]} <= set(FP32)
    if settings[f"{ACTOR}.strategy"] != "fsdp" or not plain or settings["trainer.ref_update_freq"] <= 0:
        return
    key = f"{REF}.fsdp_config.param_offload"
    settings.require(
        not settings[key],
        key,
        f"FSDP1 would wrap one of two models on one rank in fp32, and a refresh could not copy; set {ACTOR}."
        "strategy=fsdp2, or False here",
    )


def fsdp1_has_no_offload_policy(settings: Settings) -> None:
    key = f"{ACTOR}.fsdp_config.offload_policy"
    settings.require(
        not settings[key] or settings[f"{ACTOR}.strategy"] == "fsdp2",
        key,
        f"FSDP1 has none, and verl would leave the weights on the device; set {ACTOR}.strategy=fsdp2, or in its place "
        f"{ACTOR}.fsdp_config.param_offload=True and {ACTOR}.fsdp_config.optimizer_offload=True",
    )


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
    computed = computes_in(settings[key])
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
    computed = computes_in(precision)
    settings.require(
        settings[f"{ref}.model_dtype"] in ("fp32", computed),
        f"{ref}.model_dtype",
        f"the actor computes in {computed}, and the reference must hold the same numbers; use {computed} or fp32",
    )


RULES = (
    lora_has_no_second_model,
    adapters_are_gathered_alone,
    small_steps_need_fp32,
    reference_is_sharded_as_the_actor,
    fsdp1_wraps_both_models,
    fsdp1_has_no_offload_policy,
    precisions_are_known,
    the_actor_trains_without_fp16,
    shared_prompts_meet_half_precision,
    reference_holds_what_the_actor_computes_with,
)
