"""Judges' servers that are busy, slow or answer rubbish, their keys, and what lies on the way to them."""

import json
import ssl
import subprocess
import threading
import time
import traceback

import pytest
from judges import HTML, JSON, Rubbish, judge_of, number, scores, settings
from worker_harness import compose

from benchmarks.rule_judge import Handler, RuleJudge
from recipe.spin.preferences import judge_server
from recipe.spin.preferences.judge import JudgeFailed, JudgeSource
from recipe.spin.run_folder import UNREADABLE


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the config's run folder lies."""
    monkeypatch.chdir(tmp_path)


def test_a_busy_server_is_asked_again():
    with RuleJudge(number, refusals=2) as server:
        assert scores(judge_of(server, retries=3), ["1", "2"])[0] == [0, 1]


def test_a_server_that_stays_busy_is_named_with_the_remedy():
    with (
        RuleJudge(number, refusals=100) as server,
        pytest.raises(JudgeFailed, match=r"127.0.0.1.*status 429.*too many requests.*algorithm.judge.concurrency"),
    ):
        scores(judge_of(server))


def test_a_slow_server_ends_in_an_error():
    with RuleJudge(number, delay=2) as server:
        with pytest.raises(JudgeFailed, match="algorithm.judge.timeout_s"):
            scores(judge_of(server, timeout_s=0.1), ["1", "2"])
        with pytest.raises(JudgeFailed, match="step 1: .*algorithm.judge.step_timeout_s=0.1"):
            scores(judge_of(server, step_timeout_s=0.1), ["1", "2"])


RUBBISH = [
    (HTML, "<html>please log in</html>", "<html>please log in</html>"),
    (JSON, '{"error": {"message": "no such model"}}', "no such model"),
    (JSON, '{"choices": [{"message"', '{"choices": [{"message"'),
    (JSON, "", "''"),
    (JSON, "null", "'null'"),
    (JSON, "[]", "'[]'"),
]


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        *RUBBISH,
        (JSON, '{"choices": []}', '{"choices": []}'),
        (JSON, '{"choices": null}', '{"choices": null}'),
        (JSON, '{"choices": [{"text": "[[A]]"}]}', "[[A]]"),
        (JSON, '{"choices": [{"message": {"content": ["[[A]]"]}}]}', "[[A]]"),
    ],
)
def test_an_answer_that_is_none_is_shown_with_its_address(kind, body, said):
    with Rubbish(kind, body) as server, pytest.raises(JudgeFailed) as caught:
        scores(judge_of(server), ["1", "2"])
    message = str(caught.value)
    assert message.startswith(f"judge {server.address}: status 200, ") and said in message
    assert "after POST /v1/chat/completions, which is no answer of OpenAI's API" in message


def test_a_long_answer_that_is_none_is_shown_by_its_beginning():
    with Rubbish(HTML, "<html>" + 10_000 * "please log in ") as server, pytest.raises(JudgeFailed) as caught:
        scores(judge_of(server), ["1", "2"])
    assert "<html>please log in" in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "message", [{"content": None}, {}, {"content": "[[A]]", "reasoning": "long"}], ids=["null", "none", "more"]
)
def test_answers_without_a_text_or_with_more_are_answers(message):
    with Rubbish(JSON, json.dumps({"choices": [{"message": message}], "usage": None, "more": 1})) as server:
        values, metrics = scores(judge_of(server, max_unreadable=1.0), ["1", "2"])
    assert values == [0.5, 0.5] and metrics["judge/tokens"] == 0
    assert metrics["judge/unreadable_rate"] == (0 if message.get("content") else 1)


@pytest.mark.parametrize("model", ["null", "rule"])
@pytest.mark.parametrize(("kind", "body", "said"), [*RUBBISH, (JSON, '{"data": [{"name": "a"}]}', '{"name": "a"}')])
def test_a_list_of_models_that_is_none_is_said_before_anything_starts(run, model, kind, body, said):
    with Rubbish(kind, body, commands=("GET",)) as server:
        message = run.refusal(*settings(server, models=model))
        assert message.startswith(f"judge {server.address}: status 200, ") and said in message
        assert "after GET /v1/models, which is no answer of OpenAI's API" in message


@pytest.mark.parametrize("data", ["null", "[]"])
def test_a_server_without_models_is_said(run, data):
    with Rubbish(JSON, f'{{"data": {data}}}', commands=("GET",)) as server:
        assert run.refusal(*settings(server)) == f"judge {server.address}: serves no model; start it with one"


class Silent(Handler):
    def do_GET(self) -> None:
        self.server.end.wait()


def test_a_server_that_does_not_say_what_it_serves_is_given_up(run, monkeypatch):
    monkeypatch.setattr(judge_server, "PROBE_SECONDS", 0.2)
    with RuleJudge(number) as server:
        server.RequestHandlerClass, server.end = Silent, threading.Event()
        message = run.refusal(*settings(server))
        server.end.set()
    assert f"judge {server.address}: did not say within 0.2 seconds what it serves; wait until" in message
    assert "timeout_s" not in message


def test_only_so_many_questions_are_under_way_at_a_server_as_is_allowed():
    class Counting(RuleJudge):
        now = most = 0

        def answer(self, question: str) -> str:
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(0.05)
            with self.lock:
                self.now -= 1
            return super().answer(question)

    workers = compose(device="cpu").actor_rollout_ref.rollout.agent.num_workers
    with Counting(number) as server:
        scores(judge_of(server, concurrency=3 * workers))
    assert len(server.questions) == 10 and server.most == 3


def test_the_key_comes_from_the_environment_and_is_never_shown(run, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "secret-key\n")  # as a file gives it
    with RuleJudge(number, key="secret-key") as server:
        asked = judge_of(server, api_key_env="MY_KEY")
        assert scores(asked, ["1", "2"])[0] == [0, 1]
        run.check(*settings(server, api_key_env="MY_KEY"))
        monkeypatch.setenv("MY_KEY", "another-key")
        with pytest.raises(
            JudgeFailed, match="status 401.*no such key.*MY_KEY .*holds a key that it refuses"
        ) as caught:
            scores(judge_of(server, api_key_env="MY_KEY"), ["1", "2"])
        message = run.refusal(*settings(server, api_key_env="MY_KEY"))
    assert "status 401" in message and "MY_KEY" in message
    shown = "".join(traceback.format_exception(caught.value)) + message + caplog.text
    assert "another-key" not in shown and "Bearer ***" in shown


def test_a_key_in_an_answer_is_not_kept(monkeypatch, caplog, tmp_path):
    """Of a gateway that talks about a request in place of a verdict."""
    monkeypatch.setenv("MY_KEY", "another-key")
    with RuleJudge(number, unreadable=1.0, key="another-key") as server:
        monkeypatch.setattr(server, "answer", lambda question: "Bearer another-key is welcome")
        source = judge_of(server, api_key_env="MY_KEY", max_unreadable=1.0)
        source.config.trainer.default_local_dir = str(tmp_path)
        scores(source, ["1", "2"])
    kept = (tmp_path / UNREADABLE).read_text()
    assert "Bearer *** is welcome" in caplog.text and "Bearer *** is welcome" in kept
    assert "another-key" not in caplog.text + kept


def test_an_answer_that_a_filter_cut_off_is_unreadable_whatever_it_holds():
    body = {"choices": [{"message": {"content": "Perhaps [[A]], but"}, "finish_reason": "content_filter"}]}
    with Rubbish(JSON, json.dumps(body)) as server:
        values, metrics = scores(judge_of(server, max_unreadable=1.0), ["1", "2"])
    assert values == [0.5, 0.5] and metrics["judge/unreadable_rate"] == 1


def test_a_key_in_rubbish_is_not_shown_either(monkeypatch):
    monkeypatch.setenv("MY_KEY", "another-key")
    for body in ('{"error": "what is another-key?"}', f"<html>{190 * ' '}another-key"):
        with Rubbish(JSON, body) as server, pytest.raises(JudgeFailed) as caught:
            scores(judge_of(server, api_key_env="MY_KEY"), ["1", "2"])
        assert "anot" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", ["sécret", "sec\nret"])
def test_a_key_that_none_can_be_is_refused_without_being_shown(run, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with RuleJudge(number) as server:
        message = run.refusal(*settings(server, api_key_env="MY_KEY"))
    assert "MY_KEY (algorithm.judge.api_key_env) holds signs that no key has" in message and "ret" not in message


# ---- On the way to a server ------------------------------------------------------------------------------------------
@pytest.fixture
def proxies(monkeypatch):
    """Sets the environment's proxies and certificates, and no others."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_a_proxy_does_not_lead_to_a_judge_on_this_machine(run, proxies):
    proxies(HTTP_PROXY="http://127.0.0.1:1", ALL_PROXY="socks://127.0.0.1:1", SSL_CERT_FILE="/absent")
    with RuleJudge(number) as server:
        run.check(*settings(server))
        assert scores(judge_of(server), ["1", "2"])[0] == [0, 1]


@pytest.fixture
def https_judge(tmp_path):
    """A judge at https://localhost, and the file of its certificate, which no public authority vouches for."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = RuleJudge(number)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.address = f"https://localhost:{server.server_port}/v1"
    with server:
        yield server, certificate


def test_a_judge_on_this_machine_is_trusted_by_the_environments_certificates_alone(run, proxies, https_judge):
    server, certificate = https_judge
    assert "CERTIFICATE_VERIFY_FAILED" in run.refusal(*settings(server))
    proxies(SSL_CERT_FILE=str(certificate), HTTPS_PROXY="http://127.0.0.1:1")
    run.check(*settings(server))
    assert scores(judge_of(server), ["1", "2"])[0] == [0, 1]


JUDGE = ["algorithm.preference_source=judge", "algorithm.judge.servers=[http://judge.invalid:8000/v1]"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"HTTP_PROXY": "http://me:secret@127.0.0.1:1"},
            ["cannot be reached through the proxy http://***@127.0.0.1:1", "NO_PROXY"],
        ),
        ({"ALL_PROXY": "socks5://127.0.0.1:1"}, ["no connection can be set up (ImportError: ", "ALL_PROXY"]),
        ({"ALL_PROXY": "socks://me:secret@127.0.0.1:1"}, ["no connection can be set up (ValueError: ", "ALL_PROXY"]),
        ({"HTTP_PROXY": "http://proxy:80a"}, ["no connection can be set up (InvalidURL: ", "HTTP_PROXY"]),
        ({"SSL_CERT_FILE": "/absent"}, ["no connection can be set up (FileNotFoundError: ", "SSL_CERT_FILE"]),
    ],
    ids=["proxy", "socks5", "socks", "port", "certificates"],
)
def test_a_way_to_a_judge_that_cannot_be_taken_is_named(run, proxies, variables, words):
    proxies(**variables)
    message = run.refusal(*JUDGE)
    assert message.startswith("judge http://judge.invalid:8000/v1: ") and "secret" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_password_in_a_judges_address_is_not_shown(run, caplog):
    with RuleJudge(number, unreadable=1.0) as server:
        address = server.address.replace("://", "://me:sec%40ret@")
        named = ["algorithm.preference_source=judge", f"algorithm.judge.servers=['{address}']"]
        source = JudgeSource(compose(*named, device="cpu"), None)
        with pytest.raises(JudgeFailed) as caught:
            scores(source, list("12345678"))
        other = run.refusal(*named, "algorithm.judge.models=other")
    gone = run.refusal(*named, "algorithm.judge.models=rule")
    shown = str(caught.value) + caplog.text + other + gone
    assert "sec%40ret" not in shown and shown.count("http://***@127.0.0.1") >= 3
