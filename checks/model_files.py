"""The models before they are loaded: their folders, or names on the hub, and their tokenizers."""

import json
import os
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from math import ceil
from pathlib import Path

from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open

from recipe.spin.checks.derived import source_of
from recipe.spin.checks.fit import compute_bytes
from recipe.spin.checks.hub import cannot_be_asked, does_not_answer
from recipe.spin.checks.model_config import (
    OVERRIDES,
    PATH,
    TRUST,
    check_architecture,
    check_computation,
    language_model,
    text_part,
)
from recipe.spin.checks.tensors import missing_tensors
from recipe.spin.common.settings import MODEL_LENGTH, ConfigError, Settings

TOKENIZER_PATH = "actor_rollout_ref.model.tokenizer_path"
ADAPTER = "actor_rollout_ref.model.lora_adapter_path"
LORA_RANK = "actor_rollout_ref.model.lora_rank"
REWARD_MODEL = "reward.reward_model.model_path"
CHAT_TEMPLATE = "actor_rollout_ref.model.custom_chat_template"
BUCKET = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
CONFIGURATION = ("config.json",)
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
OF_AN_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
SAVE = "save model and tokenizer there with save_pretrained"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB_SECONDS = 5
NAMED = 3  # of tensors that are missing


def check_model(settings: Settings) -> None:
    """A folder must hold a whole causal model, a name must be one of the hub's; so an adapter to begin with."""
    settings.run(_check_adapter)
    if folder := _folder(settings, PATH):
        config = _check_folder(settings, PATH, folder)
        _check_sizes(settings, text_part(config))
        check_architecture(settings, config)
        positions, length = text_part(config).get("max_position_embeddings"), settings[MODEL_LENGTH]
        settings.require(
            not isinstance(positions, int) or length is None or length <= positions,
            MODEL_LENGTH,
            f"the model was made for {positions} tokens at most; lower it, or set null",
        )
        check_computation(settings, config)
        _check_weights(settings, PATH, folder)
        settings.run(_check_language_model, partial(_check_tensors, folder=folder))
    elif file := _cached_file(settings[PATH], "config.json"):
        config = _read_json(settings, PATH, file)
        check_architecture(settings, config)
        check_computation(settings, config)


def _check_sizes(settings: Settings, model: dict) -> None:
    """Of the embedding, which decides how weights reach vLLM; a model without one has neither."""
    wrong = [name for name in ("vocab_size", "hidden_size") if not isinstance(model.get(name, 0), int)]
    settings.require(not wrong, PATH, f"config.json: {' and '.join(wrong)} must be a whole number; {SAVE}")


def _check_language_model(settings: Settings) -> None:
    """What transformers makes of config.json, which is what the engine loads."""
    try:
        language_model(settings[PATH], settings[TRUST], local_files_only=True)
    except ValueError as error:
        settings.require(False, PATH, f"transformers cannot read config.json ({error}); {SAVE}")


def _check_adapter(settings: Settings) -> None:
    if settings[ADAPTER] is None:
        return
    rank, folder = None, _folder(settings, ADAPTER, "adapter_config.json")
    if folder:
        for what, names in (("configuration", ("adapter_config.json",)), ("weights", OF_AN_ADAPTER)):
            found = any((folder / name).is_file() for name in names)
            remedy = f"the folder has no {what} ({' or '.join(names)}); save a peft adapter there"
            settings.require(found, ADAPTER, remedy)
        rank = _read_json(settings, ADAPTER, folder / "adapter_config.json").get("r")
    own = settings[LORA_RANK]
    settings.require(
        own >= max(1, rank if isinstance(rank, int) else 1),
        LORA_RANK,
        "verl loads an adapter where this is above 0, and vLLM makes room for this rank; set at least the adapter's"
        f"{f', {rank}' * bool(rank)}",
    )


def check_reward_model(settings: Settings) -> None:
    """A reward model, where one is enabled, must be there, and be a classifier unless a function makes the score."""
    if not settings["reward.reward_model.enable"]:
        return
    settings.require(settings[REWARD_MODEL] is not None, REWARD_MODEL, "name the reward model: a folder or a hub name")
    if is_pinned(settings[REWARD_MODEL]):
        return  # looked at once it is fetched
    if folder := _folder(settings, REWARD_MODEL):
        config = _check_folder(settings, REWARD_MODEL, folder)
        _check_weights(settings, REWARD_MODEL, folder)
    elif file := _cached_file(settings[REWARD_MODEL], "config.json"):
        config = _read_json(settings, REWARD_MODEL, file)
    else:
        return  # the hub has it
    if settings["reward.custom_reward_function.path"] is not None:
        return  # the function asks the model, whatever it is
    architectures = config.get("architectures")
    settings.require(
        "SequenceClassification" in str(architectures),
        REWARD_MODEL,
        f"config.json has the architectures {architectures}, and the score is the output of a sequence classifier "
        "(AutoModelForSequenceClassification); name one, or a function that asks the model in "
        "reward.custom_reward_function.path",
    )
    tokenizer = _tokenizer(str(folder or settings[REWARD_MODEL]), False, True, REWARD_MODEL)
    settings.require(
        bool(tokenizer.chat_template),
        REWARD_MODEL,
        "its tokenizer has no chat template, by which messages become its input; take a model that has one",
    )


def is_pinned(path: str | None) -> bool:
    """Whether a model's path names a revision on the hub, which pinned_model.py fetches; a folder may have an @ too."""
    return isinstance(path, str) and "@" in path and not os.path.exists(path)


def _folder(settings: Settings, key: str, file: str = "config.json") -> Path | None:
    """The folder that a key names; None where it is a name that the hub has or may have. Else notes a fault."""
    path = settings[key]
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_NAME.fullmatch(path):
        settings.require(False, key, "there is no such folder; give a model folder or a hub name such as a/b")
        settings[key]  # leaves
    elif _cached_file(path, file) is None:
        remedy = (
            "there is no such folder, and the hub has no such model, or shows it to others alone; correct the name, or "
            "set HF_TOKEN"
        )
        settings.require(_is_on_hub(path, key) is not False, key, remedy)
    return None


# ---- A folder --------------------------------------------------------------------------------------------------------
def _check_folder(settings: Settings, key: str, folder: Path) -> dict:
    """Looks for a model's files; returns its config.json."""
    for what, patterns in (("configuration", CONFIGURATION), ("tokenizer", TOKENIZER), ("weights", WEIGHTS)):
        found = any(any(folder.glob(pattern)) for pattern in patterns)
        settings.require(found, key, f"the folder has no {what} ({' or '.join(patterns)}); {SAVE}")
    return _read_json(settings, key, folder / "config.json")


def _check_weights(settings: Settings, key: str, folder: Path) -> None:
    for file in _shards(settings, key, folder):
        fault = weights_fault(file)
        settings.require(not fault, key, f"{file.name} {fault}; copy or save the model again")


def _check_tensors(settings: Settings, folder: Path) -> None:
    if settings[TRUST] or not settings.is_usable(PATH):
        return
    missing = missing_tensors(folder, _shards(settings, PATH, folder), settings[OVERRIDES] or {})
    more = f" and {len(missing) - NAMED} more" * (len(missing) > NAMED)
    settings.require(
        not missing,
        PATH,
        f"the weights lack {', '.join(missing[:NAMED])}{more}, which transformers would fill with random numbers; copy "
        "or save the model again",
    )


def _read_json(settings: Settings, key: str, file: Path) -> dict:
    try:
        content, fault = json.loads(file.read_bytes()), "it holds no object"
    except (ValueError, RecursionError, OSError) as error:
        content, fault = None, str(error)
    settings.require(isinstance(content, dict), key, f"{file.name} cannot be read as JSON ({fault}); {SAVE}")
    settings[key]  # leaves, where it has a fault
    return content


def _shards(settings: Settings, key: str, folder: Path) -> list[Path]:
    """The files that hold the weights, whether they exist or not."""
    found = sorted(folder.glob("*.index.json"), key=lambda file: ".safetensors." not in file.name)  # as it is loaded
    index = next(iter(found), None)
    if index is None:
        return sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    named = _read_json(settings, key, index).get("weight_map")
    named = set(named.values()) if isinstance(named, dict) else {None}
    if not named or not all(isinstance(name, str) for name in named):
        settings.require(False, key, f"{index.name} has no weight_map with files; {SAVE}")
        return []
    return [folder / name for name in sorted(named)]


def weights_fault(file: Path) -> str | None:
    """What is wrong with a file of weights; of safetensors without reading more than the header."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    try:
        file.open("rb").close()  # safetensors would say that a file which may not be read is missing
        if file.suffix != ".safetensors":
            return None if size else "is empty"
        with safe_open(file, "np") as weights:
            return None if weights.keys() else "holds no weights"
    except SafetensorError as error:
        return f"is cut off, damaged or no safetensors file: it has {size} bytes ({error})"
    except OSError as error:
        return f"cannot be read ({error.strerror}: chmod a+r, by its owner)"


# ---- The hub ---------------------------------------------------------------------------------------------------------
def _cached_file(name: str, file: str) -> Path | None:
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file)
    except errors.HFValidationError:  # no name that a model of the hub can have
        return None
    return Path(found) if isinstance(found, str) else None


@cache
def _is_on_hub(name: str, key: str) -> bool | None:
    """Asks the hub; None where it does not answer, which is said.

    Raises:
        ConfigError: when the hub must not be asked.
    """
    from huggingface_hub import errors, model_info

    try:
        model_info(name, timeout=HUB_SECONDS)
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return False
    except errors.OfflineModeIsEnabled as error:
        raise ConfigError(
            f"{key}={name!r}: there is no such folder, the model is not in the hub's cache, and HF_HUB_OFFLINE "
            "forbids to ask the hub; name a folder, or fetch the model first (hf download)"
        ) from error
    except cannot_be_asked() as error:
        raise ConfigError(
            f"{key}={name!r} is no folder here, and the hub cannot be asked ({type(error).__name__}: {error}); correct "
            "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name a folder"
        ) from error
    except does_not_answer() as error:
        sys.stderr.write(
            f"[spin] {key}={name!r} is no folder here, and the hub does not answer ({type(error).__name__}: {error}); "
            "going on as if it had the model\n"
        )
        return None
    return True


# ---- What others ask of the model ------------------------------------------------------------------------------------
def load_tokenizer(settings: Settings):
    """The tokenizer that writes prompts, with its chat template; None where the hub may have it and does not answer.

    Raises:
        ConfigError: when it cannot be read, or has no chat template.
    """
    key = TOKENIZER_PATH if settings[TOKENIZER_PATH] else PATH
    path = settings[key]
    folder = Path(path)
    here = folder.is_dir() or _cached_file(path, "tokenizer_config.json") is not None
    on_hub = here or _is_on_hub(path, key)
    if on_hub is False:  # of the model check_model says it
        raise ConfigError(
            f"{TOKENIZER_PATH}={path!r}: there is no such folder, and the hub has no such model; correct it, or set "
            "null for the model's own"
        )
    if on_hub is None:
        return None
    trust = settings["actor_rollout_ref.model.trust_remote_code"]
    tokenizer = _tokenizer(str(folder) if folder.is_dir() else path, trust, here)
    template = settings[CHAT_TEMPLATE]
    if not tokenizer.chat_template and not template:
        raise ConfigError(
            f"{PATH}={path!r}: the tokenizer has no chat template, by which messages become a prompt; take a model "
            "that was trained on chats, or set actor_rollout_ref.model.custom_chat_template"
        )
    return tokenizer


def prompt_writer(settings: Settings, tokenizer) -> Callable[[list[dict]], str]:
    """Writes messages as the rollout does. Raises ValueError where the chat template does not take them."""
    options = dict(settings["data.apply_chat_template_kwargs"])
    template = settings[CHAT_TEMPLATE]
    options |= {"chat_template": template} if template else {}

    def write(messages: list[dict]) -> str:
        try:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        except Exception as error:  # a template is a program, which may raise what it likes
            raise ValueError(f"the chat template does not take the messages ({error})") from error

    return write


def prompt_length(settings: Settings, messages: list[dict]) -> int | None:
    """Tokens of a prompt that a preference source writes; None where the hub may have the tokenizer and is silent.

    Raises:
        ConfigError: when the tokenizer cannot be read, or its chat template does not take the messages.
    """
    tokenizer = load_tokenizer(settings)
    if tokenizer is None:
        return None
    try:
        text = prompt_writer(settings, tokenizer)(messages)
    except ValueError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"{CHAT_TEMPLATE}={settings[CHAT_TEMPLATE]!r}: {error} of the preference source, by: {roles}; set one that "
            "does"
        ) from error
    return len(tokenizer.encode(text, add_special_tokens=False))


def the_source_can_use_the_model(settings: Settings) -> None:
    """What prefers may ask questions of the model; asked once the model itself has been looked at."""
    source_of(settings).check_model(settings, partial(prompt_length, settings))


@cache
def _tokenizer(path: str, trust_remote_code: bool, local_files_only: bool, key: str = PATH):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    except Exception as error:  # it raises whatever the readers of its files do
        raise ConfigError(f"{key}={path!r}: the tokenizer cannot be read ({error}); {SAVE}") from error


def fit_weight_bucket(config: DictConfig) -> None:
    """Raises the size of the buffer that carries weights to vLLM to what the model needs, and says so."""
    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    if (needed := weight_bucket(config)) > engine.update_weights_bucket_megabytes:
        sys.stderr.write(
            f"[spin] {BUCKET}={needed} in place of {engine.update_weights_bucket_megabytes}: the model's embedding is "
            "sent to vLLM in one piece\n"
        )
        engine.update_weights_bucket_megabytes = needed


def weight_bucket(config: DictConfig) -> int:
    """Megabytes of the buffer that carries weights to vLLM: the setting, or the model's largest tensor if that is more.

    That is the embedding, in the precision that the actor computes with. On one machine verl sends no tensor in parts
    and stops at the first push. For a checked config.
    """
    path = config.actor_rollout_ref.model.path
    folder = Path(path)
    file = folder / "config.json" if folder.is_dir() else _cached_file(path, "config.json")
    model = text_part(json.loads(file.read_bytes())) if file else {}
    embedding = ceil(model.get("vocab_size", 0) * model.get("hidden_size", 0) * compute_bytes(config) / 2**20)
    return max(embedding, config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes)
