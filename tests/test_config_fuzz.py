"""Whatever settings and rows hold, and whichever are missing, the check ends in its own error."""

import copy
import json
from pathlib import Path

import pytest
from checkable_run import Run, composed, override, row
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from benchmarks.rule_judge import RuleJudge
from recipe.spin.checks.check import check_config
from recipe.spin.checks.kinds import Section
from recipe.spin.checks.schema import Config
from recipe.spin.common.settings import ConfigError


def declared(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, sections included."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += declared(field.annotation, f"{prefix}{name}.")
    return keys


def is_resolved(text: str) -> bool:
    """Whether a text is one behind main_spin, which resolves the config before it is checked."""
    return "${" not in text


# Names as a file, a folder and a command line may have them, and longer than the 255 bytes of a file's
NAMES = st.sampled_from(
    ["~", "~/x", "~nobody/x", "/dev/null", "/proc/1/root/x", "hdfs://a/b.parquet", "a/b@c", "x" * 300, "ü" * 200]
)
NAMES = NAMES | st.text("ab/.@ü", min_size=250, max_size=5000)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8).filter(is_resolved) | NAMES
LEAVES = LEAVES | st.sampled_from(["1e400", "-1", "???"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=4,
)
TAKEN_OUT = object()
CHANGES = st.dictionaries(st.sampled_from(declared()), VALUES | st.just(TAKEN_OUT), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def prepared(tiny_models, tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), tiny_models["llama"])


@pytest.fixture(scope="module")
def values(prepared) -> dict:
    """The settings of a run that could start."""
    return OmegaConf.to_container(override(composed("cpu"), prepared.overrides()), resolve=True)


def changed(values: dict, changes: dict) -> DictConfig:
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section.get(part)
            if not isinstance(section, dict):  # changed itself
                break
        else:
            if value is TAKEN_OUT:
                section.pop(name, None)
            else:
                section[name] = value
    config = OmegaConf.create(values)
    OmegaConf.set_struct(config, True)  # as Hydra does
    return config


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(CHANGES)
@example({"actor_rollout_ref.rollout": {}})
@example({"algorithm.judge": TAKEN_OUT})
@example({"reward": TAKEN_OUT})
@example({"ray_kwargs.ray_init.num_cpus": TAKEN_OUT})
@example({"ray_kwargs.ray_init.num_gpus": TAKEN_OUT})
@example({"reward.custom_reward_function.path": TAKEN_OUT})
@example({"actor_rollout_ref.actor.fsdp_config.offload_policy": TAKEN_OUT})
@example({"algorithm.preference_source": "???"})
@example({"data.train_files": "x" * 300})
@example({"trainer.resume_mode": "resume_path", "trainer.resume_from_path": f"global_step_{'1' * 300}"})
@example({"reward.reward_model.enable": True, "reward.reward_model.model_path": "x" * 300})
def test_settings_of_any_kind(values, changes):
    try:
        check_config(changed(values, changes))
    except ConfigError as error:
        assert str(error)


# What a judge looks at
JUDGED = ("algorithm", "trainer.v1", "data.max_", "actor_rollout_ref.model", "actor_rollout_ref.rollout.max_model_len")
JUDGES = st.sampled_from(["policy", "reference", "http://127.0.0.1:1/v1", "served"])


@pytest.fixture(scope="module")
def served():
    with RuleJudge(lambda request, response: 0.0) as server:
        yield server.address


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    JUDGES,
    st.dictionaries(
        st.sampled_from([key for key in declared() if key.startswith(JUDGED)]),
        VALUES | st.just(TAKEN_OUT),
        max_size=3,
    ),
    st.none() | VALUES | st.lists(st.text(max_size=8).map("http://".__add__), max_size=2),
)
@example("reference", {"algorithm.judge.servers": None}, None)
@example("served", {"algorithm.judge.models": {"a": 1}}, None)
@example("served", {}, ["http://127.0.0.1:99999/v1"])
def test_settings_of_a_judge(values, served, judge, changes, servers):
    room = {"actor_rollout_ref.rollout.max_model_len": 512, "algorithm.judge.max_tokens": 16}
    servers = [served if judge == "served" else judge] if servers is None else servers
    asked = {"algorithm.preference_source": "judge", "algorithm.judge.servers": servers}
    try:
        check_config(changed(values, asked | room | changes))
    except ConfigError as error:
        assert str(error)


ROWS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "prompt": VALUES | st.lists(st.fixed_dictionaries({"role": VALUES, "content": VALUES}), max_size=2),
            "data_source": VALUES,
            "reward_model": VALUES | st.fixed_dictionaries({"ground_truth": VALUES}),
            "real": VALUES,
        },
    )
    | VALUES,
    max_size=3,
)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(ROWS, st.sampled_from(["reward", "self_play"]))
def test_rows_of_any_kind(values, prepared, rows, source):
    path = Path(prepared.folder) / "fuzzed.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, row(1)])))
    changes = {"data.train_files": str(path), "algorithm.preference_source": source}
    changes["data.prompt_key"] = {"reward": "prompt", "self_play": "real"}[source]
    try:
        check_config(changed(values, changes))
    except ConfigError as error:
        assert "data.train_files" in str(error)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200), st.sampled_from(["json", "jsonl", "parquet"]))
def test_files_of_any_bytes(values, prepared, content, kind):
    path = Path(prepared.folder) / f"bytes.{kind}"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        check_config(changed(values, {"data.train_files": str(path)}))
