"""Whether ranks are there, how they are grouped, and what they can do together."""

import math

import torch

from recipe.spin.checks.derived import ACTOR, MODEL, REF, ROLLOUT, SHARE_PROMPT, ULYSSES, fit_nodes, ranks
from recipe.spin.common.ray_address import joins_cluster
from recipe.spin.common.settings import Settings


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
        node = settings["trainer.n_gpus_per_node"]
        settings.require(
            settings[key] == 1 or fit_nodes(size, node),
            key,
            f"vLLM's groups of {size} must lie within a node's {node} ranks or take whole nodes",
        )


def experts_fall_onto_vllms_ranks(settings: Settings) -> None:
    key, sizes = f"{ROLLOUT}.expert_parallel_size", ("tensor_model_parallel_size", "data_parallel_size")
    together = math.prod(settings[f"{ROLLOUT}.{size}"] for size in sizes)
    settings.require(
        settings[key] in (1, together),
        key,
        f"verl spreads experts over all ranks of a vLLM ({' times '.join(sizes)}) or none; set it to "
        f"{f'{together} or ' * (together > 1)}1",
    )


def the_machine_has_the_ranks(settings: Settings) -> None:
    if _joins_a_cluster(settings):
        return  # which is looked at once it is joined
    key, pool = "trainer.n_gpus_per_node", _reward_pool(settings)
    asked = settings[key] + pool
    whom = f"them and the {pool} of the reward model's own pool" if pool else "them"
    if settings["trainer.device"] == "cuda":
        gpus = torch.cuda.device_count()
        remedy = f"this machine shows {gpus} GPUs for {whom}; lower it, or train without (SPIN_PROFILE=cpu run_spin.sh)"
        settings.require(asked <= gpus, key, remedy)
    logical = settings["ray_kwargs.ray_init.num_gpus"]
    settings.require(
        logical is None or asked <= logical,
        key,
        f"Ray has ray_kwargs.ray_init.num_gpus={logical} places for {whom}, and the rest would wait; set it to {asked}",
    )


def shards_are_dealt_out_evenly(settings: Settings) -> None:
    """verl makes a mesh of ranks / fsdp_size copies of the model, or one of all ranks; the reference's is the same."""
    number, key = ranks(settings), f"{ACTOR}.fsdp_config.fsdp_size"
    size = settings[key]
    even = size < 0 or size >= number or (size > 0 and number % size == 0)
    settings.require(even, key, f"it must divide the {number} ranks (nnodes x n_gpus_per_node), or be -1 for all")


def _joins_a_cluster(settings: Settings) -> bool:
    for key in ("trainer.nnodes", "ray_kwargs.ray_init"):
        settings[key]  # leaves, where it has a fault
    return joins_cluster(settings.config)


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


RULES = (
    ranks_fall_into_groups,
    experts_fall_onto_vllms_ranks,
    the_machine_has_the_ranks,
    shards_are_dealt_out_evenly,
    sequence_parallelism_can_work,
    activations_wait_in_one_way,
    fsdp1_gathers_no_model_on_cpus,
)
