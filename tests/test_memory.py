"""The formula of memory: parts, phases, what settings change, and what is advised on GPUs of 24, 40 and 80 GB."""

import dataclasses
import json

import pytest
from checkable_run import composed, override
from omegaconf import OmegaConf

from benchmarks import growth, scaling
from benchmarks.growth import QWEN_0_5B, QWEN_3B, QWEN_7B
from benchmarks.tiny_models import save_tiny_model
from recipe.spin.checks import fit, machine, memory
from recipe.spin.checks.finding import FAIL, OK, WARN, Finding
from recipe.spin.checks.gpu import Device
from recipe.spin.checks.memory import KEPT_SCORE, SCORE, Layout, Model
from recipe.spin.common.settings import Settings
from recipe.spin.engine.logps import CHUNK

EIGHT = Layout(devices=8)
QWEN_3B_CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN_0_5B_CONFIG = QWEN_3B_CONFIG | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}


def gpu(gb: float, free: float | None = None) -> Device:
    return Device(f"a stand-in of {gb:g} GB", "580.1", gb * 1e9, (gb if free is None else free) * 1e9)


# ---- Parts -----------------------------------------------------------------------------------------------------------
def test_a_models_parameters_are_those_that_transformers_counts(tmp_path):
    """But for norms and biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = save_tiny_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    counted = sum(value.numel() for name, value in model.named_parameters() if "norm" not in name)
    assert Model.of(AutoConfig.from_pretrained(folder)).parameters == counted


def test_an_adapters_parameters_are_those_that_peft_adds(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = save_tiny_model(tmp_path, "llama")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules="all-linear"))
    trained, _ = adapted.get_nb_trainable_parameters()
    assert Model.of(AutoConfig.from_pretrained(folder)).adapter_parameters(4) == trained


def test_training_in_mixed_precision_takes_18_bytes_a_weight_on_one_device():
    held = memory.training(QWEN_3B, Layout())
    parts = {name: held[name] / QWEN_3B.parameters for name in ("weights", "gradients", "AdamW", "reference")}
    assert parts == {"weights": 4, "gradients": 4, "AdamW": 8, "reference": 2}


def test_logits_take_the_vocabulary_for_each_response_token_in_the_precision_of_arithmetic():
    """And in fp32, three times over, for as many as log-probs are computed of at once."""
    logits = memory.log_probs_moment(QWEN_3B, Layout(logits=1000))["logits"]
    assert logits == 151936 * (1000 * 2 + CHUNK * 3 * 4)


WIDE = dataclasses.replace(QWEN_3B, vocabulary=2**20)
FEW_TOKENS = Layout(tokens=512, logits=256)


@pytest.mark.parametrize(
    ("model", "layout", "moment"),
    [
        (QWEN_3B, Layout(logits=8192), memory.layer_moment),
        (WIDE, dataclasses.replace(FEW_TOKENS, lora_rank=32), memory.log_probs_moment),
        (WIDE, FEW_TOKENS, memory.embedding_moment),
    ],
)
def test_an_update_takes_what_its_fullest_moment_does(model, layout, moment):
    held, fullest = memory.training(model, layout), moment(model, layout)
    assert {name: held[name] for name in fullest} == fullest
    for other in (memory.layer_moment, memory.log_probs_moment, memory.embedding_moment):
        assert sum(other(model, layout).values()) <= sum(fullest.values())


def test_untied_embeddings_are_whole_one_at_a_time_but_with_fsdp1():
    untied = dataclasses.replace(QWEN_3B, tied=False)
    embedding, layer = untied.output_parameters, untied.layer_parameters
    assert memory.layer_moment(untied, Layout())["gathered"] == 2 * (layer + embedding)
    assert memory.layer_moment(QWEN_3B, Layout())["gathered"] == 2 * (2 * layer + embedding)
    assert memory.layer_moment(untied, Layout(flat=True))["gathered"] == 2 * (2 * layer + 2 * embedding)
    waiting = memory.layer_moment(QWEN_3B, Layout())["summed"] - memory.layer_moment(untied, Layout())["summed"]
    assert waiting == 2 * embedding  # the gradient of the output layer, which else is summed at once


def test_on_one_device_in_fp32_weights_are_whole_unless_they_come_from_the_host():
    plain = Layout(compute_bytes=4)
    assert memory.training(QWEN_3B, plain)["gathered"] == 0
    assert memory.training(QWEN_3B, dataclasses.replace(plain, offload_policy=True))["gathered"] > 0


@pytest.mark.parametrize(
    ("changes", "bytes_a_weight"),
    [
        ({"devices": 1}, 2),  # as it is sent
        ({}, 2 + 2 / 8),
        ({"param_offload": True}, 2 + 2 / 8),
        ({"devices": 1, "param_offload": True}, 4 + 2),
        ({"devices": 2, "offload_policy": True}, 3),
    ],
)
def test_an_embedding_on_its_way_to_vllm_is_fetched_rounded_and_gathered(changes, bytes_a_weight):
    layout = dataclasses.replace(EIGHT, **changes)
    assert memory.sent_bytes(QWEN_7B, layout) == bytes_a_weight * QWEN_7B.output_parameters


def test_fsdp1_copies_the_shard_and_gathers_both_embeddings_for_vllm():
    sent = 4 * (QWEN_7B.parameters / 8 + QWEN_7B.end_parameters) + (4 + 2) * QWEN_7B.output_parameters
    assert memory.sent_bytes(QWEN_7B, dataclasses.replace(EIGHT, flat=True)) == sent


@pytest.mark.parametrize(
    ("shape", "changes", "waiting"),
    [
        ({"caps_scores": True}, {}, 0),
        ({"caps_scores": True}, {"keeps_products": True}, 2),
        ({"caps_scores": True}, {"checkpointing": False}, KEPT_SCORE),
        (
            {"head_size": 100},
            {},
            0,
        ),  # flash attention takes steps of 8, and so does what does without scores under a mask
        ({}, {"eager": True}, 0),
        ({"caps_scores": True}, {"kernel_caps_scores": True}, None),
        ({"head_size": 512}, {}, None),
        ({}, {}, None),
    ],
)
def test_scores_count_where_no_attention_kernel_does_without_them(shape, changes, waiting):
    model, layout = dataclasses.replace(QWEN_3B, **shape), Layout(tokens=1000, logits=0, **changes)
    scores = 0 if waiting is None else model.heads * 1000**2
    assert memory.kept_scores(model, layout) == scores
    more = dataclasses.replace(layout, tokens=2000)
    for bytes_of, a_score in ((memory.kept_bytes, (model.layers - 1) * (waiting or 0)), (memory.layer_bytes, SCORE)):
        linear = bytes_of(model, layout) - scores * a_score
        assert bytes_of(model, more) == pytest.approx(2 * linear + 4 * scores * a_score)


def test_scores_of_short_rows_are_those_of_each_row():
    model = dataclasses.replace(QWEN_3B, caps_scores=True)
    layout = Layout(tokens=16384, rows=8, row=2560)
    assert memory.kept_scores(model, layout) == model.heads * 8 * 2560**2
    shared = dataclasses.replace(layout, tokens=8192, ranks_per_sequence=2)
    assert 2 * memory.kept_scores(model, shared) == memory.kept_scores(model, layout)
    whole = dataclasses.replace(layout, eager=True)
    assert memory.kept_scores(model, whole) == model.heads * 16384**2


def test_gradients_are_whole_only_while_their_reduction_is_deferred():
    whole = dataclasses.replace(EIGHT, whole_gradients=True)
    assert memory.training(QWEN_3B, whole)["gradients"] == 8 * memory.training(QWEN_3B, EIGHT)["gradients"]


@pytest.mark.parametrize(
    ("changes", "lower", "same"),
    [
        ({"reference_offload": True}, "training", "nothing"),
        ({"optimizer_offload": True}, "generation", "training"),
        ({"param_offload": True}, "generation", "training"),
        ({"rollout_share": 0.3}, "generation", "training"),
        ({"tokens": 4096, "logits": 4096}, "training", "generation"),
        ({"rollout_devices": 2}, "weights to vLLM", "generation"),
    ],
)
def test_a_setting_lowers_its_phase_and_leaves_another(changes, lower, same):
    """What is offloaded comes back for training (verl's train mode loads it), so that only vLLM has more room."""
    before = memory.peaks(QWEN_3B, EIGHT, 80e9) | {"nothing": 0}
    after = memory.peaks(QWEN_3B, dataclasses.replace(EIGHT, **changes), 80e9) | {"nothing": 0}
    assert after[lower] < before[lower] and after[same] == before[same]


def test_vllm_that_does_not_sleep_stays_beside_training():
    awake = dataclasses.replace(EIGHT, rollout_sleeps=False)
    more = memory.peaks(QWEN_3B, awake, 80e9)["training"] - memory.peaks(QWEN_3B, EIGHT, 80e9)["training"]
    assert more == pytest.approx(0.5 * 80e9)


def test_with_lora_only_adapters_have_gradients_and_moments_and_there_is_no_reference():
    held = memory.training(QWEN_3B, Layout(lora_rank=32))
    adapters = QWEN_3B.adapter_parameters(32)
    assert held["gradients"] + held["AdamW"] == 12 * adapters and held["reference"] == 0
    assert held["weights"] == 4 * (QWEN_3B.parameters + adapters)


def test_the_offload_policy_keeps_nothing_sharded_on_the_device():
    held = memory.training(QWEN_3B, dataclasses.replace(EIGHT, offload_policy=True))
    assert held["weights"] == held["gradients"] == held["AdamW"] == 0


# ---- Host and disk ---------------------------------------------------------------------------------------------------
def test_every_rank_loads_a_model_with_tied_embeddings():
    """3B on 8 ranks: 100 GB of weights; without ties one rank loads for all."""
    processes = 8 * memory.RANK_PROCESSES + memory.NODE_PROCESSES
    assert memory.host_bytes(QWEN_3B, EIGHT, ranks=8) == 8 * 4 * QWEN_3B.parameters + processes
    assert memory.host_bytes(QWEN_7B, EIGHT, ranks=8) == 4 * QWEN_7B.parameters + processes


# All matrices are powers of two, as query, key and value together are, and gate and up
EVEN = Model(4, 1024, 4096, heads=8, kv_heads=4, head_size=128, vocabulary=2**15, tied=False)


@pytest.mark.parametrize(
    ("changes", "bytes_a_weight"),
    [
        ({"param_offload": True}, 4),
        ({"optimizer_offload": True}, 8),
        ({"reference_offload": True}, 2),
        ({"param_offload": True, "optimizer_offload": True, "reference_offload": True}, 14),
        ({"offload_policy": True}, 16),  # gradients too
    ],
)
def test_what_is_offloaded_waits_on_the_host(changes, bytes_a_weight):
    assert memory.waiting_on_host(EVEN, EIGHT) == 0
    assert memory.waiting_on_host(EVEN, dataclasses.replace(EIGHT, **changes)) == bytes_a_weight * EVEN.parameters / 8


def test_what_waits_on_the_host_takes_powers_of_two():
    """Pinned memory, a matrix each; a device's share of a matrix of 7B, 34 MB, takes 67."""
    layout = dataclasses.replace(EIGHT, param_offload=True)
    uneven = dataclasses.replace(EVEN, intermediate=3072)
    assert memory.waiting_on_host(uneven, layout) == memory.waiting_on_host(EVEN, layout)
    assert memory.waiting_on_host(QWEN_7B, layout) > 1.8 * 4 * QWEN_7B.parameters / 8
    policy = dataclasses.replace(EIGHT, offload_policy=True)
    moments = 8 * (EVEN.parameters - uneven.parameters) / 8  # that AdamW makes there itself, not pinned
    assert memory.waiting_on_host(EVEN, policy) - memory.waiting_on_host(uneven, policy) == moments


def test_fsdp1_moves_a_layer_in_one():
    layout = Layout(param_offload=True, flat=True)
    whole = 4 * 2**26 + 2**28  # of 61 MB a layer, and both embeddings
    assert memory.waiting_on_host(dataclasses.replace(EVEN, kv_heads=2), layout) == whole


def test_a_sleeping_rollout_with_adapters_waits_on_the_host():
    """Each rank's vLLM keeps what it holds of the base model, for nothing sends it anew."""
    adapters = dataclasses.replace(EIGHT, lora_rank=32, rollout_waits_on_host=True, rollout_devices=2)
    assert memory.waiting_on_host(EVEN, adapters) == 2 * EVEN.parameters / 2


def test_of_an_optimizer_that_waits_on_the_host_adapters_have_moments_alone():
    layout = Layout(optimizer_offload=True, lora_rank=32)
    assert memory.waiting_on_host(EVEN, layout) == 8 * EVEN.adapter_parameters(32)
    with_weights = dataclasses.replace(layout, param_offload=True)
    weights = EVEN.parameters + EVEN.adapter_parameters(32)
    assert memory.waiting_on_host(EVEN, with_weights) - memory.waiting_on_host(EVEN, layout) == 4 * weights


def test_a_checkpoint_gathers_the_whole_model_beside_what_waits_on_the_host():
    """Tied embeddings under both their names."""
    saving = Layout(param_offload=True, optimizer_offload=True, gathers_on_host=True)
    processes = memory.RANK_PROCESSES + memory.NODE_PROCESSES
    assert memory.host_bytes(EVEN, saving, ranks=1) == (4 + 8 + 4) * EVEN.parameters + processes
    tied = dataclasses.replace(EVEN, tied=True)
    assert memory.host_bytes(tied, saving, ranks=1) == (4 + 8) * tied.parameters + 4 * EVEN.parameters + processes


def test_a_checkpoint_holds_weights_moments_the_exported_model_and_the_reference():
    contents = ["model", "optimizer", "extra", "hf_model"]
    assert memory.checkpoint_bytes(QWEN_3B, contents, 2) == (4 + 8 + 4 + 2) * QWEN_3B.parameters  # 55 GB
    assert memory.checkpoint_bytes(QWEN_3B, ["hf_model"], 0) == 4 * QWEN_3B.parameters


def test_a_checkpoint_with_adapters_goes_without_the_base_model():
    """But for the merged one; and the adapters themselves lie there twice."""
    adapters = QWEN_3B.adapter_parameters(32)
    contents = ["model", "optimizer", "extra", "hf_model"]
    assert memory.checkpoint_bytes(QWEN_3B, contents, 0, 32) == 4 * QWEN_3B.parameters + (4 + 4 + 8) * adapters
    assert memory.checkpoint_bytes(QWEN_3B, ["model"], 0, 32) == 8 * adapters


def test_a_checkpoints_estimate_is_what_torch_writes(tmp_path):
    """Weights and AdamW of a plain model, saved as verl saves them, file by file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = save_tiny_model(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    estimate = memory.checkpoint_bytes(Model.of(AutoConfig.from_pretrained(folder)), ["model", "optimizer"], 0)
    written = sum((tmp_path / f"{name}.pt").stat().st_size for name in ("model", "optimizer"))
    assert estimate == pytest.approx(written, rel=0.05)


# ---- From the settings -----------------------------------------------------------------------------------------------
def layout(*overrides: str) -> Layout:
    config = override(composed("gpu"), list(overrides))
    OmegaConf.resolve(config)
    return fit.layout_of(config)


def test_the_gpu_profiles_layout():
    found = layout("trainer.n_gpus_per_node=8", "data.train_batch_size=256")
    assert (found.devices, found.tokens, found.whole_gradients) == (8, 16384, False)
    assert found.logits == 16384 * 2048 / 2560  # the longest prompt with two of the longest responses
    assert (found.compute_bytes, found.reference_bytes, found.checkpointing) == (2, 2, True)
    assert found.rollout_share == 0.5 and layout("trainer.n_gpus_per_node=1").rollout_share == 0.4


LORA = ["actor_rollout_ref.model.lora_rank=32", "trainer.ref_update_freq=0"]
SHARDS_ALONE = "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]"


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["trainer.n_gpus_per_node=8", "trainer.nnodes=2"], {"devices": 16}),
        (["trainer.n_gpus_per_node=8", "actor_rollout_ref.actor.fsdp_config.fsdp_size=4"], {"devices": 4}),
        (["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096"], {"tokens": 4096}),
        # two prompts a GPU do not fill a micro-batch
        (["trainer.n_gpus_per_node=8", "actor_rollout_ref.actor.ppo_mini_batch_size=16"], {"tokens": 2 * 2560}),
        (["actor_rollout_ref.actor.use_dynamic_bsz=False"], {"tokens": 8 * 2560}),
        (["actor_rollout_ref.share_prompt=False"], {"logits": 16384 * 2048 / 3072}),
        (["actor_rollout_ref.keep_products=True"], {"checkpointing": True, "keeps_products": True}),
        (
            [
                "trainer.n_gpus_per_node=8",
                "actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation=True",
            ],
            {"whole_gradients": True},
        ),
        (["actor_rollout_ref.actor.fsdp_config.optimizer_offload=True"], {"optimizer_offload": True}),
        (["actor_rollout_ref.rollout.gpu_memory_utilization=0.3"], {"rollout_share": 0.3}),
        (["actor_rollout_ref.rollout.max_num_seqs=64"], {"rollout_sequences": 64}),
        ([], {"rollout_sleeps": True, "rollout_waits_on_host": False, "gathers_on_host": True, "flat": False}),
        (["actor_rollout_ref.rollout.free_cache_engine=False"], {"rollout_sleeps": False}),
        (["+actor_rollout_ref.rollout.enable_sleep_mode=False"], {"rollout_sleeps": False}),
        (LORA, {"rollout_waits_on_host": True}),
        ([*LORA, "+actor_rollout_ref.rollout.enable_sleep_mode=False"], {"rollout_waits_on_host": False}),
        ([SHARDS_ALONE], {"gathers_on_host": False}),
        ([SHARDS_ALONE, *LORA], {"gathers_on_host": True}),  # for the adapter
        (["trainer.save_freq=-1"], {"gathers_on_host": False}),
        (["actor_rollout_ref.actor.strategy=fsdp"], {"flat": True}),
    ],
)
def test_settings_make_the_layout(overrides, changes):
    found = layout("trainer.n_gpus_per_node=1", "data.train_batch_size=256", *overrides)
    assert {name: getattr(found, name) for name in changes} == changes


# ---- On stand-in devices ---------------------------------------------------------------------------------------------
@pytest.fixture
def qwen(tmp_path):
    """Folders with the configurations of models that are too large for a test."""

    def save(name: str) -> str:
        shape = {"0.5B": QWEN_0_5B_CONFIG, "3B": QWEN_3B_CONFIG, "long": LONG_CONFIG, "gemma2": GEMMA_2_2B_CONFIG}[name]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **shape}))
        return str(folder)

    return save


def examined(model: str, device: Device, *overrides: str) -> Finding:
    settings = [f"actor_rollout_ref.model.path={model}", "trainer.n_gpus_per_node=1", *overrides]
    config = override(composed("gpu"), settings)
    OmegaConf.resolve(config)
    shape, doubt = fit.load_shape(config)
    assert shape is not None, doubt
    return fit.check_device_memory(config, shape, [device])


def test_half_a_billion_weights_fit_24_gb_with_the_profiles_settings(qwen):
    finding = examined(qwen("0.5B"), gpu(24))
    assert finding.verdict == OK, finding.text
    assert max(finding.figures["phases"].values()) < 24e9


@pytest.mark.parametrize("gb", [24, 40])
def test_three_billion_do_not_fit_one_small_gpu_and_the_remedy_does(qwen, gb):
    folder = qwen("3B")
    finding = examined(folder, gpu(gb))
    assert finding.verdict == FAIL
    assert "lora_rank=32 trainer.ref_update_freq=0" in finding.text
    advice = finding.text.split(" makes it ")[0].split("; ")[-1].split()
    assert examined(folder, gpu(gb), *advice).verdict == OK


def test_three_billion_on_one_of_80_gb_leave_vllm_less(qwen):
    folder = qwen("3B")
    finding = examined(folder, gpu(80), "actor_rollout_ref.rollout.gpu_memory_utilization=0.5")
    assert finding.verdict == FAIL
    assert "actor_rollout_ref.rollout.gpu_memory_utilization=0.4 makes it 77" in finding.text
    for key in ("optimizer_offload=True (", "param_offload=True (", "lora_rank=32"):
        assert key in finding.text
    assert examined(folder, gpu(80)).verdict == OK  # the profile's share for one GPU


def test_a_gpu_that_nothing_helps_leaves_the_processor(qwen):
    finding = examined(qwen("0.5B"), gpu(4))
    assert finding.verdict == FAIL and "no setting makes it fit" in finding.text
    assert "SPIN_PROFILE=cpu" in finding.text


def test_self_play_is_not_told_to_use_adapters(qwen):
    """check_config refuses them: vLLM plays the reference."""
    finding = examined(qwen("3B"), gpu(24), "algorithm.preference_source=self_play")
    assert finding.verdict == FAIL and "lora_rank" not in finding.text


def test_memory_that_others_hold_counts(qwen):
    finding = examined(qwen("0.5B"), gpu(24, free=15))
    assert finding.verdict == FAIL and "15.0 of 24.0 GB are free" in finding.text


def test_a_share_too_small_for_vllms_weights_is_refused(qwen):
    finding = examined(qwen("3B"), gpu(80), "actor_rollout_ref.rollout.gpu_memory_utilization=0.05")
    assert finding.verdict == FAIL
    assert "gpu_memory_utilization=0.05 gives vLLM 4.0 GB" in finding.text
    assert "actor_rollout_ref.rollout.gpu_memory_utilization=0.15 makes it" in finding.text


GEMMA_2_2B_CONFIG = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
    "attn_logit_softcapping": 50.0,
    "max_position_embeddings": 8192,
}


def test_capped_scores_take_small_micro_batches_or_flash_attn_2(qwen, monkeypatch):
    """Those of 8 rows of 2,560 tokens take 7 GB."""
    folder = qwen("gemma2")
    settings = ["trainer.n_gpus_per_node=8"]
    monkeypatch.setattr(fit, "has_flash_attention_2", lambda: False)
    finding = examined(folder, gpu(24), *settings)
    assert finding.verdict == FAIL and "ppo_max_token_len_per_gpu=4096" in finding.text
    tokens = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096"
    assert examined(folder, gpu(24), *settings, tokens).verdict == OK
    monkeypatch.setattr(fit, "has_flash_attention_2", lambda: True)
    assert examined(folder, gpu(24), *settings).verdict == OK


@pytest.mark.parametrize(
    ("gb", "overrides", "hinted"),
    [
        (80, [], True),
        (24, [], False),  # the run fits, and not with all products
        (80, ["actor_rollout_ref.keep_products=True"], False),
        (80, ["actor_rollout_ref.model.enable_gradient_checkpointing=False"], False),
        (80, ["actor_rollout_ref.model.enable_activation_offload=True"], False),
    ],
)
def test_memory_for_what_is_computed_twice_is_told_before_the_run(qwen, gb, overrides, hinted, monkeypatch, capsys):
    monkeypatch.setattr(machine, "devices", lambda: [gpu(gb)])
    for check in ("check_driver", "check_devices", "check_system", "check_compiler"):
        monkeypatch.setattr(machine, check, lambda *_: Finding("", OK, ""))
    for check in ("check_cores", "check_host_memory", "check_disk", "check_shared_memory"):
        monkeypatch.setattr(machine, check, lambda *_: Finding("", OK, ""))
    path = f"actor_rollout_ref.model.path={qwen('0.5B')}"
    config = override(composed("gpu"), [path, "trainer.n_gpus_per_node=1", *overrides])
    OmegaConf.resolve(config)
    assert machine.machine_faults(Settings(config)) == []
    told = capsys.readouterr().err
    assert ("[spin] actor_rollout_ref.keep_products=True would spare" in told) == hinted
    assert (f" of the {gb}.0 GB that are free" in told) == hinted


# Llama-3.2-3B's, without its scaled rotary frequencies
LONG_CONFIG = QWEN_3B_CONFIG | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def test_vllm_must_hold_the_longest_sequence_that_it_is_to_take(qwen):
    """Without rollout.max_model_len that is the model's 131,072 tokens, with 15 GB of keys and values; vLLM refuses to
    start with less, however short prompts and responses are."""
    folder, adapters = qwen("long"), ["actor_rollout_ref.model.lora_rank=32", "trainer.ref_update_freq=0"]
    finding = examined(folder, gpu(40), *adapters)
    assert finding.verdict == FAIL and "a sequence of 131072 tokens" in finding.text
    assert "actor_rollout_ref.rollout.max_model_len=1536 makes it" in finding.text
    assert examined(folder, gpu(40), *adapters, "actor_rollout_ref.rollout.max_model_len=1536").verdict == OK


def test_vllm_sets_cuda_graphs_aside_unless_it_is_told_to_do_without():
    """It starts only with room for the longest sequence beside them."""
    graphs, eager = layout("trainer.n_gpus_per_node=1"), "actor_rollout_ref.rollout.enforce_eager=True"
    without = layout("trainer.n_gpus_per_node=1", eager)
    assert memory.rollout_need(QWEN_3B, graphs) - memory.rollout_need(QWEN_3B, without) == memory.CUDA_GRAPHS > 0


def test_vllms_sampler_holds_the_vocabulary_for_each_sequence():
    """18 bytes an entry: 2.4 GB for Gemma's 256,000 tokens and 512 sequences, on each device of a vLLM."""
    large, small = dataclasses.replace(QWEN_3B, vocabulary=256000), dataclasses.replace(QWEN_3B, vocabulary=32000)

    def beside_weights(model: Model, **changes) -> float:
        layout = Layout(longest=0, rollout_graphs=False, rollout_devices=2, **changes)
        return memory.rollout_need(model, layout) - model.parameters * 2 / 2

    assert beside_weights(large) == 18 * 512 * 256000
    assert beside_weights(large, rollout_sequences=64) == beside_weights(small) == memory.ROLLOUT_WORKSPACE


def test_layers_with_a_window_hold_no_whole_sequence():
    from transformers import Qwen2Config

    config = Qwen2Config(**QWEN_3B_CONFIG, use_sliding_window=True, max_window_layers=30, sliding_window=4096)
    model, whole = Model.of(config), Model.of(Qwen2Config(**QWEN_3B_CONFIG))
    assert (model.layers, model.whole_layers, whole.whole_layers) == (36, 30, 36)
    assert memory.rollout_need(model, Layout(longest=None)) < memory.rollout_need(whole, Layout(longest=None))


def test_the_fullest_of_several_gpus_decides(qwen):
    folder = qwen("0.5B")
    config = override(composed("gpu"), [f"actor_rollout_ref.model.path={folder}", "trainer.n_gpus_per_node=2"])
    OmegaConf.resolve(config)
    shape, _ = fit.load_shape(config)
    assert fit.check_device_memory(config, shape, [gpu(80), gpu(80, free=5)]).verdict == FAIL
    assert fit.check_device_memory(config, shape, [gpu(80), gpu(80), gpu(80, free=5)]).verdict == OK
    assert fit.check_device_memory(config, shape, []).verdict == WARN


def test_no_setting_makes_seven_billion_fit_one_of_24_gb():
    assert fit.fitting(QWEN_7B, Layout(), 24e9, row=2560) is None


@pytest.mark.parametrize("model", [QWEN_0_5B, QWEN_3B, QWEN_7B])
@pytest.mark.parametrize("device", [growth.A10, growth.A100, growth.H100], ids=lambda device: device.name)
@pytest.mark.parametrize("gpus", [1, 8])
def test_what_is_advised_fits_and_nothing_in_it_could_be_left_out(model, device, gpus):
    start = growth.layout_of(device, scaling.PROFILE_FULLEST, gpus)
    found = fit.fitting(model, start, device.memory, row=scaling.LONGEST_ROW)
    if gpus == 1 and model is QWEN_7B and device is not growth.H100:
        assert found is None
        return
    settings, layout = found
    assert fit.fits(model, layout, device.memory, device.memory)
    known = {remedy.settings: remedy for remedy in fit.remedies(model, start, device.memory, scaling.LONGEST_ROW)}
    for left_out in settings:
        rest = start
        for one in settings:
            rest = known[one].apply(rest) if one != left_out else rest
        assert not fit.fits(model, rest, device.memory, device.memory)


def test_the_tables_and_the_check_have_one_formula():
    found = growth.predict(growth.H100, QWEN_3B, scaling.PROFILE_FULLEST, 8)
    layout = growth.layout_of(growth.H100, scaling.PROFILE_FULLEST, 8)
    assert found.memory == memory.training(QWEN_3B, layout)
    assert found.peaks == memory.peaks(QWEN_3B, layout, 80e9)
