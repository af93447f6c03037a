"""A model of the hub at one revision: `owner/name@revision` as its path."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipe.spin.checks.check import check_settings
from recipe.spin.common.settings import ConfigError

KEY = "actor_rollout_ref.model.path"
# The weights once more, in formats that neither PyTorch nor vLLM is given here
UNUSED = ("original/*", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot")


def fetch_pinned_model(config: DictConfig) -> None:
    """Puts the folder of that revision, downloaded unless it is there, in place of the path; others stay.

    verl gives no revision to the hub, which would then serve the newest. Nothing is asked of the hub for settings that
    could not run.

    Raises:
        ConfigError: when settings are faulty, or the hub does not give that revision.
    """
    path = OmegaConf.select(config, KEY)  # None too where a section is null, which check_config tells
    name, at, revision = str(path).partition("@")
    if not at or Path(path).exists():
        return
    check_settings(config)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(name, revision=revision, ignore_patterns=list(UNUSED))
    except (OSError, HFValidationError) as error:  # no such name or revision, no access, no network
        raise ConfigError(
            f"{KEY}={path!r}: the hub did not give revision {revision!r} of {name!r} ({str(error).strip()}); correct "
            "name and revision (a commit, tag or branch), or give a folder"
        ) from error
    config.actor_rollout_ref.model.path = folder
