"""Models that cannot work are refused before Ray starts, by one message with the remedy."""

import errno
import inspect
import json
import re
import shutil
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from checkable_run import composed, override
from huggingface_hub.errors import OfflineModeIsEnabled
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig
from verl.models.transformers import monkey_patch

from recipe.spin import main_spin
from recipe.spin.checks import check, model_config, model_files
from recipe.spin.checks.model_files import BUCKET, fit_weight_bucket
from recipe.spin.checks.tensors import missing_tensors

PATH = "actor_rollout_ref.model.path"
TRUST = "actor_rollout_ref.model.trust_remote_code"


@pytest.mark.parametrize(
    ("missing", "words"),
    [("*.safetensors", "weights"), ("tokenizer.json", "tokenizer"), ("config.json", "config.json")],
)
def test_incomplete_model_folder(run, tmp_path, missing, words):
    folder = shutil.copytree(run.settings["actor_rollout_ref.model.path"], tmp_path / "model")
    for file in folder.glob(missing):
        file.unlink()
    message = run.refusal(f"actor_rollout_ref.model.path={folder}")
    assert message.startswith("actor_rollout_ref.model.path=") and str(folder) in message
    assert words in message and "save_pretrained" in message


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/no-such-model", "a-name", "a/b/c"])
def test_missing_model_folder(run, name):
    message = run.refusal(f"actor_rollout_ref.model.path='{name}'")
    assert f"actor_rollout_ref.model.path='{name}'" in message and "no such folder" in message


# ---- What a folder holds ---------------------------------------------------------------------------------------------
@pytest.fixture
def folder(run, tmp_path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(run.settings[PATH], tmp_path / "model"))


def change(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def shard(folder: Path) -> Path:
    """Tells of the weights as a part of several; returns the part that is there."""
    weights = folder / "model.safetensors"
    first = weights.rename(folder / "model-00001-of-00002.safetensors")
    parts = {"a": first.name, "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    return first


def cut_shard(folder: Path) -> None:
    first = shard(folder)
    shutil.copy(first, folder / "model-00002-of-00002.safetensors")
    cut(first)


def drop(folder: Path, part: str) -> None:
    """Leaves tensors out, by a part of their names."""
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if part not in name}, file)


DAMAGES = {
    "missing shard": (shard, ["model-00002-of-00002.safetensors is missing"]),
    "cut shard": (cut_shard, ["model-00001-of-00002.safetensors is cut off", "bytes"]),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), ["model.safetensors is cut off"]),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), ["is cut off", "it has 0 bytes"]),
    "no weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}"),
        ["holds no weights"],
    ),
    "other bytes": (
        lambda folder: (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"junk"),
        ["no safetensors file"],
    ),
    "index without files": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "broken json": (
        lambda folder: cut(folder / "config.json"),
        ["config.json cannot be read as JSON", "save_pretrained"],
    ),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json cannot be read as JSON"]),
    "a nest": (
        lambda folder: (folder / "config.json").write_text('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}"),
        ["config.json cannot be read as JSON", "recursion"],
    ),
    "an empty text part": (
        lambda folder: change(folder / "config.json", text_config={}),
        ["transformers cannot read config.json (a llama has no text_config, and it holds {})", "save_pretrained"],
    ),
    "layers in words": (
        lambda folder: change(folder / "config.json", num_hidden_layers="two"),
        ["transformers cannot read config.json", "num_hidden_layers"],
    ),
    "a list of architectures": (lambda folder: change(folder / "config.json", architectures=[[]]), ["a causal"]),
    "not causal": (
        lambda folder: change(folder / "config.json", architectures=["BertForMaskedLM"], model_type="bert"),
        ["BertForMaskedLM", "a causal language model"],
    ),
    "verl's own forward pass": (
        lambda folder: change(
            folder / "config.json", architectures=["Qwen3VLForConditionalGeneration"], model_type="qwen3_vl"
        ),
        ["of a qwen3_vl verl replaces the forward pass", "name a model of text"],
    ),
    "a type that nobody knows": (
        lambda folder: change(folder / "config.json", model_type="nope"),
        ["model_type 'nope', which transformers", "name a model that it knows"],
    ),
    "no type": (lambda folder: change(folder / "config.json", model_type=None), ["has the model_type None"]),
    "code of its own": (
        lambda folder: change(folder / "config.json", model_type="nope", auto_map={"AutoConfig": "a.B"}),
        ["model_type 'nope'", f"or set {TRUST}=True"],
    ),
    "another's type": (
        lambda folder: change(folder / "config.json", model_type="bert"),
        ["['LlamaForCausalLM'] and the model_type 'bert', of which transformers makes BertLMHeadModel"],
    ),
    "no output layer in verl": (
        lambda folder: change(folder / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        ["would load a GPT2LMHeadModel without its output layer"],
    ),
    "no writer's type": (
        lambda folder: change(folder / "config.json", model_type="vit"),
        ["the model_type 'vit', of which transformers makes no causal language model"],
    ),
    "quantized": (
        lambda folder: change(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantization_config (gptq)", "cannot be trained; take the model that it was made from"],
    ),
    "quantized as it is loaded": (
        lambda folder: change(
            folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        ["quantization_config (bitsandbytes)"],
    ),
    "no layer 1": (
        lambda folder: drop(folder, "layers.1."),
        ["the weights lack model.layers.1.self_attn.q_proj.weight, ", " and 6 more, which transformers would fill"],
    ),
    "no output": (lambda folder: drop(folder, "lm_head"), ["the weights lack lm_head.weight, which transformers"]),
    "no architecture": (lambda folder: change(folder / "config.json", architectures=None), ["a causal language model"]),
    "no vocabulary": (lambda folder: change(folder / "config.json", vocab_size=None), ["vocab_size must be a whole"]),
    "sizes in words": (
        lambda folder: change(folder / "config.json", vocab_size="many", hidden_size="2k"),
        ["vocab_size and hidden_size must be a whole number"],
    ),
    "broken tokenizer": (lambda folder: cut(folder / "tokenizer.json"), ["the tokenizer cannot be read"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_folder(run, folder, damage):
    spoil, words = DAMAGES[damage]
    spoil(folder)
    message = run.refusal(f"{PATH}={folder}")
    assert message.startswith(f"{PATH}='{folder}': "), message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("changes", [{}, {"auto_map": {"AutoConfig": "a.B"}}])
def test_a_model_may_bring_code_of_its_own(run, folder, monkeypatch, changes):
    """Where it is trusted, nothing is said of its type and its tensors."""
    monkeypatch.setattr(model_files, "load_tokenizer", lambda settings: None)
    monkeypatch.setattr(check, "machine_faults", lambda settings: [])  # it and the other would look for the code
    monkeypatch.setattr(model_files, "_check_language_model", lambda settings: None)
    change(folder / "config.json", model_type="nope", **changes)
    drop(folder, "layers.1.")
    overrides = [f"{PATH}={folder}", f"{TRUST}=True"]
    if changes:
        run.check(*overrides)
    else:
        assert "model_type 'nope'" in run.refusal(*overrides)


# ---- The tensors of a folder -----------------------------------------------------------------------------------------
def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "model.safetensors"
    save_file({name.replace(old, new, 1): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("old", "new"), [("model.", ""), ("model.layers", "model.h")], ids=["no prefix", "other names"]
)
def test_tensors_may_have_other_names(run, folder, old, new):
    """transformers adds a prefix that is missing; where most names are others, a check of names knows nothing."""
    rename(folder, old, new)
    run.check(f"{PATH}={folder}")


def test_an_output_that_is_the_embedding_is_in_no_file(run, tiny_models, folder):
    names = set(load_file(Path(tiny_models["qwen2"]) / "model.safetensors"))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    run.check(f"{PATH}={tiny_models['qwen2']}")
    drop(folder, "lm_head")
    run.check(f"{PATH}={folder}", "+actor_rollout_ref.model.override_config.tie_word_embeddings=True")


def test_tensors_that_transformers_merges_are_there(tmp_path):
    """The experts of a mixture are files' tensors one by one, and one in the model."""
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in load_file(file)
    assert missing_tensors(tmp_path, [file], {}) == []
    drop(tmp_path, "layers.1.block_sparse_moe.gate")
    assert missing_tensors(tmp_path, [file], {}) == ["model.layers.1.mlp.gate.weight"]


def test_an_index_of_files_that_are_not_loaded_is_passed_over(run, folder):
    """As a download without *.bin leaves it."""
    shutil.copy(shard(folder), folder / "model-00002-of-00002.safetensors")
    (folder / "a.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    run.check(f"{PATH}={folder}")


def test_model_in_whole_shards(run, folder):
    shutil.copy(shard(folder), folder / "model-00002-of-00002.safetensors")
    run.check(f"{PATH}={folder}")


def without_template(folder: Path) -> Path:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_model_without_a_chat_template(run, folder):
    message = run.refusal(f"{PATH}={without_template(folder)}")
    assert message.startswith(f"{PATH}='{folder}'") and "no chat template" in message
    assert "custom_chat_template" in message


def test_a_chat_template_of_ones_own(run, folder):
    template = "actor_rollout_ref.model.custom_chat_template='{{ messages[0].content }}'"
    run.check(f"{PATH}={without_template(folder)}", template)


# ---- What the attention on GPUs computes -----------------------------------------------------------------------------
@pytest.fixture
def with_gpu(monkeypatch):
    """A machine that the GPU profile could run on."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(check, "machine_faults", lambda _: [])


ONE_GPU = "trainer.n_gpus_per_node=1"
SEPARATE = "actor_rollout_ref.share_prompt=False"
ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_capped_attention_needs_no_kernel_that_caps(run, folder, with_gpu, device):
    """Gemma 2: the recipe's attention caps scores without one."""
    change(folder / "config.json", attn_logit_softcapping=50.0)
    run.check(f"{PATH}={folder}", ONE_GPU, device=device)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_capped_attention_whose_caps_would_be_left_out_is_refused(run, folder, with_gpu, device):
    """transformers' sdpa takes a cap and ignores it, and the policy would not be the model that vLLM runs."""
    change(folder / "config.json", attn_logit_softcapping=50.0)
    overrides = [f"{PATH}={folder}", ONE_GPU, SEPARATE]
    message = run.refusal(*overrides, f"{ATTENTION}=sdpa", device=device)
    for words in (f"{PATH}='{folder}'", "caps its attention scores (50.0)", f"{ATTENTION}=sdpa", "set it to eager"):
        assert words in message
    run.check(*overrides, f"{ATTENTION}=eager", device=device)


def test_capped_attention_of_a_model_in_the_hubs_cache(run, folder, with_gpu, monkeypatch):
    change(folder / "config.json", attn_logit_softcapping=50.0)
    monkeypatch.setattr(model_files, "_cached_file", lambda name, file: folder / file)
    monkeypatch.setattr(model_files, "load_tokenizer", lambda settings: None)
    message = run.refusal(f"{PATH}=google/gemma-2-2b-it", ONE_GPU, SEPARATE, f"{ATTENTION}=sdpa", device="gpu")
    assert "caps its attention scores" in message


def test_full_precision_where_kernels_are_half_is_refused_before_ray(run, with_gpu):
    precision = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"
    full = [f"{precision}=fp32", "actor_rollout_ref.ref.fsdp_config.model_dtype=fp32", ONE_GPU]
    message = run.refusal(*full, device="gpu")
    assert message.startswith(f"{precision}='fp32'") and "bf16" in message and "share_prompt=False" in message
    run.check(*full, "actor_rollout_ref.share_prompt=False", device="gpu")


@pytest.mark.parametrize(
    ("heads", "of_keys", "size", "fits"),
    [(8, 2, 4, True), (8, 8, 4, True), (8, 4, 2, True), (14, 2, 4, False), (12, 3, 2, False), (12, 3, 4, False)],
)
def test_heads_that_cannot_be_dealt_out_to_ranks_are_refused_before_ray(
    run, folder, with_gpu, monkeypatch, heads, of_keys, size, fits
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: size)
    change(folder / "config.json", num_attention_heads=heads, num_key_value_heads=of_keys)
    key = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    overrides = [f"{PATH}={folder}", f"trainer.n_gpus_per_node={size}", f"{key}={size}"]
    if fits:
        run.check(*overrides, device="gpu")
    else:
        assert f"the model's {heads} heads of attention, {of_keys} of them" in run.refusal(*overrides, device="gpu")


def test_sequences_of_a_model_of_text_and_images_are_not_split(run, folder, with_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    change(folder / "config.json", vision_config={"hidden_size": 64})
    overrides = [f"{PATH}={folder}", "trainer.n_gpus_per_node=2"]
    run.check(*overrides, device="gpu")
    key = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    assert "of text and images to split its sequences" in run.refusal(*overrides, f"{key}=2", device="gpu")


def test_models_whose_forward_pass_verl_replaces_are_known():
    patches = inspect.getsource(monkey_patch.apply_monkey_patch)
    replaced = {
        name
        for kinds, body in re.findall(r"model_type (?:in|==) (.*):\n((?:.*\n)*?)(?=    (?:el)?if |\Z)", patches)
        if ".forward = forward_with_normal_backend" in body
        for name in re.findall(r'"(\w+)"', kinds)
    }
    assert replaced == set(model_config.FORWARD_OF_VERL)


# ---- Names on the hub ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_a_name_passes_when_the_hub_does_not_answer(run, name, capsys):
    """What was tried is said: a run without a network may have a mirror."""
    run.check(f"{PATH}={name}")
    assert f"{PATH}='{name}'" in capsys.readouterr().err


def test_a_misspelt_name_is_refused(run):
    message = run.refusal(f"{PATH}=Qwen/Qwen2.5-3B-Instrct")
    assert f"{PATH}='Qwen/Qwen2.5-3B-Instrct'" in message and "the hub has no such model" in message


def test_a_name_is_refused_when_the_hub_must_not_be_asked(run, monkeypatch):
    def offline(name, timeout):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    message = run.refusal(f"{PATH}=Qwen/Qwen2.5-0.5B-Instruct")
    assert "HF_HUB_OFFLINE" in message and "name a folder" in message


@pytest.mark.parametrize(
    "error",
    [
        ImportError("socksio is not installed"),
        ValueError("Unknown scheme for proxy"),
        httpx.InvalidURL("Invalid port: '80a'"),
    ],
)
def test_a_name_is_refused_when_the_way_to_the_hub_cannot_be_taken(run, monkeypatch, error):
    def ask(name, timeout):
        raise error

    monkeypatch.setattr(huggingface_hub, "model_info", ask)
    message = run.refusal(f"{PATH}=Qwen/Qwen2.5-0.5B-Instruct")
    assert message.startswith(f"{PATH}='Qwen/Qwen2.5-0.5B-Instruct'") and str(error) in message
    assert "ALL_PROXY" in message and "name a folder" in message


def test_a_name_in_the_cache_is_not_looked_up(run, monkeypatch):
    def never(name, timeout):
        raise AssertionError("asked")

    model = Path(run.settings[PATH])
    tokenizer = model_files._tokenizer(str(model), False, True)
    monkeypatch.setattr(huggingface_hub, "model_info", never)
    monkeypatch.setattr(model_files, "_cached_file", lambda name, file: model / file)
    monkeypatch.setattr(model_files, "_tokenizer", lambda *args: tokenizer)
    run.check(f"{PATH}=gpt2")


# ---- An adapter to begin with ----------------------------------------------------------------------------------------
ADAPTER = "actor_rollout_ref.model.lora_adapter_path"
LORA, RANK = "trainer.ref_update_freq=0", "actor_rollout_ref.model.lora_rank"


def test_an_adapter_must_be_there(run, tmp_path):
    message = run.refusal(f"{ADAPTER}=/absent", LORA)
    assert message.startswith(f"{ADAPTER}='/absent': there is no such folder")
    folder = tmp_path / "adapter"
    folder.mkdir()
    message = run.refusal(f"{ADAPTER}={folder}", LORA)
    assert "no configuration (adapter_config.json)" in message and "peft" in message
    (folder / "adapter_config.json").write_text('{"r": 8}')
    assert "no weights (adapter_model.safetensors or adapter_model.bin)" in run.refusal(f"{ADAPTER}={folder}", LORA)
    (folder / "adapter_model.safetensors").write_text("weights")
    run.check(f"{ADAPTER}={folder}", LORA, f"{RANK}=8")
    run.check(f"{ADAPTER}={folder}", LORA, f"{RANK}=16")  # verl takes the adapter's own, and vLLM has room


@pytest.mark.parametrize("rank", [0, 4])
def test_an_adapter_takes_its_own_rank(run, tmp_path, rank):
    """verl loads none for rank 0, and vLLM refuses one of a higher rank, both in the first step."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    message = run.refusal(f"{ADAPTER}={tmp_path}", LORA, f"{RANK}={rank}")
    assert message.startswith(f"{RANK}={rank}: verl loads an adapter") and message.endswith("at least the adapter's, 8")


def test_an_adapter_of_the_hub_takes_a_rank(run):
    message = run.refusal(f"{ADAPTER}=Qwen/Qwen2.5-0.5B-Instruct", LORA)
    assert message.startswith(f"{RANK}=0: verl loads an adapter") and message.endswith("at least the adapter's")
    run.check(f"{ADAPTER}=Qwen/Qwen2.5-0.5B-Instruct", LORA, f"{RANK}=8")


def test_weights_that_may_not_be_read(run, folder, monkeypatch):
    opened = Path.open

    def refuse(file, *args, **options):
        if file.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)  # root may read all files
    message = run.refusal(f"{PATH}={folder}")
    assert message.startswith(f"{PATH}='{folder}': model.safetensors cannot be read (Permission denied")
    assert "chmod" in message


# ---- The buffer for weights ------------------------------------------------------------------------------------------
def bucket(tmp_path: Path, model: dict, *overrides: str) -> int:
    (tmp_path / "config.json").write_text(json.dumps(model))
    config = override(composed("cpu"), [f"{PATH}={tmp_path}", *overrides])
    fit_weight_bucket(config)
    return config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes


GEMMA_3_270M = {"vocab_size": 262144, "hidden_size": 640}


@pytest.mark.parametrize("model", [GEMMA_3_270M, {"text_config": GEMMA_3_270M}], ids=["text", "text and images"])
def test_the_weight_buffer_grows_with_the_embedding(tmp_path, model, capsys):
    assert bucket(tmp_path, model) == 640  # megabytes of 2**20, of fp32
    assert f"{BUCKET}=640 in place of 128" in capsys.readouterr().err


def test_the_weight_buffer_holds_the_embedding_as_it_is_sent(tmp_path):
    bf16 = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"
    assert bucket(tmp_path, GEMMA_3_270M, bf16) == 320


def test_a_weight_buffer_that_is_large_enough_stays(tmp_path, capsys):
    assert bucket(tmp_path, {"vocab_size": 49152, "hidden_size": 576}) == 128
    assert bucket(tmp_path, GEMMA_3_270M, f"{BUCKET}=700") == 700
    assert capsys.readouterr().err == ""


def test_the_command_starts_with_a_buffer_that_fits(run, folder, tmp_path, monkeypatch):
    change(folder / "config.json", vocab_size=2**20)  # of 64 numbers each
    started = []
    monkeypatch.setattr(main_spin, "run_spin", started.append)
    monkeypatch.setattr(main_spin.signals, "honor", lambda: None)  # this process's signals are pytest's
    overrides = run.overrides(f"{PATH}={folder}", f"trainer.default_local_dir={tmp_path / 'run'}")
    main_spin.main.__wrapped__(override(composed("cpu"), overrides))
    assert [OmegaConf.select(config, BUCKET) for config in started] == [256]
