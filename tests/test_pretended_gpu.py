"""The trainer's side of a run on GPUs, without one: on a device that is not the host (pretended_gpu/).

Tensors of host and device do not mix there; what is pinned, offloaded, gathered and given back is so, collectives take
the device's tensors alone, and every byte is counted. CUDA's kernels and streams, NCCL itself and vLLM are not in it.
"""

import numpy as np
import pytest
from as_on_gpus import segments_on_a_cpu
from device_jobs import compare_pushes, count_memory, count_memory_of_a_resume, probe_pretended_gpu, try_the_device
from omegaconf import OmegaConf
from pretended_gpu import building
from safetensors.torch import load_file
from test_update import Case, check_against_plain_pytorch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config
from worker_harness import ROOT, compose, ranks_by_number
from worker_jobs import make_batches, make_long_batch, refresh, train_adapter

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
LORA = ["actor_rollout_ref.model.lora_rank=16", "trainer.ref_update_freq=0"]


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
        assert "of the host" in seen["the host's to NCCL"]
        assert seen["numbers of the host's"] == [0, 2, 4, 6] and seen["resized"] == [1, 2]
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


def test_vllm_gets_what_verl_would_gather_rounded(tiny_models, gpu_ranks):
    for model in ("llama", "qwen2"):
        for offloaded in ([], OFFLOADED):
            for same in gpu_ranks[2].run(compare_pushes, [*of_model(tiny_models[model], 420), *offloaded]):
                assert same and all(same.values()), same


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("fsdp", marks=pytest.mark.long)])
def test_adapters_train_and_resume_in_the_profiles_precision(strategy, tiny_models, gpu_ranks, tmp_path):
    """The reference was asked before the first update, as in a resumed run."""
    settings = [
        *of_model(tiny_models["llama"], 420),
        *LORA,
        f"{ACTOR}.strategy={strategy}",
        f"{ACTOR}.optim.lr=1e-2",
        *OFFLOADED[:2],
    ]
    trained, _ = gpu_ranks[2].run(train_adapter, settings, make_batches()[:3], str(tmp_path))
    seen = trained["seen"]
    assert np.median(abs(seen["trained"] - seen["base"])) > 1e-2
    for stage in ("saved", "resumed"):
        np.testing.assert_array_equal(seen[stage], seen["trained"])
    exported = load_file(tmp_path / "actor" / "lora_adapter" / "adapter_model.safetensors")
    assert exported and all(tensor.isfinite().all() for tensor in exported.values())


def test_the_doctors_probe_of_a_gpu_finds_nothing_wrong(gpu_ranks):
    (findings,) = gpu_ranks[1].run(probe_pretended_gpu)
    assert {finding.name: finding.verdict for finding in findings} == {
        name: OK for name in ("matrix products", "attention", "update", "refresh", "update's speed", "memory")
    }


PROMPTS, PROMPT, RESPONSE, MICRO_BATCH = 8, 192, 96, 768  # tokens; two rows
WITH_ROWS = 2e6  # bytes for places and masks of rows, adapters' norms and the like, of which the estimate knows nothing
NOT_RECOMPUTED = "actor_rollout_ref.model.enable_gradient_checkpointing=False"


# 22 to 55 million weights; vocabulary, and whether embeddings are tied. The larger rules what an update takes
MODELS = {"tied": (8192, True), "untied": (8192, False), "large": (32768, True), "large-untied": (32768, False)}


@pytest.fixture(scope="module")
def models_to_count(tmp_path_factory) -> dict[str, str]:
    """The folder of each of MODELS."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    folders = {}
    for name, (vocabulary, tied) in MODELS.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        config = Qwen2Config(vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=tied, **shape)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        make_tokenizer().save_pretrained(folders[name])
    return folders


def counting(name: str, ranks: int, overrides: list[str], model: str = "tied", marks=pytest.mark.long):
    """A layout whose memory is counted."""
    return pytest.param(ranks, overrides, model, id=name, marks=marks)


@pytest.mark.parametrize(
    ("ranks", "overrides", "model"),
    [
        counting("offloaded-fsdp1-2-ranks", 2, [FSDP1, *OFFLOADED], marks=()),
        counting("lora-2-ranks-large", 2, LORA, "large", marks=()),
        counting("1-rank-untied", 1, [], "untied"),
        counting("keep-products", 1, ["actor_rollout_ref.keep_products=True"]),
        counting("activations-kept", 1, [NOT_RECOMPUTED]),
        counting("offload-policy", 1, [f"{ACTOR}.fsdp_config.offload_policy=True"]),
        counting("offloaded-2-ranks", 2, OFFLOADED),
        counting("2-ranks-large", 2, [], "large"),
        counting("2-ranks-large-untied", 2, [], "large-untied"),
        counting("fsdp1-2-ranks-large-untied", 2, [FSDP1], "large-untied"),
        counting("lora-offloaded-2-ranks", 2, [*LORA, *OFFLOADED[:2]]),
    ],
)
def test_the_trainer_holds_what_is_estimated(ranks, overrides, model, models_to_count, gpu_ranks, tmp_path):
    """Never more, as the check before a run would then pass what does not fit, and not much less."""
    folder = models_to_count[model]
    settings = [
        *of_model(folder, MICRO_BATCH),
        f"trainer.n_gpus_per_node={ranks}",
        f"data.train_batch_size={PROMPTS}",
        f"data.max_prompt_length={PROMPT}",
        f"data.max_response_length={RESPONSE}",
        *overrides,
    ]
    saved = str(tmp_path / "actor")
    counted, *_ = gpu_ranks[ranks].run(count_memory, settings, make_long_batch(PROMPTS, PROMPT, RESPONSE), saved)
    counted["resuming"] = gpu_ranks[ranks].run(count_memory_of_a_resume, settings, saved)[0]
    config = compose(*settings, device="gpu")
    OmegaConf.resolve(config)
    shape, layout = memory.Model.of(AutoConfig.from_pretrained(folder)), fit.layout_of(config)
    waiting = memory.waiting(shape, layout) - memory.PROCESSES
    estimates = {
        "training": memory.tensor_bytes(memory.training(shape, layout)),
        "waiting": waiting,
        "weights to vLLM": waiting + memory.sent_bytes(shape, layout),
    }
    shown = {name: f"{counted[name] / 1e6:.1f} ({estimates[name] / 1e6:.1f})" for name in estimates}
    print(f"counted, MB (estimated): {shown}")  # shown by -rP
    for name, estimate in estimates.items():
        assert 0.9 * estimate <= counted[name] < estimate + WITH_ROWS, name
    assert max(counted["saving"], counted["resuming"]) <= max(counted["training"], counted["weights to vLLM"])
