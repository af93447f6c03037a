"""A hub model at one revision, with a stand-in for the hub."""

import httpx
import huggingface_hub
import pytest
from checkable_run import composed, override
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from omegaconf import OmegaConf

from recipe.spin.checks import pinned_model
from recipe.spin.checks.pinned_model import fetch_pinned_model
from recipe.spin.common.settings import ConfigError


@pytest.fixture
def fetch(monkeypatch):
    """Puts a model path through; returns the path that verl gets, and what the hub was asked for."""

    def start(path, fails: Exception | None = None, key: str = "actor_rollout_ref.model.path", **settings):
        asked = []

        def snapshot_download(name, revision, ignore_patterns):
            asked.append((name, revision))
            if fails:
                raise fails
            return f"/cache/{name}/{revision}"

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(pinned_model, "check_settings", lambda config: None)
        config = OmegaConf.create(settings)
        OmegaConf.update(config, key, path, force_add=True)
        fetch_pinned_model(config)
        return OmegaConf.select(config, key), asked

    return start


def test_a_revision_is_fetched(fetch):
    assert fetch("a/b@0123abc") == ("/cache/a/b/0123abc", [("a/b", "0123abc")])


@pytest.mark.parametrize(
    "key",
    [
        "actor_rollout_ref.model.tokenizer_path",
        "actor_rollout_ref.model.lora_adapter_path",
        "reward.reward_model.model_path",
    ],
)
def test_so_is_what_stands_beside_the_model(fetch, key):
    reward_model = {"reward_model": {"enable": True}}
    assert fetch("a/b@0123abc", key=key, reward=reward_model) == ("/cache/a/b/0123abc", [("a/b", "0123abc")])


def test_a_reward_model_that_is_not_enabled_is_not_fetched(fetch):
    assert fetch("a/b@0123abc", key="reward.reward_model.model_path") == ("a/b@0123abc", [])


@pytest.mark.parametrize("path", ["a/b", "gpt2", "/models/a", None, 5])
def test_other_paths_stay(fetch, path):
    assert fetch(path) == (path, [])


def test_a_folder_may_have_the_sign_in_its_name(fetch, tmp_path):
    (tmp_path / "a@b").mkdir()
    assert fetch(f"{tmp_path}/a@b") == (f"{tmp_path}/a@b", [])


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("a/b@no", LocalEntryNotFoundError("Cannot find an appropriate snapshot")),
        ("/no/a@b", HFValidationError("Repo id must be in the form 'repo_name'")),
        ("a/b@", OSError("no revision")),
        ("a/b@main", ImportError("Using SOCKS proxy, but the 'socksio' package is not installed")),
        ("a/b@main", ValueError("Unknown scheme for proxy URL")),
        ("a/b@main", httpx.InvalidURL("Invalid port: '80a'")),
        ("a/b@main", httpx.ProxyError("403 Forbidden")),
    ],
)
def test_what_the_hub_does_not_give_is_refused_with_its_words(fetch, path, error):
    with pytest.raises(ConfigError) as caught:
        fetch(path, fails=error)
    words = (path, str(error), "actor_rollout_ref.model.path", "ALL_PROXY", "give a folder")
    assert [part for part in words if part not in str(caught.value)] == []


def test_settings_that_cannot_run_are_told_before_the_download(run, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: asked.append(args))
    change = ["actor_rollout_ref.model.path=a/b@0123abc", "algorithm.dpo_loss_type=nonsense", "trainer.save_freq=often"]
    with pytest.raises(ConfigError, match=r"(?s)trainer.save_freq='often'.*nonsense"):
        fetch_pinned_model(override(composed("cpu"), run.overrides(*change)))
    assert asked == []
    fetch_pinned_model(override(composed("cpu"), run.overrides(change[0])))
    assert asked == [("a/b",)]


def test_a_reward_models_revision_is_no_fault_before_it_is_fetched(run, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: "/cache")
    reward = [f"reward.reward_model.{change}" for change in ("enable=True", "rollout.name=vllm", "model_path=a/b@main")]
    reward.append("reward.custom_reward_function.path=null")
    fetch_pinned_model(config := override(composed("cpu"), run.overrides(*reward)))
    assert config.reward.reward_model.model_path == "/cache"


def test_a_name_that_is_too_long_is_told(run):
    path = f"b@{'n' * 300}"
    with pytest.raises(ConfigError, match=rf"actor_rollout_ref.model.path='{path}': .*File name too long"):
        fetch_pinned_model(override(composed("cpu"), run.overrides(f"actor_rollout_ref.model.path={path}")))
