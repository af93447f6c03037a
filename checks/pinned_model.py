"""Models of the hub at one revision: `owner/name@revision` as their path."""

from omegaconf import DictConfig, OmegaConf

from recipe.spin.checks.check import check_settings
from recipe.spin.checks.hub import cannot_be_asked, does_not_answer
from recipe.spin.checks.model_config import PATH
from recipe.spin.checks.model_files import ADAPTER, REWARD_MODEL, TOKENIZER_PATH, is_pinned
from recipe.spin.common.settings import ConfigError

# The weights once more, in formats that neither PyTorch nor vLLM is given here
UNUSED = ("original/*", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot")


def fetch_pinned_model(config: DictConfig) -> None:
    """Puts the folder of that revision, downloaded unless it is there, in place of a model's path; others stay.

    So of the tokenizer, of the adapter to begin with, and of the reward model where there is one.

    verl gives no revision to the hub, which would then serve the newest. Nothing is asked of the hub for settings that
    could not run.

    Raises:
        ConfigError: when settings are faulty, or the hub does not give that revision.
    """
    keys = [PATH, TOKENIZER_PATH, ADAPTER]
    keys += [REWARD_MODEL] if OmegaConf.select(config, "reward.reward_model.enable") else []
    pinned = {key: path for key in keys if is_pinned(path := OmegaConf.select(config, key))}
    if pinned:
        check_settings(config)
    for key, path in pinned.items():
        OmegaConf.update(config, key, _fetched(key, path))


def _fetched(key: str, path: str) -> str:
    """The folder in the hub's cache."""
    name, _, revision = path.partition("@")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, ignore_patterns=list(UNUSED))
    except (*cannot_be_asked(), *does_not_answer()) as error:  # no such name or revision, no access, no network
        cause = f"{type(error).__name__}: {str(error).strip()}"
        raise ConfigError(
            f"{key}={path!r}: the hub did not give revision {revision!r} of {name!r} ({cause}); correct name and "
            "revision (a commit, tag or branch) or, where a proxy is in the way, HTTP_PROXY, HTTPS_PROXY or ALL_PROXY; "
            "or give a folder"
        ) from error
