"""Checks of the settings, the data and the model before Ray starts: one message with the cause and the remedy."""

import ast
import json
import math
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from recipe.spin.core_algos import LOSSES, PAIRINGS, PREFERENCE_SOURCES, TIE_POLICIES, beta_at, check_loss_settings

CONFIGURATION = ("config.json",)
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")

ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
SHARE_PROMPT = "actor_rollout_ref.share_prompt"
COUNTS = (
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    f"{ACTOR}.ppo_mini_batch_size",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{ACTOR}.ppo_max_token_len_per_gpu",
    f"{ACTOR}.ppo_epochs",
    f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size",
    f"{REF}.log_prob_micro_batch_size_per_gpu",
    f"{REF}.log_prob_max_token_len_per_gpu",
    f"{ROLLOUT}.val_kwargs.n",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
)
NOT_NEGATIVE = ("algorithm.dpo_min_margin", f"{ACTOR}.optim.lr", f"{ROLLOUT}.val_kwargs.temperature")
WHOLE = ("trainer.ref_update_freq", "trainer.save_freq", "trainer.test_freq")
FLAGS = (
    "algorithm.dpo_reference_free",
    "algorithm.dpo_average_log_prob",
    f"{ACTOR}.use_dynamic_bsz",
    SHARE_PROMPT,
    "actor_rollout_ref.seed_responses",
    f"{REF}.fsdp_config.param_offload",
    f"{ROLLOUT}.val_kwargs.do_sample",
)
# verl's ways of training that SPIN has no use for: each would be paid for, or ignored
UNUSED = ("critic.enable", f"{ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward")


class ConfigError(ValueError):
    """A setting, file or row that a run cannot use; the message names it, the cause and the remedy."""


def check_config(config: DictConfig) -> None:
    """Raises ConfigError at the first thing in the composed config that could not work.

    Looks at the recipe's keys, at verl's keys that the recipe relies on, and at the files they name; needs neither
    verl nor Ray.
    """
    _check_kinds(config)
    _check_preferences(config)
    _check_loss(config)
    _check_reference(config)
    _check_workers(config)
    _check_sequence_parallelism(config)
    check_model(config.actor_rollout_ref.model.path)
    _check_reward(config)
    train_rows = sum(check_data_file("data.train_files", file, config) for file in _files(config.data.train_files))
    for file in _files(config.data.val_files):
        check_data_file("data.val_files", file, config)
    if train_rows < config.data.train_batch_size:
        raise ConfigError(
            f"data.train_files holds {train_rows} prompts, fewer than data.train_batch_size="
            f"{config.data.train_batch_size}: add prompts or lower data.train_batch_size"
        )


def _require(condition: bool, key: str, config: DictConfig, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={OmegaConf.select(config, key)!r}: {remedy}")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_kinds(config: DictConfig) -> None:
    """Refuses values of the wrong kind, whatever they would do later."""
    for key in COUNTS:
        value = OmegaConf.select(config, key)
        _require(_is_int(value) and value >= 1, key, config, "must be a whole number of at least 1")
    for key in NOT_NEGATIVE:
        value = OmegaConf.select(config, key)
        _require(_is_number(value) and 0 <= value < math.inf, key, config, "must be a number of at least 0")
    for key in WHOLE:
        _require(_is_int(OmegaConf.select(config, key)), key, config, "must be a whole number")
    for key in FLAGS:
        _require(isinstance(OmegaConf.select(config, key), bool), key, config, "must be True or False")
    for key in UNUSED:
        _require(OmegaConf.select(config, key) is False, key, config, "SPIN does not use it; set it to False")
    for key in ("data.train_files", "data.val_files"):
        _require(bool(OmegaConf.select(config, key)), key, config, "name a file of prompts")
    model = config.actor_rollout_ref.model.path
    _require(isinstance(model, str) and bool(model), "actor_rollout_ref.model.path", config, "name a model")


def _check_preferences(config: DictConfig) -> None:
    source = config.algorithm.preference_source
    known = ", ".join(PREFERENCE_SOURCES)
    _require(source in PREFERENCE_SOURCES, "algorithm.preference_source", config, f"choose one of {known}")
    n = config.actor_rollout_ref.rollout.n
    if source == "self_play":
        _require(_is_int(n) and n >= 1, f"{ROLLOUT}.n", config, "the opponent must give at least 1 response")
    else:
        _require(_is_int(n) and n >= 2, f"{ROLLOUT}.n", config, "a pair needs at least 2 responses to a prompt")
    temperature = config.actor_rollout_ref.rollout.temperature
    _require(
        _is_number(temperature) and 0 < temperature < math.inf,
        "actor_rollout_ref.rollout.temperature",
        config,
        "responses must be sampled to differ; use a temperature above 0, for example 1.0",
    )
    for key, known in (("algorithm.dpo_pairing", PAIRINGS), ("algorithm.dpo_tie_policy", TIE_POLICIES)):
        _require(OmegaConf.select(config, key) in known, key, config, f"choose one of {', '.join(known)}")
    penalty = config.algorithm.missing_eos_penalty or 0
    _require(
        _is_number(penalty) and penalty >= 0,
        "algorithm.missing_eos_penalty",
        config,
        "must be a number of at least 0, or null for none",
    )


def _check_loss(config: DictConfig) -> None:
    algorithm = OmegaConf.to_container(config.algorithm, resolve=True)
    try:
        beta = beta_at(algorithm["dpo_beta"], step=1, total_steps=1, steps_per_epoch=1)
        losses = check_loss_settings(
            algorithm["dpo_loss_type"],
            beta,
            algorithm["dpo_label_smoothing"],
            algorithm["dpo_loss_weights"],
            average_log_prob=algorithm["dpo_average_log_prob"],
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"algorithm.dpo_*: {error}") from error
    coupled = any(LOSSES[name].batch_coupled for name, _ in losses)
    if coupled and config.actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size > 1:
        raise ConfigError("algorithm.dpo_loss_type: aot and aot_unpaired need ulysses_sequence_parallel_size=1")
    if coupled and algorithm["dpo_pairing"] == "all":
        raise ConfigError(
            "algorithm.dpo_pairing=all weighs pairs, which a loss that sorts them cannot; use best_worst or random"
        )


def _check_reference(config: DictConfig) -> None:
    trainer, model = config.trainer, config.actor_rollout_ref.model
    alpha = trainer.ref_update_alpha
    _require(_is_number(alpha) and 0 < alpha <= 1, "trainer.ref_update_alpha", config, "must be above 0 and at most 1")
    lora = model.lora_rank > 0 or model.lora_adapter_path
    if config.algorithm.preference_source == "self_play" and lora:
        raise ConfigError(
            "algorithm.preference_source=self_play with LoRA (actor_rollout_ref.model.lora_rank="
            f"{model.lora_rank}): the opponent in vLLM is the reference, and with LoRA there is no such model to send; "
            "train without LoRA"
        )
    if trainer.ref_update_freq > 0 and lora:
        raise ConfigError(
            f"trainer.ref_update_freq={trainer.ref_update_freq} with LoRA (actor_rollout_ref.model.lora_rank="
            f"{model.lora_rank}): the reference is the base model with the adapter off and cannot be refreshed; set "
            "trainer.ref_update_freq=0 or train without LoRA"
        )
    if alpha < 1 and config.actor_rollout_ref.ref.fsdp_config.model_dtype != "fp32":
        raise ConfigError(
            f"trainer.ref_update_alpha={alpha} needs actor_rollout_ref.ref.fsdp_config.model_dtype=fp32: small steps "
            "towards the actor are lost in bf16"
        )


def _check_workers(config: DictConfig) -> None:
    actor, ref = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
    _require(actor.strategy in ("fsdp", "fsdp2"), "actor_rollout_ref.actor.strategy", config, "choose fsdp2 or fsdp")
    _require(
        ref.strategy == actor.strategy,
        "actor_rollout_ref.ref.strategy",
        config,
        "the reference is copied shard by shard and must be sharded as actor_rollout_ref.actor.strategy says",
    )
    _require(
        config.trainer.use_v1 and config.trainer.v1.trainer_mode == "sync",
        "trainer.v1.trainer_mode",
        config,
        "SPIN runs on verl's synchronous v1 trainer; set trainer.use_v1=True trainer.v1.trainer_mode=sync",
    )
    _require(
        not actor.shuffle,
        f"{ACTOR}.shuffle",
        config,
        "prompts are trained on in the order of the batch; set it to False",
    )
    _require(config.actor_rollout_ref.rollout.name == "vllm", f"{ROLLOUT}.name", config, "SPIN generates with vllm")
    _require(
        ref.fsdp_config.fsdp_size == actor.fsdp_config.fsdp_size,
        f"{REF}.fsdp_config.fsdp_size",
        config,
        f"the reference is copied shard by shard; give {ACTOR}.fsdp_config and {REF}.fsdp_config the same",
    )
    _check_precision(config)
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    if config.trainer.device == "cpu" and actor.strategy == "fsdp" and ranks > 1:
        _require(
            "hf_model" not in actor.checkpoint.save_contents,
            f"{ACTOR}.checkpoint.save_contents",
            config,
            "torch's FSDP1 cannot gather a model over several CPU ranks; leave out hf_model, or use strategy fsdp2",
        )
    tokens = config.data.max_prompt_length + config.data.max_response_length
    model_len = config.actor_rollout_ref.rollout.max_model_len
    _require(
        model_len is None or model_len >= tokens,
        f"{ROLLOUT}.max_model_len",
        config,
        f"a prompt and its response have up to {tokens} tokens; raise it or lower their lengths in data",
    )
    _check_row_fits(config)
    gpus = torch.cuda.device_count()
    _require(
        config.trainer.device != "cuda" or config.trainer.nnodes > 1 or config.trainer.n_gpus_per_node <= gpus,
        "trainer.n_gpus_per_node",
        config,
        f"this machine shows {gpus} GPUs; lower it, or use device=cpu on a machine without GPUs",
    )


def _check_precision(config: DictConfig) -> None:
    """A refreshed reference equals the actor only if it holds and computes what the actor computes with."""
    actor, ref = (config.actor_rollout_ref[name].fsdp_config for name in ("actor", "ref"))
    _require(
        ref.mixed_precision == actor.mixed_precision,
        f"{REF}.fsdp_config.mixed_precision",
        config,
        f"the reference computes as the actor does; leave it out, and it follows {ACTOR}.fsdp_config.mixed_precision",
    )
    computed = (actor.mixed_precision or {}).get("param_dtype", "bf16")  # verl's default
    _require(
        ref.model_dtype in ("fp32", computed),
        f"{REF}.fsdp_config.model_dtype",
        config,
        f"the actor computes in {computed}, and the reference must hold the same numbers; use {computed} or fp32",
    )


def _check_row_fits(config: DictConfig) -> None:
    """A prompt with all its responses that take part is computed in one micro-batch."""
    actor, ref, rollout = (config.actor_rollout_ref[name] for name in ("actor", "ref", "rollout"))
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    if config.algorithm.preference_source == "self_play":
        responses = rollout.n + 1  # the data's own
    else:
        responses = rollout.n if config.algorithm.dpo_pairing == "all" else 2
    shared = config.actor_rollout_ref.share_prompt
    longest = prompt + responses * response if shared else responses * (prompt + response)
    limits = (
        (f"{ACTOR}.ppo_max_token_len_per_gpu", actor.use_dynamic_bsz, actor),
        (f"{REF}.log_prob_max_token_len_per_gpu", ref.log_prob_use_dynamic_bsz, ref),
    )
    for key, by_tokens, part in limits:
        limit = OmegaConf.select(config, key) * part.fsdp_config.ulysses_sequence_parallel_size
        _require(
            not by_tokens or longest <= limit,
            key,
            config,
            f"the longest prompt with its {responses} responses has {longest} tokens and must fit into one "
            "micro-batch; raise it or lower data.max_prompt_length or data.max_response_length",
        )


def _check_sequence_parallelism(config: DictConfig) -> None:
    """Ulysses cuts sequences over ranks; the recipe's attention and verl's flash attention put them together again."""
    actor, ref, model = (config.actor_rollout_ref[name] for name in ("actor", "ref", "model"))
    size = actor.fsdp_config.ulysses_sequence_parallel_size
    key = f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size"
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    _require(ranks % size == 0, key, config, f"the {ranks} ranks must fall into groups of that size")
    _require(
        ref.fsdp_config.ulysses_sequence_parallel_size == size,
        f"{REF}.fsdp_config.ulysses_sequence_parallel_size",
        config,
        f"the reference gets the actor's rows; give it the actor's, {size}",
    )
    _require(
        size == 1 or config.trainer.device != "cpu",
        key,
        config,
        "gloo, which CPUs use, lacks its exchange; set 1",
    )
    attention = model.override_config.get("attn_implementation", "flash_attention_2")  # verl's default
    _require(
        size == 1 or config.actor_rollout_ref.share_prompt or attention.startswith("flash_attention"),
        key,
        config,
        f"{attention} would attend within each rank's part of a sequence alone; set {SHARE_PROMPT}=True, or install "
        "flash-attn and set actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2",
    )
    _require(
        size == 1 or model.use_remove_padding, key, config, "needs actor_rollout_ref.model.use_remove_padding=True"
    )


def check_model(path: str) -> None:
    """Raises ConfigError when a local model folder lacks its config, tokenizer or weights; hub names pass."""
    key = "actor_rollout_ref.model.path"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise ConfigError(f"{key}={path!r}: there is no such folder; give a model folder or a hub name such as a/b")
        return
    for what, patterns in (("configuration", CONFIGURATION), ("tokenizer", TOKENIZER), ("weights", WEIGHTS)):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ConfigError(
                f"{key}={path!r}: the folder has no {what} ({' or '.join(patterns)}); save model and tokenizer there "
                "with save_pretrained"
            )


def _check_reward(config: DictConfig) -> None:
    function, model = config.reward.custom_reward_function, config.reward.reward_model
    if function.path is None or model.enable:
        return
    key = "reward.custom_reward_function"
    path = Path(function.path).expanduser()
    if not path.is_file():
        raise ConfigError(f"{key}.path={function.path!r}: there is no such file; name a Python file with the reward")
    try:
        module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{key}.path={function.path!r}: {error}; correct the file") from error
    names = list(_top_level_names(module))
    if function.name not in names:
        raise ConfigError(f"{key}.name={function.name!r}: {path} defines {', '.join(names) or 'no function'}; name one")


def _top_level_names(module: ast.Module):
    """The names that a module defines, imports or assigns."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _files(files) -> list[str]:
    return [files] if isinstance(files, str) else list(files)


def check_data_file(key: str, file: str, config: DictConfig) -> int:
    """Reads a parquet, JSON-lines or JSON file of prompts and returns its number of rows.

    Raises:
        ConfigError: names the file, and the row with the fault.
    """
    path = Path(file).expanduser()
    if "://" in file:
        return config.data.train_batch_size  # remote files are read by verl
    if not path.is_file():
        raise ConfigError(f"{key}={file!r}: there is no such file; make it (examples/) or name another")
    rows = _read_rows(key, path)
    if not rows:
        raise ConfigError(f"{key}={file!r}: the file has no rows; make it again")
    for number, row in enumerate(rows):
        fault = _row_fault(row, config)
        if fault:
            raise ConfigError(f"{key}={file!r}, row {number}: {fault}")
    return len(rows)


def _read_rows(key: str, path: Path) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    if path.suffix in (".jsonl", ".json"):
        rows = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ConfigError(
                    f"{key}={str(path)!r}, line {number}: not JSON in UTF-8 ({error}); write one JSON object a line"
                ) from error
        return rows
    if path.suffix != ".parquet":
        raise ConfigError(f"{key}={str(path)!r}: verl reads .parquet, .jsonl and .json; convert the file")
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{key}={str(path)!r}: not a readable parquet file ({error}); make it again") from error


def _row_fault(row: dict, config: DictConfig) -> str | None:
    prompt_key = config.data.prompt_key
    if not isinstance(row, dict) or prompt_key not in row:
        columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        return f"no column {prompt_key!r} (it has {columns}); name the prompts' column in data.prompt_key"
    messages = row[prompt_key]
    if not isinstance(messages, list) or not messages:
        return f"{prompt_key!r} must be a list of chat messages, not {str(messages)[:60]!r}"
    for message in messages:
        if not isinstance(message, dict) or not message.get("role") or message.get("content") is None:
            return f"{prompt_key!r} holds {str(message)[:60]!r}; a message is {{'role': ..., 'content': ...}}"
    if config.algorithm.preference_source == "self_play":
        if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            return f"{prompt_key!r} must end with the assistant's response to a prompt, not {str(messages[-1])[:60]!r}"
        return None
    if not config.reward.reward_model.enable:
        reward_model = row.get("reward_model")
        if not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None:
            return "no reward_model.ground_truth, which the reward function is called with; add the column"
        if row.get(config.data.reward_fn_key) is None:
            return f"no {config.data.reward_fn_key!r}, which the reward function is called with; add the column"
    return None
