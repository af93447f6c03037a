"""What prefers, as an interface: it may score a prompt's responses together, and it pairs those of a step."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from recipe.spin.common.settings import Settings
from recipe.spin.core_algos import PreferencePairs, compute_onlineDPO_pref, has_score

SOURCES = {
    "reward": "recipe.spin.preferences.source:PreferenceSource",
    "judge": "recipe.spin.preferences.judge:JudgeSource",
    "self_play": "recipe.spin.preferences.self_play:SelfPlaySource",
}
Generate = Callable[[list[int], dict[str, Any]], Any]  # prompt tokens, sampling parameters -> awaitable of tokens


@dataclass(frozen=True)
class Group:
    """The n responses to one prompt of a training step, or two answers to a held-out one.

    Attributes:
        step: number of the training step, or of the one that the validation follows.
        messages: the prompt, as chat messages.
        responses: the responses' text, without special tokens.
        rewards: what the reward function or the reward model gave each; None where the settings name neither, and of a
            reward model in the policy's pool, which scores later.
        row: the columns of the prompt's row in the data.
        generate: answers prompt tokens with the policy's own vLLM server and the weights of the source's
            `scoring_model`; awaitable, gives the answer's tokens.
        held_out: whether the responses are the answers of two validations to a held-out prompt, the first validation's
            and this one's, of which the source says which is better.
    """

    step: int
    messages: list[dict]
    responses: list[str]
    rewards: list[float] | None
    row: dict[str, Any]
    generate: Generate
    held_out: bool = False


class Score(NamedTuple):
    """What a response is worth beside the others to its prompt, and what `metrics` is to know about it."""

    value: float
    info: dict[str, Any] = {}


class Pairing(NamedTuple):
    """What a step trains on: N responses, pairs of them, and the number of each one's prompt (N,).

    Pairs whose weight is not above 0 are left out.
    """

    responses: TensorDict
    pairs: PreferencePairs
    prompt_of: torch.Tensor


class PreferenceSource:
    """What prefers, and by itself the source "reward": pairs responses by their scores, a reward function's or model's,
    or in a derived class those of `score_group`.

    A source lives in each process that answers prompts, for `score_group`, and beside the trainer, for the rest.

    Attributes:
        fields: columns of the responses that `pair` reads besides the trainer's.
        rollout_model: whose weights vLLM has while it answers training prompts: the "actor"'s or the "reference"'s.
        scoring_model: whose it has while `score_group` is asked. With the "reference"'s that is after all of a step's
            responses are there; else at once, while vLLM answers others.
        limits_itself: whether `score_group` ends in time by settings of its own; else the run stops when for
            `algorithm.reward_timeout_s` seconds no prompt's responses got their scores, though some waited.
    """

    fields: tuple[str, ...] = ()
    rollout_model = "actor"
    scoring_model = "actor"
    limits_itself = False

    def __init__(self, config: DictConfig, tokenizer):
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def check(cls, config: DictConfig) -> None:
        """Looks, before Ray starts, at the settings that are this source's own. Raises ValueError with the remedy.

        Asked where all settings are of the right kind, and before a model that the settings name is fetched.
        """

    @classmethod
    def check_model(cls, settings: Settings, prompt_length: Callable[[list[dict]], int | None]) -> None:
        """Looks, once the model is there and has been looked at, at what this source asks of it; notes the faults.

        prompt_length: the tokens of a prompt of these messages; None where they cannot be counted before the run.
        """

    @classmethod
    def takes_reference(cls, config: DictConfig) -> bool:
        """Whether vLLM takes the reference's weights at times, and is not the policy's all the while."""
        return cls.rollout_model == "reference" or cls.scores_with_reference(config)

    @classmethod
    def scores_with_reference(cls, config: DictConfig) -> bool:
        """Whether that is so while `score_group` is asked."""
        return cls.scoring_model == "reference"

    @classmethod
    def scores_groups(cls) -> bool:
        return cls.score_group is not PreferenceSource.score_group

    @classmethod
    def compares_held_out(cls, config: DictConfig) -> bool:
        """Whether held-out answers are worth what the source says of them beside those of the first validation.

        So it is where it scores groups, and the settings name neither a reward function nor a reward model.
        """
        return cls.scores_groups() and not cls.scores_with_reference(config) and not has_reward(config.reward)

    def prompt_tokens(self, messages: list[dict]) -> list[int]:
        """The tokens of a prompt, as `group.generate` takes them: by the chat template and the run's options."""
        options = self.config.data.apply_chat_template_kwargs
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        return self.tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def end_tokens(self) -> set[int]:
        """The tokens at which generation stops: those of the model's generation config and the tokenizer's."""
        from verl.utils.model import get_generation_config  # most checks before a run do without verl

        tokens = getattr(get_generation_config(self.config.actor_rollout_ref.model.path), "eos_token_id", None)
        tokens = tokens if isinstance(tokens, list) else [tokens]
        return {token for token in [*tokens, self.tokenizer.eos_token_id] if token is not None}

    async def score_group(self, group: Group) -> list[Score]:
        """A score for each of the responses to a prompt, which takes the place of the reward in pairing them.

        Asked for each prompt of a training step, at the time that `scoring_model` tells, and for held-out ones, the
        first validation's answer before this one's (`group.held_out`). A value that is no finite number ends the run,
        but NaN where the reward is NaN (`algorithm.reward_error=skip`) leaves the response out.
        """
        raise NotImplementedError

    def pair(self, responses: TensorDict, rewards: torch.Tensor, mask: torch.Tensor, step: int) -> Pairing:
        """Pairs the responses (N,) to a step's prompts, n neighbours each, by rewards (N, T) over mask (N, T)."""
        algorithm, rollout = self.config.algorithm, self.config.actor_rollout_ref.rollout
        pairs = compute_onlineDPO_pref(
            rewards,
            mask,
            n=rollout.n,
            pairing=algorithm.dpo_pairing,
            tie_policy=algorithm.dpo_tie_policy,
            min_margin=algorithm.dpo_min_margin,
            scored=has_score(rewards) if algorithm.reward_error == "skip" else None,
            generator=torch.Generator().manual_seed(rollout.seed + step),
        )
        return Pairing(responses, pairs, torch.arange(len(responses)) // rollout.n)

    def metrics(self, infos: list[dict[str, Any]]) -> dict[str, float]:
        """A step's metrics from what `score_group` noted of each response. An exception ends the run.

        A validation's likewise, with two for each held-out prompt whose answers were compared.
        """
        return {}

    def held_out_metrics(
        self, batches: Iterable[dict], logps: Callable[[list, list], torch.Tensor]
    ) -> dict[str, float]:
        """Metrics of a validation besides those of the answers.

        `logps(prompts, responses)` gives the log-probs (N,) of N responses under the actor, both given as tokens.
        """
        return {}


def has_reward(reward: DictConfig) -> bool:
    """Whether the settings under `reward` name a reward function or a reward model."""
    return reward.custom_reward_function.path is not None or reward.reward_model.enable


def source_class(name: str) -> type[PreferenceSource]:
    """The class of a source by its name, or by `module:Class`.

    Raises:
        ValueError: when there is no such source, it cannot be imported, or its `score_group` cannot be awaited.
    """
    place = SOURCES.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        raise ValueError(f"choose one of {', '.join(SOURCES)}, or name a class of your own as module:Class")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # a module is a program, which may raise what it likes; and names may be none
        fault = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot be imported ({fault}); correct it, and let PYTHONPATH lead to its module") from error
    if not (isinstance(found, type) and issubclass(found, PreferenceSource)):
        raise ValueError("must be a class derived from recipe.spin.preferences.source.PreferenceSource")
    if not inspect.iscoroutinefunction(inspect.unwrap(found.score_group)):
        raise ValueError(
            "its score_group is no coroutine function, and is awaited; write async def score_group, and in a decorator "
            "of it use functools.wraps"
        )
    return found


def load_source(config: DictConfig, tokenizer) -> PreferenceSource:
    """The source that the config asks for."""
    return source_class(config.algorithm.preference_source)(config, tokenizer)
