"""A run goes on from its folder's checkpoint with the same settings alone; what is in the way is set aside."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkable_run import Run, composed, override, write_rows
from checkable_run import row as data_row
from omegaconf import OmegaConf, open_dict
from worker_harness import ROOT, compose, cpu_environment

from benchmarks.rule_judge import RuleJudge
from recipe.spin import main_spin
from recipe.spin.checks.contents import contents_of
from recipe.spin.checks.paths import make_absolute
from recipe.spin.checks.reward_file import WEIGHTED
from recipe.spin.common.secrets import is_secret
from recipe.spin.common.settings import ConfigError
from recipe.spin.run import resume
from recipe.spin.run_folder import (
    TRACKER,
    UNREADABLE,
    checkpoints,
    first_answers,
    keep_answers,
    keep_unreadable,
    metrics_files,
)

ROOM = ["actor_rollout_ref.rollout.max_model_len=512", "algorithm.judge.max_tokens=16"]


def number_of(request: str, response: str) -> float:
    return float(response)


class Folder:
    """A run's folder, and the settings that runs in it are started with."""

    def __init__(self, run: Run):
        self.run, self.path = run, run.folder / "run"
        run.settings["trainer.default_local_dir"] = str(self.path)
        run.settings["trainer.check_memory"] = False  # other processes take some, which the console would say

    def start(self, *overrides: str):
        """The config as verl gets it."""
        config = self.run.check(*overrides)
        make_absolute(config)
        resume.prepare(config)
        return config

    def save(self, *steps: int) -> None:
        """As a run does that comes to these steps; the last one is tracked."""
        for step in steps:
            (self.path / f"global_step_{step}" / "actor").mkdir(parents=True)
            (self.path / f"global_step_{step}" / "data.pt").touch()
            (self.path / TRACKER).write_text(str(step))

    def refusal(self, *overrides: str) -> str:
        before = sorted(self.path.rglob("*"))
        with pytest.raises(ConfigError) as caught:
            self.start(*overrides)
        assert sorted(self.path.rglob("*")) == before
        return str(caught.value)

    def stored(self) -> dict:
        return yaml.safe_load((self.path / resume.SETTINGS).read_text())


@pytest.fixture
def folder(run) -> Folder:
    return Folder(run)


@pytest.fixture
def stopped(folder) -> Folder:
    """A run that was stopped behind its step 6."""
    folder.start()
    folder.save(3, 6)
    return folder


# ---- settings --------------------------------------------------------------------------------------------------------
def test_the_same_settings_go_on(stopped, capsys):
    stopped.start()
    assert list(checkpoints(stopped.path)) == [3, 6]
    assert capsys.readouterr().err == ""


CHANGES = {
    "algorithm.dpo_loss_type": "ipo",
    "algorithm.dpo_beta": "{schedule:linear,start:0.1,end:0.2}",
    "algorithm.dpo_pairing": "all",
    "actor_rollout_ref.rollout.n": "6",
    "actor_rollout_ref.rollout.seed": "7",
    "actor_rollout_ref.rollout.temperature": "0.7",
    "actor_rollout_ref.actor.optim.lr": "1e-3",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "2",
    "data.seed": "7",
    "data.train_batch_size": "2",
    "data.max_response_length": "12",
    "trainer.ref_update_freq": "0",
    "trainer.ref_update_alpha": "0.5",
}


def test_what_changes_the_meaning_is_refused(stopped):
    message = stopped.refusal(*(f"{key}={value}" for key, value in CHANGES.items()))
    assert [key for key in CHANGES if not re.search(rf"^  {key}: .+ -> .+$", message, re.MULTILINE)] == []
    assert "step 6" in message and "RUN_DIR" in message and "trainer.resume_mode=force" in message


def test_another_preference_source_is_refused(stopped):
    def conversation(number: int) -> dict:
        return {"real": [{"role": "user", "content": f"{number} + 1?"}, {"role": "assistant", "content": "2"}]}

    train = write_rows(stopped.run.folder / "real.jsonl", list(map(conversation, range(8))))
    test = write_rows(stopped.run.folder / "held_out.jsonl", list(map(conversation, range(8, 12))))
    message = stopped.refusal(
        "algorithm.preference_source=self_play",
        "actor_rollout_ref.rollout.n=1",
        f"data.train_files={train}",
        f"data.val_files={test}",
    )
    assert "algorithm.preference_source: reward -> self_play" in message


def test_another_model_is_refused(stopped, tiny_models):
    message = stopped.refusal(f"actor_rollout_ref.model.path={tiny_models['qwen2']}")
    assert f"actor_rollout_ref.model.path: {tiny_models['llama']} -> {tiny_models['qwen2']}" in message


def test_a_data_folder_of_the_same_name_is_another(stopped, tmp_path):
    (tmp_path / "other" / tmp_path.name).mkdir(parents=True)
    file = write_rows(tmp_path / "other" / tmp_path.name / "train.parquet", [data_row(number) for number in range(8)])
    assert f"-> {file}" in stopped.refusal(f"data.train_files={file}")


def test_a_path_may_be_written_in_another_way(stopped, monkeypatch):
    monkeypatch.chdir(stopped.run.folder)
    stopped.start("data.train_files=train.parquet", "reward.custom_reward_function.path=./reward.py")


# ---- files -----------------------------------------------------------------------------------------------------------
def rewrite(stopped: Folder, name: str) -> Path:
    """Changes a file of the run's, its name kept."""
    file = stopped.run.folder / name
    if name == "reward.py":
        file.write_text(file.read_text().replace("1.0", "-1.0"))
    else:
        write_rows(file, [data_row(number) for number in range(20, 29)])
    return file


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train.parquet", r"8 rows, sha256 \w{16} -> 9 rows, sha256 \w{16}"),
        ("test.parquet", r"4 rows, sha256 \w{16} -> 9 rows, sha256 \w{16}"),
        ("reward.py", r"sha256 \w{16} -> sha256 \w{16}"),
    ],
)
def test_a_file_that_was_changed_under_its_name_is_refused(stopped, capsys, name, words):
    file = rewrite(stopped, name)
    message = stopped.refusal()
    assert re.search(rf"^  {file}: {words}$", message, re.MULTILINE), message
    assert "RUN_DIR" in message and "trainer.resume_mode=force" in message
    stopped.start("trainer.resume_mode=force")
    assert f"{file}: " in capsys.readouterr().err
    stopped.start()  # stored
    assert capsys.readouterr().err == ""


def test_rows_in_another_order_are_another_file(stopped):
    write_rows(stopped.run.folder / "train.parquet", [data_row(number) for number in range(7, -1, -1)])
    assert "8 rows, sha256" in stopped.refusal()


def blank_the_middle(file: Path) -> None:
    """Of the same size afterwards, as trained weights are."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", blank_the_middle),
        ("chat_template.jinja", lambda file: file.write_text(" " + file.read_text())),
    ],
)
def test_what_was_changed_in_the_models_folder_is_refused(folder, tmp_path, name, change):
    model = tmp_path / "model"
    shutil.copytree(folder.run.settings["actor_rollout_ref.model.path"], model)
    folder.run.settings["actor_rollout_ref.model.path"] = str(model)
    folder.start()
    folder.save(6)
    change(model / name)
    assert re.search(rf"^  {model / name}: \d+ bytes, sha256 .* -> \d+ bytes, sha256", folder.refusal(), re.MULTILINE)


def test_a_judges_question_counts_as_a_file(stopped, tmp_path):
    judge = ["algorithm.preference_source=judge", f"algorithm.judge.prompt={tmp_path}/question"]
    judge += ["algorithm.judge.max_tokens=16", "actor_rollout_ref.rollout.max_model_len=512"]
    (tmp_path / "question").write_text("$request $first $second")
    stopped.start(*judge, "trainer.resume_mode=force")
    (tmp_path / "question").write_text("$request $second $first")
    assert f"{tmp_path}/question: sha256" in stopped.refusal(*judge)


def test_judges_may_answer_elsewhere_where_their_models_are_named(stopped, capsys):
    def judges(*addresses: str, models: str = "rule", **changes: str) -> list[str]:
        given = {"servers": f"[{','.join(addresses)}]", "models": models} | changes
        return ["algorithm.preference_source=judge", *(f"algorithm.judge.{key}={given[key]}" for key in given)]

    with RuleJudge(number_of) as one, RuleJudge(number_of) as two:
        stopped.start(*judges(one.address), "trainer.resume_mode=force")
        stopped.start(*judges(two.address, api_key_env="null"))
        assert f"['{one.address}'] -> ['{two.address}']" in capsys.readouterr().err
        assert "algorithm.judge.servers: " in stopped.refusal(*judges(one.address, models="null"))
        assert "algorithm.judge.models: rule -> ['rule', 'rule']" in stopped.refusal(
            *judges(one.address, two.address, models="[rule,rule]")
        )
        assert "algorithm.judge.servers: " in stopped.refusal(*judges("policy"), *ROOM)
        stopped.start(*judges(two.address, models="null"), "trainer.resume_mode=force")
        assert "algorithm.judge.servers: " in stopped.refusal(*judges(one.address, models="null"))


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_all_files_of_a_reward_count(folder, tmp_path, beside_a_model):
    """preferences/weighted.py's parts, and a function that asks a reward model."""
    config = folder.run.check()
    files = [tmp_path / "right.py", tmp_path / "brief.py"]
    for file in files:
        file.write_text("a reward")
    reward = config.reward
    reward.reward_model.enable = beside_a_model
    if beside_a_model:
        reward.custom_reward_function.path, files = str(files[0]), files[:1]
    else:
        with open_dict(config):
            parts = {file.stem: {"path": str(file)} for file in files}
            reward.custom_reward_function = {"path": str(WEIGHTED), "reward_kwargs": {"functions": parts}}
        files.append(WEIGHTED)
    found = contents_of(config)
    assert [file for file in files if not found.get(str(file), "").startswith("sha256 ")] == []


def test_a_run_that_did_not_store_what_its_files_held_goes_on(stopped, capsys):
    settings = stopped.stored()
    del settings[resume.CONTENTS]
    (stopped.path / resume.SETTINGS).write_text(yaml.safe_dump(settings))
    rewrite(stopped, "train.parquet")
    stopped.start()
    assert capsys.readouterr().err == ""


def test_a_line_of_json_is_a_row(folder):
    train = write_rows(folder.run.folder / "train.jsonl", [data_row(number) for number in range(8)])
    folder.start(f"data.train_files={train}")
    assert folder.stored()[resume.CONTENTS][train].startswith("8 rows, sha256 ")


HARMLESS = {
    "trainer.total_training_steps": "40",
    "trainer.save_freq": "5",
    "trainer.test_freq": "5",
    "trainer.logger": "[file,console]",
    "trainer.max_actor_ckpt_to_keep": "5",
    "trainer.experiment_name": "other",
    "reward.num_workers": "2",
    "actor_rollout_ref.rollout.agent.num_workers": "2",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "0.3",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": "256",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "4096",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": "2",
    "actor_rollout_ref.actor.fsdp_config.param_offload": "True",
    "ray_kwargs.ray_init.num_cpus": "32",
}


def test_harmless_changes_are_said_and_taken(stopped, capsys):
    overrides = [f"{key}={value}" for key, value in HARMLESS.items()]
    stopped.start(*overrides)
    said = capsys.readouterr().err
    assert [key for key in HARMLESS if not re.search(rf"^  {key}: .+ -> .+$", said, re.MULTILINE)] == []
    stopped.start(*overrides)  # stored
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "schedule",
    [
        "algorithm.dpo_beta={schedule:linear,start:0.1,end:0.2}",
        "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
    ],
)
def test_the_length_matters_to_a_schedule(folder, schedule):
    folder.start(schedule)
    folder.save(6)
    assert "trainer.total_training_steps: 12 -> 40" in folder.refusal(schedule, "trainer.total_training_steps=40")


def test_force_takes_the_checkpoint_in_spite_of_the_settings(stopped, capsys):
    config = stopped.start("algorithm.dpo_loss_type=ipo", "trainer.resume_mode=force")
    assert config.trainer.resume_mode == "auto"  # verl's name for it
    assert "algorithm.dpo_loss_type: sigmoid -> ipo" in capsys.readouterr().err
    assert list(checkpoints(stopped.path)) == [3, 6]
    stopped.start("algorithm.dpo_loss_type=ipo")
    assert "ipo -> sigmoid" in stopped.refusal()


@pytest.mark.parametrize("mode", ["auto", "force"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trainer.n_gpus_per_node=2", "trainer.nnodes * trainer.n_gpus_per_node: 1 -> 2"),
        ("data.dataloader_num_workers=2", "data.dataloader_num_workers: 0 -> 2"),
        ("actor_rollout_ref.actor.strategy=fsdp", "actor_rollout_ref.actor.strategy: fsdp2 -> fsdp"),
    ],
)
def test_what_no_checkpoint_can_be_loaded_with_is_refused(stopped, mode, change, words):
    assert words in stopped.refusal(change, f"trainer.resume_mode={mode}")


def test_what_is_answered_ahead_stands_in_a_file_a_storage_unit(folder):
    units = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
    folder.start()
    folder.save(6)
    folder.start(f"{units}=2")
    ahead = "trainer.v1.trainer_mode=colocate_async"
    assert f"{units}: 2 -> 1" in folder.refusal(ahead, "trainer.resume_mode=force")
    folder.start(ahead, f"{units}=2", "trainer.resume_mode=force")


def test_ranks_may_stand_in_other_machines(folder):
    gpus = ["trainer.device=cuda", "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"]
    folder.start(*gpus, "trainer.nnodes=2", "trainer.n_gpus_per_node=4")
    folder.save(6)
    folder.start(*gpus, "trainer.nnodes=4", "trainer.n_gpus_per_node=2")


def test_before_the_first_checkpoint_settings_may_change(folder):
    folder.start()
    folder.start("algorithm.dpo_loss_type=ipo")
    assert folder.stored()["algorithm"]["dpo_loss_type"] == "ipo"


def test_a_checkpoint_without_settings_is_taken_and_that_is_said(stopped, capsys):
    (stopped.path / resume.SETTINGS).unlink()
    stopped.start("algorithm.dpo_loss_type=ipo")
    assert "does not hold its settings" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "trainer: 5", "trainer: {nnodes: 1}"])
def test_settings_that_cannot_be_read_are_named(stopped, text):
    (stopped.path / resume.SETTINGS).write_text(text)
    assert f"{stopped.path / resume.SETTINGS}" in stopped.refusal()


def test_a_nest_of_settings_is_named(stopped):
    (stopped.path / resume.SETTINGS).write_text("[" * 10**4)
    assert f"{stopped.path / resume.SETTINGS}: not readable" in stopped.refusal()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (resume.CONTENTS, None, "contents=None must be a section of files"),
        (resume.CONTENTS, ["a"], "contents=['a'] must be a section of files"),
        (resume.SERVERS, None, f"{resume.SERVERS}=None must be a list of texts"),
        (resume.SERVERS, [5], f"{resume.SERVERS}=[5] must be a list of texts"),
        (resume.SERVERS, "http://me:s3cret@judge/v1", f"{resume.SERVERS}='http://***@judge/v1' must be a list"),
    ],
)
def test_stored_settings_that_were_spoiled_are_named(stopped, key, value, words):
    settings = OmegaConf.create(stopped.stored())
    OmegaConf.update(settings, key, value, merge=False)
    (stopped.path / resume.SETTINGS).write_text(OmegaConf.to_yaml(settings))
    message = stopped.refusal("algorithm.judge.models=rule", "trainer.resume_mode=force")
    assert message.startswith(f"{stopped.path / resume.SETTINGS}: {words}"), message
    assert "correct it, or delete it" in message


def test_a_checkpoint_may_lie_elsewhere(stopped, tmp_path):
    (stopped.path / "global_step_6").rename(tmp_path / "moved")
    (stopped.path / "global_step_6").symlink_to(tmp_path / "moved")
    assert "sigmoid -> ipo" in stopped.refusal("algorithm.dpo_loss_type=ipo")


SECRET = ("openai_key", "judge_key", "apikey", "openaiApiKey", "private_key", "authorization", "x-api-key", "HF_TOKEN")
SECRET += ("AWS_SECRET_ACCESS_KEY", "key", "passwd", "credentials", "a.b.secret", "reward_kwargs.api_key")
HARMLESS_NAMES = ("data.prompt_key", "reward_fn_key", "image_key", "algorithm.judge.api_key_env", "max_tokens")
HARMLESS_NAMES += ("reward_kwargs.answer_key", "data.response_key", "chosen_key", "data.rejected_key")
HARMLESS_NAMES += ("GOOGLE_APPLICATION_CREDENTIALS",)  # a file's name, which processes of other nodes need


def test_names_of_secrets():
    """One list of them, for settings and for variables."""
    assert [name for name in SECRET if not is_secret(name)] == []
    assert [name for name in HARMLESS_NAMES if is_secret(name)] == []


def test_no_setting_of_verls_is_taken_for_a_secret(folder):
    settings = OmegaConf.to_container(folder.run.check())
    secrets = [key for key in keys_of(settings) if is_secret(key)]
    assert [key for key in secrets if not key.startswith("distillation.")] == []


def keys_of(section: dict, path: str = "") -> list[str]:
    keys = []
    for name, value in section.items():
        keys += keys_of(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}"]
    return keys


def test_secrets_are_not_stored(folder):
    config = folder.run.check()
    with open_dict(config):
        config.ray_kwargs.ray_init.runtime_env = {"env_vars": {"WANDB_API_KEY": "hidden"}}
        config.data.hf_token = config.data.judge_key = "hidden"
        config.trainer.wandb_proxy = "http://me:hidden@proxy:80"
    resume.prepare(config)
    text = (folder.path / resume.SETTINGS).read_text()
    assert "hidden" not in text and "http://proxy:80" in text
    for key in ("prompt_key", "reward_fn_key", "ppo_max_token_len_per_gpu"):
        assert f"{key}: " in text


# ---- where it begins -------------------------------------------------------------------------------------------------
def test_what_is_above_the_step_is_set_aside(stopped, capsys):
    (stopped.path / "global_step_9" / "actor").mkdir(parents=True)  # cut off while it was saved
    (stopped.path / "global_step_best").mkdir()
    (stopped.path / "summary.json").write_text("{}")
    (stopped.path / "metrics").mkdir()
    for name in ("from_step_00000000.jsonl", "from_step_00000003.jsonl", "from_step_00000007.jsonl"):
        (stopped.path / "metrics" / name).touch()
    for step in (0, 7):
        keep_answers(stopped.path, step, [])
    keep_unreadable(stopped.path, {"step": 2, "text": "hm"})
    stopped.start()
    assert (stopped.path / UNREADABLE).read_text() == '{"step": 2, "text": "hm"}\n'
    aside = stopped.path / "set_aside_1"
    assert sorted(str(path.relative_to(aside)) for path in aside.glob("*/*")) == [
        "global_step_9/actor",
        "held_out/step_00000007.jsonl",
        "metrics/from_step_00000007.jsonl",
    ]
    assert (aside / "summary.json").exists() and not (stopped.path / "summary.json").exists()
    assert list(checkpoints(stopped.path)) == [3, 6] and (stopped.path / "global_step_best").exists()
    assert "begins at step 6" in (said := capsys.readouterr().err) and str(aside) in said


def test_starting_over_sets_everything_aside(stopped):
    (stopped.path / "metrics").mkdir()
    (stopped.path / "metrics" / "from_step_00000000.jsonl").touch()
    keep_answers(stopped.path, 0, [])
    keep_unreadable(stopped.path, {"step": 2, "text": "hm"})
    config = stopped.start("trainer.resume_mode=disable", "algorithm.dpo_loss_type=ipo")
    assert config.trainer.resume_mode == "disable"
    assert list(checkpoints(stopped.path)) == [] and not (stopped.path / TRACKER).exists()
    assert first_answers(stopped.path) is None and not (stopped.path / UNREADABLE).exists()
    assert list(checkpoints(stopped.path / "set_aside_1")) == [3, 6]
    stopped.save(2)
    stopped.start("algorithm.dpo_loss_type=ipo")
    assert list(checkpoints(stopped.path)) == [2]


def test_going_back_to_an_earlier_checkpoint(stopped, capsys):
    path = f"trainer.resume_from_path={stopped.path}/global_step_3/"
    config = stopped.start("trainer.resume_mode=resume_path", path, "algorithm.dpo_loss_type=ipo")
    assert config.trainer.resume_mode == "resume_path"
    assert config.trainer.resume_from_path == f"{stopped.path}/global_step_3"
    said = capsys.readouterr().err
    assert "sigmoid -> ipo" in said and "not this run's folder" not in said
    assert list(checkpoints(stopped.path)) == [3] and (stopped.path / TRACKER).read_text() == "3"


@pytest.mark.parametrize(("mode", "unpickles"), [("sync", False), ("colocate_async", True)])
def test_a_checkpoint_of_another_folder(stopped, tmp_path, capsys, mode, unpickles):
    path = f"trainer.resume_from_path={stopped.path}/global_step_3"
    for step in (0, 6):
        keep_answers(stopped.path, step, [([{"role": "user", "content": "who?"}], str(step))])
    stopped.start(
        f"trainer.default_local_dir={tmp_path}/next",
        f"trainer.v1.trainer_mode={mode}",
        "trainer.resume_mode=resume_path",
        path,
    )
    assert list(checkpoints(stopped.path)) == [3, 6] and (tmp_path / "next" / resume.SETTINGS).exists()
    assert first_answers(tmp_path / "next") == [([{"role": "user", "content": "who?"}], "0")]
    said = capsys.readouterr().err
    assert f"goes on from {stopped.path}, not this run's folder" in said
    assert ("its transfer_queue/ runs code" in said) == unpickles


def test_a_checkpoint_of_another_folder_ends_what_a_folder_held(stopped, tmp_path):
    """Two runs would be one in its report, and the other's checkpoints pruned as its own."""
    stopped.start("trainer.resume_mode=disable")  # is empty now
    origin, folder = tmp_path / "origin", stopped.path
    (origin / "global_step_5" / "actor").mkdir(parents=True)
    stopped.save(2)
    (folder / "metrics").mkdir(exist_ok=True)
    (folder / "metrics" / "from_step_00000000.jsonl").touch()
    keep_answers(folder, 0, [])
    (folder / "notes.txt").touch()
    stopped.start("trainer.resume_mode=resume_path", f"trainer.resume_from_path={origin}/global_step_5")
    assert not checkpoints(folder) and not metrics_files(folder) and first_answers(folder) is None
    assert not (folder / TRACKER).exists() and (folder / "notes.txt").exists()
    assert list(checkpoints(folder / "set_aside_2")) == [2] and list(checkpoints(origin)) == [5]


def test_a_tracker_that_a_kill_emptied_is_mended(stopped, capsys):
    """verl opens it, which empties it, and then writes: the checkpoint that it would have named is complete."""
    (stopped.path / TRACKER).write_text("")
    stopped.start()
    assert (stopped.path / TRACKER).read_text() == "6" and "global_step_6 is complete" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["12", "six"])
def test_a_tracker_that_names_no_checkpoint_is_refused(stopped, text):
    (stopped.path / TRACKER).write_text(text)
    message = stopped.refusal()
    assert text in message and "3, 6" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.resume_mode=never"], "auto, disable, resume_path, force"),
        (["trainer.resume_mode=resume_path"], "trainer.resume_from_path=None"),
        (["trainer.resume_mode=resume_path", "trainer.resume_from_path=/no/global_step_1"], "name one"),
    ],
)
def test_ways_to_resume_that_do_not_exist(folder, overrides, words):
    with pytest.raises(ConfigError, match=words):
        folder.start(*overrides)


def test_a_folder_that_cannot_be_written(folder):
    folder.path.write_text("a file")
    with pytest.raises(ConfigError, match="trainer.default_local_dir"):
        folder.start()


@pytest.mark.parametrize("name", [TRACKER, resume.SETTINGS])
def test_what_cannot_be_read_there_is_told(stopped, name):
    """A folder of that name stands for a file that this user may not read, which root may."""
    (stopped.path / name).unlink()
    (stopped.path / name).mkdir()
    assert str(stopped.path / name) in stopped.refusal()


def test_a_tracker_that_is_no_text_is_told(stopped):
    (stopped.path / TRACKER).write_bytes(b"\xff\xfe6")
    assert "there is no such checkpoint" in stopped.refusal()


def test_a_file_that_cannot_be_compared_is_told(stopped, monkeypatch):
    def refuse(config):
        raise PermissionError(errno.EACCES, "Permission denied", "/models/a/generation_config.json")

    monkeypatch.setattr(resume, "contents_of", refuse)
    assert "/models/a/generation_config.json: cannot be read (Permission denied)" in stopped.refusal()


@pytest.mark.parametrize("number", [1.5, "two", True])
def test_checkpoints_to_keep_are_a_whole_number(run, number):
    assert "trainer.max_actor_ckpt_to_keep" in run.refusal(f"trainer.max_actor_ckpt_to_keep={number}")


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_refuses_before_ray_starts(stopped, tmp_path):
    # A command composes with Hydra itself: a comparison with its own settings, of which the seed alone differs
    overrides = [f"{key}={value}" for key, value in stopped.run.settings.items()]
    config = compose(*overrides)
    resume._store(resume.settings_of(config), stopped.path)
    result = subprocess.run(
        [sys.executable, "-m", "recipe.spin.main_spin", "device=cpu", *overrides, "data.seed=7"],
        cwd=tmp_path,
        env=os.environ | cpu_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "  data.seed: 1 -> 7" in result.stderr and "trainer.resume_mode=force" in result.stderr
    assert "->" not in result.stderr.replace("data.seed: 1 -> 7", "")
    assert "starting Ray" not in result.stderr


def test_what_verl_refuses_changes_nothing_in_the_folder(stopped, monkeypatch):
    """To begin anew would set the checkpoints aside, and store settings with which no run comes to be."""

    def refuse(config, **options):
        raise AssertionError("not with this model")

    monkeypatch.setattr("verl.utils.config.validate_config", refuse)
    monkeypatch.setattr(main_spin.signals, "honor", lambda: None)  # this process's signals are pytest's
    before, settings = sorted(stopped.path.rglob("*")), stopped.stored()
    asked = stopped.run.overrides("trainer.resume_mode=disable", "data.seed=7")
    with pytest.raises(SystemExit, match="error: verl refuses these settings: not with this model"):
        main_spin.main.__wrapped__(override(composed("cpu"), asked))
    assert sorted(stopped.path.rglob("*")) == before and stopped.stored() == settings
