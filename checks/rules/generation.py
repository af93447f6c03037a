"""vLLM, the queue of its responses, and the reward model beside it."""

import math

from recipe.spin.checks.derived import (
    ROLLOUT,
    fit_nodes,
    has_late_reward_model,
    ranks,
    scores_groups,
    scores_with_reference,
    takes_reference,
)
from recipe.spin.common.settings import Settings

MODE = "trainer.v1.trainer_mode"


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


def lengths_are_the_datas(settings: Settings) -> None:
    """verl cuts prompts to vLLM's length without a word; the rows' lengths are compared with the data's."""
    for which in ("prompt", "response"):
        key = f"data.max_{which}_length"
        remedy = f"it must be {key}={settings[key]}, which it is where it is not set; set that key alone"
        settings.require(settings[f"{ROLLOUT}.{which}_length"] == settings[key], f"{ROLLOUT}.{which}_length", remedy)


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
        frequency == 1 or not takes_reference(settings), key, "vLLM has the reference's weights at times; set 1"
    )
    settings.require(
        frequency == 1 or not has_late_reward_model(settings),
        key,
        "the reward model takes turns with vLLM on its GPUs, which are cleared of the update's memory when weights are "
        "sent; set 1, or give it its own, reward.reward_model.enable_resource_pool=True",
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
        not takes_reference(settings),
        MODE,
        f"with algorithm.preference_source={settings['algorithm.preference_source']} vLLM takes the reference's "
        "weights at times, with responses of the policy half done; set sync",
    )
    model = "reward.reward_model"
    settings.require(
        not has_late_reward_model(settings),
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
    node = settings[f"{model}.n_gpus_per_node" if pool else "trainer.n_gpus_per_node"]
    size = 1
    for kind in ("tensor_model_parallel_size", "data_parallel_size"):
        key = f"{model}.rollout.{kind}"
        size *= settings[key]
        settings.require(
            settings[key] == 1 or (devices % size == 0 and fit_nodes(size, node)),
            key,
            f"the reward model's {devices} devices must fall into groups of {size} that lie within a node's {node} or "
            "take whole nodes; lower it, for example to 1",
        )


def several_ranks_take_several_processes(settings: Settings) -> None:
    """vLLM's executor of one process would wait for ever for the ranks that it does not start."""
    for engine in (ROLLOUT, "reward.reward_model.rollout"):
        size, key = f"{engine}.tensor_model_parallel_size", f"{engine}.engine_kwargs.vllm.distributed_executor_backend"
        alone = settings[key] == "uni" and settings[size] > 1
        settings.require(not alone, key, f"it is for one rank, and {size} is {settings[size]}; set mp")


def a_source_that_scores_is_not_overruled(settings: Settings) -> None:
    """verl writes the scores of a reward model in the trainer's pool over those that a source gave before.

    One that scores with the reference's weights does so later, and the reward model is for held-out answers alone.
    """
    model = "reward.reward_model"
    settings.require(
        not has_late_reward_model(settings) or not scores_groups(settings) or scores_with_reference(settings),
        f"{model}.enable",
        "in the policy's pool it scores after algorithm.preference_source="
        f"{settings['algorithm.preference_source']} and would decide in its place; set False, or give it its own "
        f"devices, {model}.enable_resource_pool=True",
    )


RULES = (
    sequences_fit_vllm,
    lengths_are_the_datas,
    the_queue_holds_a_batch,
    weights_stay_where_they_are_not_sent,
    an_asynchronous_run_shares_its_engine_with_nobody,
    a_reward_model_has_devices,
    several_ranks_take_several_processes,
    a_source_that_scores_is_not_overruled,
)
