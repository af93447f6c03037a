"""What is asked of judges and refused before Ray starts: settings, servers, room for the question."""

import json
import re
import shutil

import huggingface_hub
import pytest
from checkable_run import composed, override
from judges import judge_of, number, scores, settings
from transformers import AutoTokenizer

from benchmarks.rule_judge import Handler, RuleJudge
from recipe.spin.checks.check import check_config
from recipe.spin.checks.pinned_model import fetch_pinned_model


def test_a_server_is_asked_once_before_anything_starts(run):
    with RuleJudge(number) as server:
        run.check(*settings(server))
        run.check(*settings(server, models="rule"))
        assert len(server.questions) == 2 and "What is 1 + 1?" in server.questions[0]


class Strict(Handler):
    """Refuses a parameter, as OpenAI's reasoning models do."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if "max_tokens" in body:
            self._send(400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens'"}})
        else:
            message = {"role": "assistant", "content": "[[A]]"}
            self._send(200, {"choices": [{"message": message, "finish_reason": "stop"}]})


def test_parameters_that_a_server_refuses_are_said_before_anything_starts_and_can_be_changed(run):
    with RuleJudge(number) as server:
        server.RequestHandlerClass, server.asked = Strict, []
        message = run.refusal(*settings(server))
        assert "status 400" in message and "max_completion_tokens" in message
        assert "algorithm.judge.extra_body replaces" in message
        changes = {"extra_body": "{max_tokens:null,max_completion_tokens:9,temperature:null,reasoning:{effort:low}}"}
        run.check(*settings(server, **changes))
        scores(judge_of(server, **changes), ["1", "2"])
    assert [sorted(body) for body in server.asked[1:]] == 3 * [
        ["max_completion_tokens", "messages", "model", "reasoning"]
    ]
    assert server.asked[1]["reasoning"] == {"effort": "low"} and server.asked[0]["temperature"] == 0


def test_the_model_that_is_taken_where_none_is_named_is_said(run, capsys):
    with RuleJudge(number) as server:
        run.check(*settings(server))
        assert f"judge {server.address} is asked for rule, the first of the 1 models" in capsys.readouterr().err
        run.check(*settings(server, models="rule"))
        assert "is asked for" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"servers": "[]"}, "algorithm.judge.servers=[]: must be a list"),
        ({"servers": "[127.0.0.1:8000]"}, "algorithm.judge.servers"),
        ({"servers": "http://127.0.0.1:1/v1"}, "algorithm.judge.servers"),
        ({"servers": "['http://127.0.0.1:port/v1']"}, "algorithm.judge.servers=['http://127.0.0.1:port/v1']: give"),
        ({"servers": "['http://127.0.0.1:99999/v1']"}, "algorithm.judge.servers=['http://127.0.0.1:99999/v1']: give"),
        ({"servers": "['http://']"}, "algorithm.judge.servers=['http://']: give addresses"),
        ({"servers": "[http://127.0.0.1:1/v1]"}, "judge http://127.0.0.1:1/v1: cannot be reached"),
        ({"models": "[a,b]"}, "algorithm.judge.models"),
        ({"models": "other"}, "serves rule, and not algorithm.judge.models='other'"),
        ({"comparisons": "best"}, "algorithm.judge.comparisons='best': must be one of all, tournament"),
        ({"concurrency": 0}, "algorithm.judge.concurrency=0"),
        ({"max_tokens": "many"}, "algorithm.judge.max_tokens='many'"),
        ({"retries": -1}, "algorithm.judge.retries=-1"),
        ({"timeout_s": 0}, "algorithm.judge.timeout_s=0"),
        ({"step_timeout_s": "soon"}, "algorithm.judge.step_timeout_s='soon'"),
        ({"extra_body": "[a]"}, "algorithm.judge.extra_body=['a']: must be a section of keys or null"),
        ({"extra_body": "{top_p:nan}"}, "algorithm.judge.extra_body: cannot be sent as JSON (Out of range float"),
        ({"max_unreadable": 2}, "algorithm.judge.max_unreadable=2"),
        ({"prompt": "/no/such/file"}, "algorithm.judge.prompt='/no/such/file': cannot be read"),
    ],
)
def test_settings_that_cannot_work_are_refused(run, changes, words):
    with RuleJudge(number) as server:
        assert words in run.refusal(*settings(server, **changes))


def test_a_judge_on_loopback_is_warned_of_where_several_machines_ask(run, monkeypatch, capsys):
    """The command's own question is answered, and those of other machines' workers by whoever listens there."""
    with RuleJudge(number) as server:
        run.check(*settings(server))
        assert "is the machine itself" not in capsys.readouterr().err
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
        run.check(*settings(server))
    assert f"{server.address} is the machine itself to each machine" in capsys.readouterr().err


def test_a_steps_limit_is_refused_where_its_comparisons_do_not_come_together(run):
    with RuleJudge(number) as server:
        asked = settings(server, step_timeout_s=60)
        run.check(*asked)
        assert "algorithm.judge.step_timeout_s=60: with asynchronous generation" in run.refusal(
            *asked, "trainer.v1.trainer_mode=colocate_async"
        )


@pytest.mark.parametrize(
    "text", ["Which is better, $first or $second?", "$request $first $second $third", "$request $first $second $"]
)
def test_a_question_must_hold_what_is_asked_about(run, text):
    (run.folder / "question.txt").write_text(text)
    with RuleJudge(number) as server:
        message = run.refusal(*settings(server, prompt=run.folder / "question.txt"))
    assert "must hold $request, $first and $second" in message


def test_a_missing_key_is_said_before_anything_starts(run, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with RuleJudge(number, key="secret-key") as server:
        message = run.refusal(*settings(server))
    assert "status 401" in message and "OPENAI_API_KEY" in message and "has no value" in message


def test_a_policy_that_judges_needs_room_for_the_question(run):
    message = run.refusal("algorithm.preference_source=judge")
    assert "actor_rollout_ref.rollout.max_model_len=128" in message and "algorithm.judge.max_tokens" in message
    room = "actor_rollout_ref.rollout.max_model_len=512"
    run.check("algorithm.preference_source=judge", room, "algorithm.judge.max_tokens=16")


def test_the_room_for_a_question_is_measured_with_the_runs_chat_template(run):
    def needed(*overrides: str) -> int:
        return int(re.search(r"up to (\d+) tokens", run.refusal(OWN, *overrides))[1])

    template = "actor_rollout_ref.model.custom_chat_template="
    plain, longer = template + '"{{ messages[0].content }}"', template + '"{{ messages[0].content }} x x x{{ more }}"'
    more = "+data.apply_chat_template_kwargs.more=' and more'"
    assert needed(plain) < needed() and needed(plain) < needed(longer) < needed(longer, more)
    message = run.refusal(OWN, template + "\"{{ raise_exception('never') }}\"", "data.filter_overlong_prompts=True")
    assert "the chat template does not take the messages (never) of the preference source, by: user" in message


OWN = "algorithm.preference_source=judge"
ROOM = ["actor_rollout_ref.rollout.max_model_len=512", "algorithm.judge.max_tokens=16"]
MODEL, TOKENIZER = "actor_rollout_ref.model.path", "actor_rollout_ref.model.tokenizer_path"


@pytest.mark.parametrize("own", ["policy", "reference"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (f"{MODEL}=/no/such/folder", f"{MODEL}='/no/such/folder': there is no such folder"),
        (f"{MODEL}=no/model", f"{MODEL}='no/model': there is no such folder, and the hub has no such model"),
        (f"{MODEL}=a--b", f"{MODEL}='a--b': there is no such folder, and the hub has no such model"),
        (f"{TOKENIZER}=no/model", f"{TOKENIZER}='no/model': there is no such folder, and the hub has no such model"),
        (f"{TOKENIZER}=/no/such/folder", f"{TOKENIZER}='/no/such/folder': there is no such folder"),
        ("actor_rollout_ref.model.lora_rank=few", "actor_rollout_ref.model.lora_rank='few'"),
        ("actor_rollout_ref.rollout.max_model_len=2k", "actor_rollout_ref.rollout.max_model_len='2k'"),
        ("data.max_prompt_length=x", "data.max_prompt_length='x'"),
        ("trainer.v1=sync", "trainer.v1='sync'"),
        ("algorithm.judge.servers=5", "algorithm.judge.servers=5"),
        ("algorithm.judge.prompt='~nobody/question'", "algorithm.judge.prompt='~nobody/question': cannot be read"),
    ],
)
def test_a_fault_beside_a_policy_that_judges_is_said_as_ever(run, own, change, words):
    message = run.refusal(OWN, f"algorithm.judge.servers=[{own}]", *ROOM, change)
    assert words in message and "faults" not in message


def test_a_policy_that_judges_may_be_pinned(run, tiny_models, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: tiny_models["llama"])
    config = override(composed("cpu"), run.overrides(OWN, *ROOM, f"{MODEL}=a/b@0123abc"))
    fetch_pinned_model(config)
    check_config(config)
    assert config.actor_rollout_ref.model.path == tiny_models["llama"]


def test_the_room_is_measured_with_the_tokenizer_that_writes_prompts(run, tiny_llama, monkeypatch):
    loaded = []
    load = AutoTokenizer.from_pretrained

    def noted(path, **options):
        loaded.append((path, options["trust_remote_code"]))
        return load(path, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", noted)
    tokenizer = shutil.copytree(tiny_llama, run.folder / "tokenizer")
    trusted = [f"actor_rollout_ref.model.tokenizer_path={tokenizer}", "actor_rollout_ref.model.trust_remote_code=True"]
    assert "actor_rollout_ref.rollout.max_model_len=128" in run.refusal(OWN, *trusted)
    assert loaded == [(str(tokenizer), True)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "actor_rollout_ref.rollout.max_model_len=128"),
        (["algorithm.judge.servers=[policy,reference]"], "one model's weights at a time; name policy or reference"),
        (["actor_rollout_ref.model.lora_rank=4", "trainer.ref_update_freq=0"], "no second model"),
        (["algorithm.filter_groups.enable=True"], "algorithm.filter_groups.enable=True: which prompts tie"),
    ],
)
def test_a_reference_that_cannot_judge_is_refused(run, changes, words):
    judge = ["algorithm.preference_source=judge", "algorithm.judge.servers=[reference]"]
    message = run.refusal(*judge, *changes)
    assert "algorithm.judge.servers" in message or "max_model_len" in message
    assert words in message
    room = ["actor_rollout_ref.rollout.max_model_len=512", "algorithm.judge.max_tokens=16"]
    run.check(*judge, *room)
