"""Settings that name files: `~`, which no shell expands behind a =, and names below the folder of the call."""

import errno
import os

import pytest
from checkable_run import composed, override
from omegaconf import OmegaConf

from recipe.spin import main_spin
from recipe.spin.checks.check import check_config
from recipe.spin.checks.paths import PARTS, PATHS, make_absolute
from recipe.spin.checks.reward_file import WEIGHTED
from recipe.spin.common.settings import ConfigError


def test_the_users_folder_is_put_in_place_of_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = override(composed("cpu"), [f"++{key}='~/x'" for key in PATHS])
    config.data.val_files = ["~/a", "b", "~other/c"]
    part = "{one: {path: '~/one.py'}}"
    config = override(config, [f"+reward.custom_reward_function.reward_kwargs={{functions: {part}}}"])
    make_absolute(config)
    for key in set(PATHS) - {"data.val_files"}:
        assert OmegaConf.select(config, key) == "/home/me/x"
    assert config.data.val_files == ["/home/me/a", os.path.abspath("b"), "~other/c"]
    assert config.reward.custom_reward_function.reward_kwargs.functions.one.path == "/home/me/one.py"


def test_names_below_the_folder_of_the_call_are_made_absolute(monkeypatch, tmp_path):
    """Processes of a cluster that is joined are in another. Addresses stay, and names that the hub may have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    names = {"trainer.default_local_dir": "run", "data.train_files": "hdfs://a/b.parquet"}
    names |= {"actor_rollout_ref.model.path": "here", "actor_rollout_ref.model.tokenizer_path": "gpt2"}
    config = override(composed("cpu"), [f"{key}={name}" for key, name in names.items()])
    make_absolute(config)
    found = [OmegaConf.select(config, key) for key in names]
    assert found == [f"{tmp_path}/run", "hdfs://a/b.parquet", f"{tmp_path}/here", "gpt2"]


def test_files_that_verl_loads_by_its_own_keys_are_among_them():
    """All that the config has, as a key that is not would be made up."""
    keys = ("data.custom_cls.path", "actor_rollout_ref.rollout.agent.agent_loop_config_path")
    keys += ("reward.reward_manager.module.path",)
    assert set(keys) <= set(PATHS)
    for key in keys:
        section, name = key.rsplit(".", 1)
        assert name in OmegaConf.select(composed("cpu"), section)


def test_a_section_that_is_null_is_left_to_the_check():
    make_absolute(OmegaConf.create({"trainer": None, "data": {"train_files": 5}}))


@pytest.mark.parametrize(
    "key",
    [
        "actor_rollout_ref.model.path",
        "actor_rollout_ref.model.tokenizer_path",
        "data.train_files",
        "reward.custom_reward_function.path",
    ],
)
def test_a_folder_of_a_user_that_is_not_there_is_told_as_any_other(run, key):
    config = override(composed("cpu"), run.overrides(f"{key}='~nobody-here/x'"))
    make_absolute(config)
    with pytest.raises(ConfigError, match=f"{key}='~nobody-here/x': there is no such f"):
        check_config(config)


def test_the_command_checks_what_was_expanded(monkeypatch):
    def stop(config):
        raise ConfigError(config.trainer.default_local_dir)

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(main_spin, "fetch_pinned_model", stop)
    monkeypatch.setattr(main_spin.signals, "honor", lambda: None)  # this process's signals are pytest's
    with pytest.raises(SystemExit, match="error: /home/me/run"):
        main_spin.main.__wrapped__(override(composed("cpu"), ["trainer.default_local_dir='~/run'"]))


@pytest.mark.parametrize(
    "key",
    [
        "actor_rollout_ref.model.path",
        "actor_rollout_ref.model.tokenizer_path",
        "algorithm.judge.prompt",
        "data.train_files",
        "data.val_files",
        "reward.custom_reward_function.path",
        "trainer.default_local_dir",
        "trainer.resume_from_path",
    ],
)
def test_a_name_that_no_file_can_have_is_told(run, key):
    name = f"/{'n' * 300}"
    message = run.refusal(f"{key}={name}")
    assert message == f"{key}={name!r}: no file can be looked for by this name (File name too long); correct it"


def test_such_a_name_among_weighted_rewards_is_told(run):
    name = f"/{'n' * 300}"
    functions = f"{{one: {{path: {name}}}, two: {{path: {run.folder}/reward.py}}}}"
    message = run.refusal(
        f"reward.custom_reward_function.path={WEIGHTED}",
        f"+reward.custom_reward_function.reward_kwargs={{functions: {functions}}}",
    )
    assert message.startswith(f"{PARTS}.one.path={name!r}: no file can be looked for") and "\n" not in message


def test_a_folder_that_may_not_be_entered_is_told(run, monkeypatch):
    look = os.stat

    def refuse(path, **options):
        if str(path).startswith("/closed/"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return look(path, **options)

    monkeypatch.setattr(os, "stat", refuse)  # root may enter all folders
    message = run.refusal("data.val_files=/closed/test.parquet")
    assert message.startswith("data.val_files='/closed/test.parquet': ") and "(Permission denied)" in message
