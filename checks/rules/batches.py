"""How a batch falls into optimizer steps and micro-batches."""

from recipe.spin.checks.derived import ACTOR, REF, ROLLOUT, ULYSSES, longest_row, ranks
from recipe.spin.common.settings import Settings


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


def the_actor_is_cut_in_one_way(settings: Settings) -> None:
    """Where it gives log-probs alone, as of a LoRA run's reference, and in training."""
    key, by_tokens = f"{ROLLOUT}.log_prob_use_dynamic_bsz", settings[f"{ACTOR}.use_dynamic_bsz"]
    settings.require(
        settings[key] == by_tokens, key, f"verl's worker wants {ACTOR}.use_dynamic_bsz here; set it to {by_tokens}"
    )
    limit = f"{ROLLOUT}.log_prob_{'max_token_len' if by_tokens else 'micro_batch_size'}_per_gpu"
    settings.require(settings[limit] is not None, limit, "micro-batches are cut by it; give a number")


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


RULES = (
    batches_divide,
    the_actor_is_cut_in_one_way,
    a_prompt_with_its_responses_fits_one_micro_batch,
)
