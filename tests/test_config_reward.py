"""Reward files that cannot work are refused before Ray starts, by one message with the remedy; none is run."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkable_run import row, write_classifier, write_rows

from recipe.spin.checks.reward_file import WEIGHTED

PATH = "reward.custom_reward_function.path"
GOOD = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["reward.custom_reward_function.path", "no such file"]),
        ("x = 1\ndef compute_score(:\n", ["reward.custom_reward_function.path", "line 2", "correct"]),
        ("def score():\n    pass\n", ["reward.custom_reward_function.name='compute_score'", "defines score"]),
        ("x = 1\n", ["reward.custom_reward_function.name='compute_score'", "defines x"]),
        ("", ["reward.custom_reward_function.name='compute_score'", "no function"]),
    ],
    ids=["missing", "syntax", "other-function", "no-function", "empty"],
)
def test_reward_file(run, tmp_path, text, words):
    path = tmp_path / "my_reward.py"
    if text is not None:
        path.write_text(text)
    message = run.refusal(f"reward.custom_reward_function.path={path}")
    assert [word for word in [*words, str(path)] if word not in message] == [], message


SIGNATURES = {
    "a number": ("compute_score = 5\n", ["compute_score is 5", "no function"]),
    "a text": ("compute_score: str = 'x'\n", ["compute_score is 'x'", "no function"]),
    "too few": (
        "def compute_score(solution_str, ground_truth):\n    return 1\n",
        ["takes (solution_str, ground_truth)", "data_source, solution_str, ground_truth, extra_info"],
    ),
    "other names": ("def compute_score(prompt, answer, **kwargs):\n    return 1\n", ["takes (prompt, answer"]),
    "one too many": (GOOD.replace("extra_info=None", "extra_info, tokenizer"), ["tokenizer)", "by name"]),
    "keyword only": (GOOD.replace("extra_info=None", "extra_info, *, judge"), ["judge)", "by name"]),
    "by position only": (GOOD.replace("data_source,", "data_source, /,"), ["data_source, /", "by name"]),
    "lambda": ("compute_score = lambda answer: 1\n", ["takes (answer)"]),
    "missing import": ("import no_such_judge.model\n" + GOOD, ["line 1", "no_such_judge", "not installed"]),
    "missing from": ("import os\nfrom no_such_judge import score\n" + GOOD, ["line 2", "no_such_judge"]),
    "relative import": ("from .helpers import score\n" + GOOD, ["line 1", "outside of a package"]),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_a_reward_that_cannot_be_called(run, tmp_path, case):
    text, words = SIGNATURES[case]
    path = tmp_path / "my_reward.py"
    path.write_text(text)
    message = run.refusal(f"{PATH}={path}")
    assert [word for word in [*words, str(path)] if word not in message] == [], message


PASSES = {
    "try": "try:\n    from no_such_judge import compute_score\nexcept ImportError:\n    "
    + GOOD.replace("\n", "\n    "),
    "except": "try:\n    import no_such_judge\nexcept ImportError:\n    " + GOOD.replace("\n", "\n    "),
    "if": "import os\nif os.name:\n    " + GOOD.replace("\n", "\n    "),
    "annotation": "from collections.abc import Callable\n\ncompute_score: Callable = max\n",
    "star import": "from os.path import *\n",
    "import": "from os.path import join as compute_score\n",
    "partial": "from functools import partial\ncompute_score = partial(max, 1)\n",
    "one of two": "compute_score, other = max, min\n",
    "any arguments": "def compute_score(**row):\n    return 1\n",
    "async": "async " + GOOD,
    "class": "class compute_score:\n    pass\n",
}


@pytest.mark.parametrize("case", PASSES)
def test_a_reward_that_may_work_passes(run, tmp_path, case):
    path = tmp_path / "my_reward.py"
    path.write_text(PASSES[case])
    run.check(f"{PATH}={path}")


def test_arguments_of_the_config_are_given_too(run, tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(GOOD.replace("extra_info=None", "extra_info, judge"))
    run.check(f"{PATH}={path}", "+reward.custom_reward_function.reward_kwargs={judge:1}")
    assert "judge" in run.refusal(f"{PATH}={path}")


def test_the_file_is_not_run(run, tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + GOOD)
    run.check(f"{PATH}={path}")
    assert not (tmp_path / "ran").exists()


# ---- Several functions as one ----------------------------------------------------------------------------------------
FUNCTIONS = "reward.custom_reward_function.reward_kwargs.functions"


def weighted(*parts: str) -> list[str]:
    return [f"{PATH}={WEIGHTED}", *(f"+{FUNCTIONS}.{part}" for part in parts)]


def test_functions_that_are_added_up(run):
    reward = run.settings[PATH]
    run.check(*weighted(f"right={{path: {reward}}}", f"brief={{path: {reward}, name: compute_score, weight: 0.1}}"))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("{path: /absent.py}", ["brief.path='/absent.py'", "no such file"]),
        ("{path: REWARD, name: brevity}", ["brief.name='brevity'", "defines compute_score"]),
        ("{path: OTHER}", ["brief.name='compute_score'", "takes (text)", "extra_info by name"]),
        ("{path: IMPORTS}", ["brief.path=", "line 1 imports no_such_judge"]),
        ("{path: REWARD, weight: much}", ["brief.weight='much'", "a finite number"]),
        ("{path: REWARD, weight: nan}", ["brief.weight=nan", "a finite number"]),
        ("{path: REWARD, weight: true}", ["brief.weight=True", "a finite number"]),
        ("{path: REWARD, wieght: 2}", ["brief={'path'", "must be {path: FILE, name: FUNCTION"]),
        ("{name: compute_score}", ["brief={'name'", "must be {path: FILE"]),
        ("{path: REWARD, name: [5]}", ["brief={'path'", "must be {path: FILE, name: FUNCTION"]),
        ("5", ["brief=5", "must be {path: FILE"]),
    ],
)
def test_a_function_to_be_added_that_will_not_do(run, tmp_path, part, words):
    (tmp_path / "other.py").write_text("def compute_score(text):\n    return 1\n")
    (tmp_path / "imports.py").write_text("import no_such_judge\n" + GOOD)
    for name, file in (("REWARD", "reward"), ("OTHER", "other"), ("IMPORTS", "imports")):
        part = part.replace(name, str(tmp_path / f"{file}.py"))
    message = run.refusal(*weighted(f"right={{path: {run.settings[PATH]}}}", f"brief={part}"))
    assert message.startswith(f"{FUNCTIONS}.brief") and "\n" not in message, message
    assert [word for word in words if word not in message] == [], message


def test_functions_to_be_added_are_named(run):
    assert "functions by name" in run.refusal(*weighted())
    message = run.refusal(*weighted(f"acc={{path: {run.settings[PATH]}}}"))
    assert message == f"{FUNCTIONS}.acc: the name is taken by the sum's own score and acc; call the function otherwise"
    message = run.refusal(f"{PATH}={WEIGHTED}", f"+{FUNCTIONS}=[]")
    assert message.startswith(f"{FUNCTIONS}=[]: preferences/weighted.py adds up functions by name; give each as")
    assert "a section of keys" in run.refusal("+reward.custom_reward_function.reward_kwargs=5")


# ---- A reward model --------------------------------------------------------------------------------------------------
MODEL = "reward.reward_model"


@pytest.fixture
def classifier(run, tmp_path, tiny_llama):
    """The settings of a run with a reward model; its folder is `classifier`."""
    write_classifier(tiny_llama, tmp_path / "classifier")
    return [f"{MODEL}.enable=True", f"{MODEL}.model_path={tmp_path}/classifier", f"{PATH}=null"]


def test_a_reward_model(run, classifier):
    run.check(*classifier)
    own = [f"{MODEL}.enable_resource_pool=True", f"{MODEL}.nnodes=1", f"{MODEL}.n_gpus_per_node=1"]
    run.check(*classifier, *own, "ray_kwargs.ray_init.num_gpus=2")


def test_a_reward_model_in_the_policys_pool_scores_too_late_for_dynamic_sampling(run, classifier):
    message = run.refusal(*classifier, "algorithm.filter_groups.enable=True")
    assert message.startswith("algorithm.filter_groups.enable=True: which prompts tie")
    assert f"{MODEL}.enable_resource_pool=True" in message
    own = [f"{MODEL}.enable_resource_pool=True", f"{MODEL}.nnodes=1", f"{MODEL}.n_gpus_per_node=1"]
    run.check(*classifier, *own, "ray_kwargs.ray_init.num_gpus=2", "algorithm.filter_groups.enable=True")


def test_a_reward_model_in_the_policys_pool_has_weights_sent_in_every_step(run, classifier):
    """verl frees what an update keeps of the GPU with them alone, and the reward model wakes there."""
    seldom = ["trainer.rollout_sync_freq=2", "actor_rollout_ref.rollout.free_cache_engine=False"]
    message = run.refusal(*classifier, *seldom)
    assert message.startswith("trainer.rollout_sync_freq=2: the reward model takes turns")
    own = [f"{MODEL}.enable_resource_pool=True", f"{MODEL}.nnodes=1", f"{MODEL}.n_gpus_per_node=1"]
    run.check(*classifier, *own, *seldom, "ray_kwargs.ray_init.num_gpus=2")


def test_a_reward_models_own_pool_needs_devices_beside_the_trainers(run, classifier, monkeypatch):
    """verl would refuse them when Ray has started: 8 < 10."""
    pool = [f"{MODEL}.enable_resource_pool=True", f"{MODEL}.nnodes=1", f"{MODEL}.n_gpus_per_node=2"]
    message = run.refusal(*classifier, *pool)
    assert "num_gpus=1 places for them and the 2 of the reward model's own pool" in message and "set it to 3" in message
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("recipe.spin.checks.check.machine_faults", lambda _: [])
    served = [f"{MODEL}.rollout.name=vllm", f"{MODEL}.rollout.tensor_model_parallel_size=1"]
    message = run.refusal(*classifier, *pool, *served, "trainer.n_gpus_per_node=8", device="gpu")
    assert message.startswith("trainer.n_gpus_per_node=8: this machine shows 8 GPUs for them and the 2 of the reward")
    run.check(*classifier, *pool, *served, "trainer.n_gpus_per_node=6", device="gpu")


def test_the_documentations_command_for_eight_gpus_is_accepted(run, classifier, tmp_path, monkeypatch):
    """With the GPU profile's batch, of prompts that nothing is compared with."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("recipe.spin.checks.check.machine_faults", lambda _: [])
    text = (Path(__file__).resolve().parents[1] / "docs" / "preferences.md").read_text()
    gpus, command = re.search(r"^N_GPUS_PER_NODE=(\d) \S+ \S+ bash run_spin.sh (.*?)```", text, re.M | re.S).groups()
    settings = [setting for setting in command.replace("\\\n", " ").split() if "model_path=" not in setting]
    own = [f"trainer.n_gpus_per_node={gpus}", f"{MODEL}.model_path={tmp_path}/classifier", "data.train_batch_size=64"]
    for part, count in (("train", 64), ("val", 4)):
        prompts = [{"prompt": row(number)["prompt"]} for number in range(count)]
        own.append(f"data.{part}_files={write_rows(tmp_path / f'{part}.jsonl', prompts)}")
    run.check(*settings, *own, device="gpu")
    assert "2 of the reward model's own pool" in run.refusal(*settings, *own, own[0].replace(gpus, "7"), device="gpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([f"{MODEL}.model_path=null"], [f"{MODEL}.model_path=None", "name the reward model"]),
        ([f"{MODEL}.model_path=/absent"], [f"{MODEL}.model_path='/absent'", "no such folder"]),
        ([f"{MODEL}.model_path=nobody/no-such-model"], [f"{MODEL}.model_path=", "the hub has no such model"]),
        ([f"{MODEL}.rollout.name=???"], [f"{MODEL}.rollout.name='???'", "set vllm"]),
        (
            [f"{MODEL}.rollout.tensor_model_parallel_size=2"],
            ["tensor_model_parallel_size=2", "1 devices", "groups of 2"],
        ),
        (
            [
                f"{MODEL}.enable_resource_pool=True",
                f"{MODEL}.nnodes=2",
                f"{MODEL}.n_gpus_per_node=3",
                "ray_kwargs.ray_init.num_gpus=7",
                "ray_kwargs.ray_init.num_cpus=25",
                f"{MODEL}.rollout.tensor_model_parallel_size=2",
            ],
            ["tensor_model_parallel_size=2", "6 devices", "groups of 2 that lie within a node's 3"],
        ),
        ([f"{MODEL}.rollout.dtype=fp32"], [f"{MODEL}.rollout.dtype='fp32'", "float32"]),
        ([f"{MODEL}.enable_resource_pool=True"], [f"{MODEL}.nnodes=0", "at least 1"]),
    ],
    ids=lambda value: value[0],
)
def test_a_reward_model_that_cannot_be_served(run, classifier, settings, words):
    kept = [setting for setting in classifier if setting.split("=")[0] != settings[0].split("=")[0]]
    message = run.refusal(*kept, *settings)
    assert "\n" not in message, message
    assert [word for word in words if word not in message] == [], message


def test_a_reward_model_must_be_a_classifier(run, classifier, tmp_path, tiny_llama):
    causal = [*classifier[:1], f"{MODEL}.model_path={tiny_llama}"]
    message = run.refusal(*causal, f"{PATH}=null")
    assert message.startswith(f"{MODEL}.model_path=") and "['LlamaForCausalLM']" in message
    assert "sequence classifier" in message
    (tmp_path / "asks.py").write_text(GOOD.replace("extra_info=None", "extra_info, **model"))
    run.check(*causal, f"{PATH}={tmp_path}/asks.py")


def test_a_function_beside_a_reward_model_gets_the_model(run, classifier):
    message = run.refusal(*classifier[:2])
    assert message.startswith("reward.custom_reward_function.name") and "reward_model_tokenizer by name" in message
    assert "reward.custom_reward_function.path=null" in message


def test_a_damaged_reward_model(run, classifier, tmp_path):
    weights = tmp_path / "classifier" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = run.refusal(*classifier)
    assert message.startswith(f"{MODEL}.model_path=") and "model.safetensors is cut off" in message


def test_a_reward_model_without_a_chat_template(run, classifier, tmp_path):
    (tmp_path / "classifier" / "chat_template.jinja").unlink(missing_ok=True)
    file = tmp_path / "classifier" / "tokenizer_config.json"
    kept = {name: value for name, value in json.loads(file.read_text()).items() if name != "chat_template"}
    file.write_text(json.dumps(kept))
    message = run.refusal(*classifier)
    assert message.startswith(f"{MODEL}.model_path=") and "no chat template" in message


def test_the_devices_of_a_cluster_are_not_those_of_this_machine(run, classifier, monkeypatch):
    """One node of a cluster with the trainer's, another with the reward model's."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("recipe.spin.checks.check.machine_faults", lambda _: [])
    pool = [f"{MODEL}.enable_resource_pool=True", f"{MODEL}.nnodes=1", f"{MODEL}.n_gpus_per_node=8"]
    asked = [*classifier, *pool, f"{MODEL}.rollout.name=vllm", f"{MODEL}.rollout.tensor_model_parallel_size=1"]
    asked += ["trainer.n_gpus_per_node=8"]
    assert "this machine shows 8 GPUs" in run.refusal(*asked, device="gpu")
    run.check(*asked, "+ray_kwargs.ray_init.address=head:6379", device="gpu")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    run.check(*asked, device="gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # the head
    run.check(*asked, device="gpu")


def test_a_reward_model_does_not_decide_in_place_of_a_source_that_scores(run, classifier):
    source = "algorithm.preference_source=test_agent_loop:Longest"
    message = run.refusal(source, *classifier)
    assert message.startswith(f"{MODEL}.enable=True: in the policy's pool it scores after {source} and would decide")
    assert f"{MODEL}.enable_resource_pool=True" in message
    own = [f"{MODEL}.enable_resource_pool=True", f"{MODEL}.nnodes=1", f"{MODEL}.n_gpus_per_node=1"]
    run.check(source, *classifier, *own, "ray_kwargs.ray_init.num_cpus=64", "ray_kwargs.ray_init.num_gpus=2")
    run.check("algorithm.preference_source=reference_source:ReferenceSays", *classifier)  # which scores last
