"""An OpenAI-compatible server that judges by a rule: for tests and benchmarks of judges.

    .venv/bin/python -m benchmarks.rule_judge [--port 8100] [--delay 0.2] [--unreadable 0.05] [--negated]

As a command it knows sums: the answer whose last whole number is the sum of the two in the request is better.
"""

import argparse
import json
import random
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from recipe.spin.examples.arithmetic.reward import compute_score

MODEL = "rule"
QUESTION = re.compile(r"\[Request\]\n(.*?)\n\n\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nWhich answer", re.DOTALL)
Rule = Callable[[str, str], float]  # request, response -> the higher the better


class RuleJudge(ThreadingHTTPServer):
    """Answers each comparison by what a rule says of the two responses.

    Args:
        rule: what a response to a request is worth.
        port: 0 takes a free one.
        delay: seconds that an answer takes.
        unreadable: share of the answers that hold no verdict.
        refusals: so many requests are refused first, with status 429.
        key: what clients must give, None for no key.

    Attributes:
        address: for `algorithm.judge.servers`.
        questions: all that were asked.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, rule: Rule, port=0, delay=0.0, unreadable=0.0, refusals=0, key: str | None = None):
        super().__init__(("127.0.0.1", port), Handler)
        self.rule, self.delay, self.unreadable, self.refusals, self.key = rule, delay, unreadable, refusals, key
        self.address = f"http://127.0.0.1:{self.server_port}/v1"
        self.questions: list[str] = []
        self.chance = random.Random(1)
        self.lock = threading.Lock()

    def __enter__(self) -> "RuleJudge":
        # Looks for the end every so many seconds: by default tests of many servers would wait for it half of their time
        threading.Thread(target=self.serve_forever, args=(0.02,), name="rule-judge", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, question: str) -> str:
        with self.lock:
            self.questions.append(question)
            if self.chance.random() < self.unreadable:
                return "I would rather not say."
        request, first, second = QUESTION.search(question).groups()
        first, second = self.rule(request, first), self.rule(request, second)
        return "I prefer [[C]]" if first == second else f"I prefer [[{'A' if first > second else 'B'}]]"


class Handler(BaseHTTPRequestHandler):
    """One request of an OpenAI client."""

    protocol_version = "HTTP/1.1"
    server: RuleJudge

    def do_GET(self) -> None:
        if self._admits():
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admits():
            return
        with self.server.lock:
            refused, self.server.refusals = self.server.refusals > 0, max(0, self.server.refusals - 1)
        if refused:
            self._send(429, {"error": {"message": "too many requests"}})
            return
        time.sleep(self.server.delay)
        message = {"role": "assistant", "content": self.server.answer(body["messages"][-1]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        answer = {"id": "answer", "object": "chat.completion", "created": 0, "model": MODEL}
        self._send(200, answer | {"choices": [choice], "usage": usage})

    def _admits(self) -> bool:
        wanted = self.server.key
        if wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}":
            return True
        self._send(401, {"error": {"message": f"no such key: {self.headers.get('Authorization')}"}})
        return False

    def _send(self, status: int, content: dict) -> None:
        self.write(status, "application/json", json.dumps(content).encode())

    def write(self, status: int, kind: str, body: bytes) -> None:
        """Sends an answer of that content type."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Nothing is logged: a request a comparison."""


def is_sum(request: str, response: str) -> float:
    """The arithmetic example's reward of a response, the ground truth read out of the request: its last two numbers."""
    a, b = map(int, re.findall(r"\d+", request)[-2:])
    return compute_score("arithmetic", response, str(a + b))["acc"]


def is_no_sum(request: str, response: str) -> float:
    """The same with its sign turned."""
    return -is_sum(request, response)


def main() -> None:
    parser = argparse.ArgumentParser(description="A server that judges sums, for algorithm.judge.servers.")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that an answer takes (0.2)")
    parser.add_argument("--unreadable", type=float, default=0.05, help="share of answers without a verdict (0.05)")
    parser.add_argument("--negated", action="store_true", help="prefer what is wrong")
    options = parser.parse_args()

    with RuleJudge(is_no_sum if options.negated else is_sum, options.port, options.delay, options.unreadable) as judge:
        print(f"judging at {judge.address}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
