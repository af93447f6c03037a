"""What prefers, how prompts are chosen for it, and the loss."""

from dataclasses import fields
from importlib import import_module

from recipe.spin.checks.derived import (
    ACTOR,
    MODEL,
    ROLLOUT,
    ULYSSES,
    has_late_reward_model,
    is_self_play,
    scores_with_reference,
)
from recipe.spin.common.settings import ConfigError, Settings
from recipe.spin.core_algos import LOSSES, LossOptions, beta_at, check_loss_settings
from recipe.spin.preferences.source import source_class

LOSS_OPTIONS = [field.name for field in fields(LossOptions)]
OWN_LOSSES = frozenset(LOSSES)  # not what a user's module registers later
# Settings by their default, and the losses that read them: beside others they would change nothing
READ_BY = {
    "dpo_label_smoothing": (0.0, ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "dpop")),
    "dpo_simpo_gamma": (0.5, ("simpo",)),
    "dpo_dpop_lambda": (50.0, ("dpop",)),
    "dpo_discopop_tau": (0.2, ("discopop",)),
}


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
        not scores_with_reference(settings),
        key,
        f"which prompts tie is known only when algorithm.preference_source={settings['algorithm.preference_source']} "
        "has scored all of a step's responses with the reference's weights, too late to replace them; set False",
    )
    settings.require(
        not has_late_reward_model(settings),
        key,
        "which prompts tie is known only when the reward model has scored all of a step's responses, too late to "
        "replace them; set False, or give it its own devices, reward.reward_model.enable_resource_pool=True",
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
            discopop_tau=settings["algorithm.dpo_discopop_tau"],
            average_log_prob=settings["algorithm.dpo_average_log_prob"],
            reference_free=settings["algorithm.dpo_reference_free"],
            options=LossOptions.of({f"dpo_{name}": settings[f"algorithm.dpo_{name}"] for name in LOSS_OPTIONS}),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"algorithm.dpo_*: {error}") from error
    what_no_loss_reads_is_left(settings, {name for name, _ in losses})
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


def what_no_loss_reads_is_left(settings: Settings, losses: set[str]) -> None:
    """Where all losses are of losses.py; a user's own may read anything."""
    if not losses <= OWN_LOSSES:
        return
    for name, (default, readers) in READ_BY.items():
        key = f"algorithm.{name}"
        settings.require(
            settings[key] == default or not losses.isdisjoint(readers),
            key,
            f"no loss in algorithm.dpo_loss_type reads it; these do: {', '.join(readers)}. Leave it at {default}",
        )
    key, divergence = "algorithm.dpo_f_alpha_divergence_coef", settings["algorithm.dpo_f_divergence_type"]
    settings.require(
        settings[key] == LossOptions().f_alpha_divergence_coef or divergence == "alpha_divergence",
        key,
        f"algorithm.dpo_f_divergence_type={divergence} does not read it; set that to alpha_divergence",
    )


RULES = (
    a_source_prefers,
    a_pair_has_two_responses,
    prompts_are_filtered_by_what_pairs_are_made_of,
    beta_is_a_number_or_a_schedule,
    the_users_module_is_imported,
    losses_are_known,
)
