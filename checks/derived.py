"""What several checks need of the settings: names of sections and keys, and what follows from the values."""

from collections.abc import Callable, Mapping
from typing import Any

from recipe.spin.common.settings import Settings, Unusable
from recipe.spin.preferences.source import PreferenceSource, source_class

ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
MODEL, SHARE_PROMPT = "actor_rollout_ref.model", "actor_rollout_ref.share_prompt"
ULYSSES = "fsdp_config.ulysses_sequence_parallel_size"  # of ACTOR and of REF


def is_self_play(settings: Settings) -> bool:
    return settings["algorithm.preference_source"] == "self_play"


def ranks(settings: Settings) -> int:
    return settings["trainer.nnodes"] * settings["trainer.n_gpus_per_node"]


def fit_nodes(size: int, node: int) -> bool:
    """Whether vLLM's groups of so many devices lie within nodes of `node` devices or take whole ones.

    verl starts all devices of another group on the node of its first.
    """
    return node < 1 or node % size == 0 or size % node == 0


def computes_in(mixed_precision: Mapping[str, Any] | None) -> str:
    """What weights are cast to for arithmetic; bf16 is verl's default."""
    return (mixed_precision or {}).get("param_dtype", "bf16")


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


def scores_groups(settings: Settings) -> bool:
    """Whether the source scores a prompt's responses itself, so that training takes no reward."""
    return source_of(settings).scores_groups()


def compares_held_out(settings: Settings) -> bool:
    """Whether the source says what held-out answers are worth, so that they take no reward."""
    return _sound_source(settings).compares_held_out(settings.config)


def takes_reference(settings: Settings) -> bool:
    """Whether vLLM takes the reference's weights at times, for what the source prefers by."""
    return _sound_source(settings).takes_reference(settings.config)


def has_late_reward_model(settings: Settings) -> bool:
    """Whether a reward model scores in the policy's pool, so once all of a step's responses are there."""
    model = "reward.reward_model"
    return settings[f"{model}.enable"] and not settings[f"{model}.enable_resource_pool"]


def scores_with_reference(settings: Settings) -> bool:
    """Whether the source scores with the reference's weights, once all of a step's responses are there."""
    return _sound_source(settings).scores_with_reference(settings.config)
