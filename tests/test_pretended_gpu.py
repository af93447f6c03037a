"""The trainer's side of a run on GPUs, without one: on a device that is not the host (pretended_gpu/).

Tensors of host and device do not mix there; what is pinned, offloaded, gathered and given back is so, collectives take
the device's tensors alone, and every byte is counted. CUDA's kernels and streams, NCCL itself and vLLM are not in it.
"""

import pytest
from as_on_gpus import segments_on_a_cpu
from omegaconf import OmegaConf
from pretended_gpu import building
from test_update import Case, check_against_plain_pytorch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config
from worker_harness import ROOT, compose, ranks_by_number
from worker_jobs import count_memory, make_long_batch, probe_pretended_gpu, refresh, try_the_device

from recipe.spin.checks import fit, memory
from recipe.spin.checks.finding import OK
from recipe.spin.tools.probe_model import make_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(building.missing()), reason=building.missing())]

ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
FP32 = [f"{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp32", f"{REF}.fsdp_config.model_dtype=fp32"]
OFFLOADED = [
    f"{ACTOR}.fsdp_config.param_offload=True",
    f"{ACTOR}.fsdp_config.optimizer_offload=True",
    f"{REF}.fsdp_config.param_offload=True",
]
FSDP1 = f"{ACTOR}.strategy=fsdp"


@pytest.fixture(scope="module")
def gpu_ranks():
    """Ranks with a device each, as the fixture `ranks` has them on a CPU."""
    library = building.build(ROOT / ".cache" / "pretended_gpu")
    with ranks_by_number(building.environment(library)) as worlds:
        yield worlds


def of_model(folder: str, micro_batch: int) -> list[str]:
    """Settings that both models of this file take: where it lies, and tokens of a micro-batch."""
    return [
        f"actor_rollout_ref.model.path={folder}",
        f"{ACTOR}.ppo_max_token_len_per_gpu={micro_batch}",
        f"{REF}.log_prob_max_token_len_per_gpu={micro_batch}",
    ]


def test_the_device_is_not_the_host(gpu_ranks, tmp_path):
    for seen in gpu_ranks[2].run(try_the_device, str(tmp_path)):
        assert all("Expected all tensors to be on the same device" in said for said in seen["mixed"])
        assert seen["pinned"] == (True, False)
        assert seen["bytes"] == (16000, 0)
        assert seen["given back"]  # NaN, not what was there
        assert seen["sum over ranks"] == [0, 2, 4, 6]
        assert "not contiguous" in seen["strided to NCCL"]
        assert seen["loaded"] == "cuda"


@pytest.mark.parametrize(
    ("case", "contexts", "overrides"),
    [
        (Case("1-rank", longest_prompt=24), [segments_on_a_cpu], []),
        (Case("offloaded-mini-batches", 2, prompts_per_step=3), [segments_on_a_cpu], OFFLOADED),
        (Case("ulysses", 2, ranks_per_sequence=2, tokens=18), [segments_on_a_cpu], []),
        pytest.param(Case("sorted-pairs", 2, loss="aot", tokens=28), [segments_on_a_cpu], [], marks=pytest.mark.long),
        pytest.param(
            Case("fsdp1-separate", 2, strategy="fsdp", share_prompt=False), [], OFFLOADED, marks=pytest.mark.long
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_worker_trains_like_plain_pytorch(case, contexts, overrides, tiny_models, gpu_ranks):
    ranks, folder = gpu_ranks[case.world_size], tiny_models[case.model]
    check_against_plain_pytorch(case, folder, ranks, contexts, [*FP32, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="fsdp2"),
        pytest.param([*OFFLOADED, FSDP1], id="offloaded-fsdp1"),
        pytest.param(OFFLOADED, id="offloaded-fsdp2", marks=pytest.mark.long),
    ],
)
def test_reference_follows_the_actor_in_the_profiles_precision(overrides, tiny_models, gpu_ranks, tmp_path):
    """To the bit: as loaded, refreshed, and resumed from a checkpoint that exports the model too."""
    settings = [
        *of_model(tiny_models["llama"], 420),
        f"{ACTOR}.optim.lr=1e-2",
        f"{ACTOR}.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        *overrides,
    ]
    seen, _ = gpu_ranks[2].run(refresh, settings, make_long_batch(), str(tmp_path))
    for stage in ("loaded", "refreshed", "resumed"):
        assert (seen[stage]["reference"] == seen[stage]["actor"]).all(), stage
    assert (seen["resumed"]["reference"] == seen["refreshed"]["reference"]).all()
    assert abs(seen["trained"]["actor"] - seen["trained"]["reference"]).max() > 1e-2
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "actor" / "huggingface")
    assert all(parameter.isfinite().all() for parameter in exported.parameters())


def test_the_doctors_probe_of_a_gpu_finds_nothing_wrong(gpu_ranks):
    (findings,) = gpu_ranks[1].run(probe_pretended_gpu)
    assert {finding.name: finding.verdict for finding in findings} == {
        name: OK for name in ("matrix products", "attention", "update", "refresh", "update's speed", "memory")
    }


PROMPTS, PROMPT, RESPONSE, MICRO_BATCH = 8, 192, 96, 768  # tokens; two rows
WITH_ROWS = 3e6  # bytes for places and masks of rows, adapters' norms and the like, of which the estimate knows nothing
LORA = ["actor_rollout_ref.model.lora_rank=16", "trainer.ref_update_freq=0"]
NOT_RECOMPUTED = "actor_rollout_ref.model.enable_gradient_checkpointing=False"


@pytest.fixture(scope="module")
def model_to_count(tmp_path_factory) -> str:
    """22 million weights, of which no part is small beside the others."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = Qwen2Config(vocab_size=8192, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(2, [FSDP1, *OFFLOADED], id="offloaded-fsdp1-2-ranks"),
        pytest.param(2, LORA, id="lora-2-ranks"),
        pytest.param(1, [], id="1-rank", marks=pytest.mark.long),
        pytest.param(1, ["actor_rollout_ref.keep_products=True"], id="keep-products", marks=pytest.mark.long),
        pytest.param(1, [f"{ACTOR}.fsdp_config.offload_policy=True"], id="offload-policy", marks=pytest.mark.long),
        pytest.param(2, OFFLOADED, id="offloaded-2-ranks", marks=pytest.mark.long),
        pytest.param(2, [FSDP1], id="fsdp1-2-ranks", marks=pytest.mark.long),
        pytest.param(2, [*LORA, *OFFLOADED[:2]], id="lora-offloaded-2-ranks", marks=pytest.mark.long),
        pytest.param(1, [NOT_RECOMPUTED], id="activations-kept", marks=pytest.mark.long),
    ],
)
def test_the_trainer_holds_what_is_estimated(ranks, overrides, model_to_count, gpu_ranks):
    """Never more, as the check before a run would then pass what does not fit, and not much less."""
    settings = [
        *of_model(model_to_count, MICRO_BATCH),
        f"trainer.n_gpus_per_node={ranks}",
        f"data.train_batch_size={PROMPTS}",
        f"data.max_prompt_length={PROMPT}",
        f"data.max_response_length={RESPONSE}",
        *overrides,
    ]
    counted, *_ = gpu_ranks[ranks].run(count_memory, settings, make_long_batch(PROMPTS, PROMPT, RESPONSE))
    config = compose(*settings, device="gpu")
    OmegaConf.resolve(config)
    model, layout = memory.Model.of(AutoConfig.from_pretrained(model_to_count)), fit.layout_of(config)
    held = memory.training(model, layout)
    processes = held.pop("processes")
    estimates = {
        "training": sum(held.values()),
        "waiting": memory.waiting(model, layout) - processes,
        "weights to vLLM": memory.waiting(model, layout) - processes + memory.sent_bytes(model, layout),
    }
    print({name: (f"{counted[name] / 1e6:.1f}", f"{estimates[name] / 1e6:.1f}") for name in counted})  # shown by -rP
    for name, estimate in estimates.items():
        assert 0.8 * estimate <= counted[name] < estimate + WITH_ROWS, name
