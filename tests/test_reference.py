"""The refresh of the reference on the real worker.

It is judged by log-probs, never by stored parameters: FSDP goes on computing with gathered copies, so that the stored
ones may be equal while the models are not.
"""

import numpy as np
import pytest
import torch
from as_on_gpus import fsdp_on_one_rank, segments_on_a_cpu
from plain_model import load_model, response_logp
from worker_jobs import (
    count_offloads,
    make_batches,
    make_long_batch,
    play,
    refresh,
    refresh_at_once,
    refuse,
    run_within,
)

pytestmark = pytest.mark.slow

BATCHES = make_batches()
FSDP = ["actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config"]
GATHERED = [f"{config}.reshard_after_forward=False" for config in FSDP]  # FSDP2 then keeps what it gathered
LAYOUTS = {
    "1-rank-without-fsdp": (1, "fsdp2", [], []),
    "fsdp2-1-rank": (1, "fsdp2", [], [fsdp_on_one_rank]),
    "fsdp2-2-ranks": (2, "fsdp2", [], []),
    "fsdp2-2-ranks-gathered": (2, "fsdp2", GATHERED, []),
    "fsdp1-2-ranks": (2, "fsdp", [], []),
}


OFFLOADED = "actor_rollout_ref.ref.fsdp_config.param_offload=True"
# As on GPUs: masters in fp32, arithmetic and the reference in bf16
BF16 = [
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16",
    "actor_rollout_ref.ref.fsdp_config.model_dtype=bf16",
]
# And attention by segments, everything recomputed, and a micro-batch a row
GPU = [
    "actor_rollout_ref.keep_products=False",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=420",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=420",
]
BF16_LAYOUTS = {
    "fsdp2-1-rank": (1, "fsdp2", GPU, [segments_on_a_cpu]),
    "fsdp2-2-ranks": (2, "fsdp2", GPU, [segments_on_a_cpu]),
    "fsdp2-2-ranks-offloaded": (2, "fsdp2", [OFFLOADED], []),
    "fsdp1-1-rank": (1, "fsdp", [], []),
    "fsdp1-2-ranks": (2, "fsdp", [], []),
}


def overrides(folder: str, strategy: str = "fsdp2") -> list[str]:
    return [
        f"actor_rollout_ref.model.path={folder}",
        f"actor_rollout_ref.actor.strategy={strategy}",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "data.train_batch_size=6",
        # without hf_model: FSDP1 cannot gather a full state dict on CPUs
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]",
    ]


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS.keys())
def played(request, tiny_models, ranks, tmp_path_factory) -> dict:
    """What rank 0 saw of `play`; every rank drives the same trainer and sees the same."""
    world_size, strategy, more, contexts = request.param
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    settings = [*overrides(tiny_models["llama"], strategy), *more]
    first, *others = ranks[world_size].run(run_within, contexts, play, settings, BATCHES, folder)
    for other in others:
        np.testing.assert_equal(other["seen"], first["seen"])
    return first


def same(one, other) -> bool:
    return bool((one == other).all())


def far(one, other) -> bool:
    """Whether most log-probs differ by much more than rounding."""
    return np.median(abs(one - other)) > 1e-2


def test_reference_starts_as_the_actor_and_stays_while_the_actor_trains(played):
    seen = played["seen"]
    assert same(seen["loaded"]["actor"], seen["loaded"]["reference"])
    assert same(seen["trained"]["reference"], seen["loaded"]["reference"])
    assert same(seen["trained twice"]["reference"], seen["loaded"]["reference"])
    assert far(seen["trained"]["actor"], seen["loaded"]["actor"])
    assert far(seen["trained twice"]["actor"], seen["trained"]["actor"])


def test_refreshed_reference_computes_exactly_as_the_actor(played):
    seen = played["seen"]
    assert same(seen["refreshed"]["reference"], seen["trained twice"]["actor"])
    assert same(seen["refreshed"]["actor"], seen["trained twice"]["actor"])


def test_reference_stays_between_refreshes(played):
    seen = played["seen"]
    assert same(seen["trained on"]["reference"], seen["refreshed"]["reference"])
    assert far(seen["trained on"]["actor"], seen["refreshed"]["actor"])
    assert same(seen["refreshed again"]["reference"], seen["refreshed again"]["actor"])


def test_soft_refresh_mixes_the_parameters(played, tiny_models):
    """reference = 0.3 actor + 0.7 reference, where the reference was the actor at its last refresh."""
    old, new = played["parameters"]["refreshed"], played["parameters"]["trained on"]
    mixture = load_model(tiny_models["llama"])
    mixture.load_state_dict({name: torch.from_numpy(0.3 * new[name] + 0.7 * old[name]) for name in new})
    with torch.no_grad():
        expected = [response_logp(mixture, *row, temperature=1.0).item() for row in played["rows"]]
    mixed = played["seen"]["mixed"]
    np.testing.assert_allclose(mixed["reference"], expected, atol=2e-5)
    assert same(mixed["actor"], played["seen"]["trained on"]["actor"])
    assert far(mixed["reference"], played["seen"]["trained on"]["reference"])


def test_checkpoint_brings_back_the_refreshed_reference(played):
    saved, resumed = played["seen"]["trained on"], played["resumed"]["refreshed"]
    assert same(resumed["reference"], saved["reference"])
    assert same(resumed["actor"], saved["actor"])
    assert played["folders"]["refreshed"] == ["actor", "reference"]
    assert played["folders"]["again"] == ["actor", "reference"]  # also by a run that has only loaded it


def test_reference_is_saved_only_once_it_was_refreshed(played):
    assert played["folders"]["unrefreshed"] == ["actor"]
    assert same(played["resumed"]["unrefreshed"]["reference"], played["seen"]["loaded"]["reference"])
    assert same(played["resumed"]["unrefreshed"]["actor"], played["seen"]["trained"]["actor"])


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_refresh_may_come_first(tiny_models, ranks, strategy):
    """As with ref_update_freq=1, or after a resume: FSDP1 prepares for resharding with the first forward alone."""
    seen, *_ = ranks[2].run(refresh_at_once, overrides(tiny_models["llama"], strategy), BATCHES[0])
    assert same(seen["reference"], seen["actor"])


def test_reference_sharded_unlike_the_actor_is_refused(tiny_models, ranks):
    settings = [*overrides(tiny_models["llama"]), "actor_rollout_ref.ref.fsdp_config.fsdp_size=1"]
    for message in ranks[2].run(refuse, settings):
        assert "actor_rollout_ref.ref.fsdp_config" in message
        assert "fsdp_size" in message


@pytest.mark.parametrize("layout", BF16_LAYOUTS.values(), ids=BF16_LAYOUTS.keys())
def test_bf16_reference_computes_exactly_as_the_actor(tiny_models, ranks, tmp_path, layout):
    """At position 400 a rotary frequency that was rounded to bf16 would turn a token by up to 0.8 radians more."""
    world_size, strategy, more, contexts = layout
    settings = [*overrides(tiny_models["llama"], strategy), *BF16, *more]
    job = (contexts, refresh, settings, make_long_batch(), str(tmp_path))
    seen, *_ = ranks[world_size].run(run_within, *job)
    for stage in ("loaded", "refreshed", "resumed"):
        assert same(seen[stage]["reference"], seen[stage]["actor"]), stage
    assert far(seen["trained"]["actor"], seen["trained"]["reference"])
    assert same(seen["resumed"]["reference"], seen["refreshed"]["reference"])


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_reference_is_on_the_host_only_where_param_offload_says_so(tiny_models, ranks, strategy):
    settings = [*overrides(tiny_models["llama"], strategy), *BF16]
    assert ranks[1].run(count_offloads, settings) == [0]
    assert ranks[1].run(count_offloads, [*settings, OFFLOADED]) == [1]
