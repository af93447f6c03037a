"""What a model's config.json says of it: whether it is a language model, and whether the engine computes it rightly."""

from functools import partial

from recipe.spin.checks.derived import ACTOR, SHARE_PROMPT, ULYSSES
from recipe.spin.common.settings import Settings

PATH = "actor_rollout_ref.model.path"
TRUST = "actor_rollout_ref.model.trust_remote_code"
OVERRIDES = "actor_rollout_ref.model.override_config"
# Model types whose forward pass verl 0.9.1 replaces (verl/models/transformers/monkey_patch.py)
FORWARD_OF_VERL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "qwen3_5", "qwen3_5_moe")


def text_part(config: dict) -> dict:
    """The part of a model's config.json that is the language model's, in models of text and images."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def language_model(path: str, trust_remote_code: bool, local_files_only: bool):
    """The same part as transformers reads it, by which the engine builds the model.

    Raises:
        ValueError: when it cannot be read, with the first line of why.
    """
    from transformers import AutoConfig, PreTrainedConfig

    try:
        whole = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=local_files_only)
        found = whole.get_text_config()
    except Exception as error:  # its classes, and those of the hub, raise what they like
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error
    if not isinstance(found, PreTrainedConfig):
        raise ValueError(f"a {whole.model_type} has no text_config, and it holds {str(found)[:60]}")
    return found


def check_architecture(settings: Settings, config: dict) -> None:
    """Of a model that brings no code of its own: transformers must know it, as one that writes."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("auto_map") and settings[TRUST]:
        return
    kind, architectures = config.get("model_type"), config.get("architectures")
    own = f", or set {TRUST}=True to run the code that it brings" * bool(config.get("auto_map"))
    settings.require(
        isinstance(kind, str) and kind in CONFIG_MAPPING,
        PATH,
        f"config.json has the model_type {kind!r}, which transformers {transformers.__version__} does not know; name a "
        f"model that it knows{own}",
    )
    _check_class(settings, str(kind), architectures)


def _check_class(settings: Settings, kind: str, architectures: object) -> None:
    """The class that transformers makes of the type, and that verl asks it for."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    showing = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    named = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    settings.require(
        named in [*causal.values(), *showing.values()],
        PATH,
        f"config.json has the architectures {architectures}, and a causal language model, which writes token by token, "
        "is needed; name one",
    )
    loaded = [names[kind] for names in (causal, showing) if kind in names]
    settings.require(
        named in loaded,
        PATH,
        f"config.json has the architectures {architectures} and the model_type {kind!r}, of which transformers makes "
        f"{' or '.join(loaded) or 'no causal language model'}; copy config.json of the model again",
    )
    settings.require(
        kind in showing or "ForCausalLM" in str(named),
        PATH,
        f"verl knows a causal model by ForCausalLM in its architecture's name, and would load a {named} without its "
        "output layer; name another model",
    )


def check_computation(settings: Settings, config: dict) -> None:
    """Notes what of a model the engine would compute wrongly, or not at all."""
    settings.run(
        *(partial(check, config=config) for check in (_check_numbers, _check_attention, _check_heads, _check_images))
    )


def _check_numbers(settings: Settings, config: dict) -> None:
    """Weights of less than 16 bits get no gradients, and vLLM and the reference take them as they are trained."""
    quantized = config.get("quantization_config") or config.get("compression_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    settings.require(
        not quantized,
        PATH,
        f"config.json has a quantization_config ({method}), and quantized weights cannot be trained; take the model "
        "that it was made from, in bf16 or fp32",
    )


def _check_attention(settings: Settings, config: dict) -> None:
    """Scores that are capped take an attention that caps: the recipe's does, sdpa ignores caps."""
    cap = text_part(config).get("attn_logit_softcapping")
    if not cap:
        return
    shares, attention = settings[SHARE_PROMPT], settings[OVERRIDES].get("attn_implementation")
    settings.require(
        shares or attention != "sdpa",
        PATH,
        f"this model caps its attention scores ({cap}), and {OVERRIDES}.attn_implementation=sdpa, which "
        "actor_rollout_ref.share_prompt=False takes, would leave the caps out without a word; set it to eager, or with "
        "flash-attn 2 installed to flash_attention_2",
    )


def _check_heads(settings: Settings, config: dict) -> None:
    """Ulysses deals a layer's heads out to the ranks that share a sequence, keys' and values' as often as it takes."""
    key = f"{ACTOR}.{ULYSSES}"
    size, model = settings[key], text_part(config)
    heads = model.get("num_attention_heads")
    if not isinstance(heads, int) or size == 1:
        return
    of_keys = model.get("num_key_value_heads") or heads  # a number, where transformers can read the config
    if not isinstance(of_keys, int):
        return
    settings.require(
        heads % size == 0 and (of_keys % size == 0 or size % of_keys == 0),
        key,
        f"the model's {heads} heads of attention, {of_keys} of them with keys, cannot be dealt out evenly to so many "
        "ranks; choose a size that divides the first, and divides the second or is a multiple of it",
    )


def _check_images(settings: Settings, config: dict) -> None:
    """Of the models of text and images only those whose text part runs as a model of text would."""
    settings.require(
        config.get("model_type") not in FORWARD_OF_VERL,
        PATH,
        f"of a {config.get('model_type')} verl replaces the forward pass by one that gives the logits of all tokens, "
        "where the recipe needs those of responses alone; name a model of text",
    )
    key = f"{ACTOR}.{ULYSSES}"
    settings.require(
        settings[key] == 1 or not config.get("vision_config"),
        key,
        "verl leaves it to a model of text and images to split its sequences, which most do not; set 1, or name a "
        "model of text",
    )
