"""Checkpoints of a run with LoRA: the merged model and the adapter are the model that was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_model import load_model, response_logp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from worker_jobs import make_batches, train_adapter

from recipe.spin.engine.adapter import save_adapter

BATCHES = make_batches()[:3]
TOKENS = torch.arange(40).view(2, 20)
LAYOUTS = {
    "1-rank": (1, "fsdp2"),
    "fsdp2-2-ranks": (2, "fsdp2"),
    "fsdp1-2-ranks": (2, "fsdp"),
}


def exact_model(folder: str | Path):
    """In fp64, as merging changes the order of sums."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def adapted(folder: str, targets: str | list[str]) -> PeftModel:
    """A model with an adapter that changes its logits by about as much as they are."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(exact_model(folder), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def with_adapter(folder: Path, load=load_model) -> PeftModel:
    """The adapter in a folder on the model that it names."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(load(base), folder)


@pytest.mark.parametrize(
    ("architecture", "targets", "tied"),
    [
        ("llama", "all-linear", False),
        ("qwen2", "all-linear", True),  # its embeddings are one
        ("qwen2", ["q_proj", "lm_head"], False),  # and are not any more
        ("qwen2", ["q_proj", "embed_tokens"], False),
    ],
)
def test_both_are_the_model_that_was_trained(tiny_models, tmp_path, architecture, targets, tied):
    base = tiny_models[architecture]
    model = adapted(base, targets)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_adapter(model, model.state_dict(), base, tmp_path / "adapter", tmp_path / "merged")

    expected = logits(model)
    assert not torch.allclose(expected, logits(exact_model(base)), atol=0.1)
    torch.testing.assert_close(logits(exact_model(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(with_adapter(tmp_path / "adapter", exact_model)), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is tied
    # The tensors were those of the model itself, as on one rank, and it trains on
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_not_finite_is_refused(tiny_models, tmp_path):
    model = adapted(tiny_models["llama"], ["q_proj"])
    torch.nn.init.constant_(model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight, torch.nan)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        save_adapter(model, model.state_dict(), tiny_models["llama"], tmp_path / "adapter", tmp_path / "merged")


def overrides(folder: str, strategy: str, contents: str) -> list[str]:
    return [
        f"actor_rollout_ref.model.path={folder}",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora_alpha=16",
        "actor_rollout_ref.model.target_modules=all-linear",
        f"actor_rollout_ref.actor.strategy={strategy}",
        f"actor_rollout_ref.actor.checkpoint.save_contents=[{contents}]",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "data.train_batch_size=6",
        "trainer.ref_update_freq=0",
    ]


def logps(model, rows) -> np.ndarray:
    with torch.no_grad():
        return np.array([response_logp(model, *row, temperature=1.0).item() for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "strategy"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_checkpoint_holds_the_merged_model_and_the_adapter(
    tiny_models, ranks, tmp_path, world_size, strategy, architecture
):
    base = tiny_models[architecture]
    settings = overrides(base, strategy, "model,optimizer,extra,hf_model")
    trained, *_ = ranks[world_size].run(train_adapter, settings, BATCHES, str(tmp_path))
    rows, seen, actor = trained["rows"], trained["seen"], tmp_path / "actor"
    assert np.median(abs(seen["trained"] - seen["base"])) > 1e-2
    np.testing.assert_allclose(logps(load_model(str(actor / "huggingface")), rows), seen["trained"], atol=5e-5)
    np.testing.assert_allclose(logps(with_adapter(actor / "lora_adapter"), rows), seen["trained"], atol=5e-5)
    np.testing.assert_array_equal(seen["saved"], seen["trained"])  # saving changes nothing
    np.testing.assert_array_equal(seen["resumed"], seen["trained"])
    stored = json.loads((actor / "huggingface" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"  # as verl has it for any model
    weights = load_file(actor / "huggingface" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    resumable = torch.load(actor / f"model_world_size_{world_size}_rank_0.pt", weights_only=False)
    assert resumable and all("lora_" in name for name in resumable)  # the base model has files of its own
    assert weights.keys() == load_file(Path(base) / "model.safetensors").keys()


@pytest.mark.slow
def test_without_hf_model_a_checkpoint_holds_the_adapter_alone(tiny_models, ranks, tmp_path):
    settings = overrides(tiny_models["llama"], "fsdp2", "model,optimizer,extra")
    trained, *_ = ranks[1].run(train_adapter, settings, BATCHES, str(tmp_path))
    actor = tmp_path / "actor"
    adapted = logps(with_adapter(actor / "lora_adapter"), trained["rows"])
    np.testing.assert_allclose(adapted, trained["seen"]["trained"], atol=5e-5)
    assert not list((actor / "huggingface").glob("*.safetensors"))


@pytest.mark.slow
def test_adapters_train_in_bf16_after_the_reference_was_asked(tiny_models, ranks, tmp_path):
    """As in a run that is resumed: FSDP2 looks in the first pass for what trains, and peft has frozen them."""
    settings = overrides(tiny_models["llama"], "fsdp2", "model,optimizer,extra")
    bf16 = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"
    trained, *_ = ranks[1].run(train_adapter, [*settings, bf16], BATCHES, str(tmp_path))
    seen = trained["seen"]
    assert np.median(abs(seen["trained"] - seen["base"])) > 1e-2
    np.testing.assert_array_equal(seen["resumed"], seen["trained"])
