"""Judges, real servers and such as answer rubbish, and what tests ask of them."""

import asyncio

from checkable_run import composed, override

from benchmarks.rule_judge import Handler, RuleJudge
from recipe.spin.preferences.judge import JudgeSource
from recipe.spin.preferences.source import Group

RESPONSES = ["3", "7", "11", "7"]


def number(request: str, response: str) -> float:
    return float(response)


def group(responses: list[str], generate=None, content="What is 3 + 4?", step: int = 1, **more) -> Group:
    return Group(step, [{"role": "user", "content": content}], responses, None, {}, generate, **more)


def settings(*servers: RuleJudge, **changes) -> list[str]:
    addresses = ",".join(server.address for server in servers)
    overrides = {"servers": f"[{addresses}]", "retries": 0, "timeout_s": 5} | changes
    return [
        "algorithm.preference_source=judge",
        *(f"algorithm.judge.{key}={value}" for key, value in overrides.items()),
    ]


def judge_of(*servers: RuleJudge, tokenizer=None, **changes) -> JudgeSource:
    return JudgeSource(override(composed("cpu"), settings(*servers, **changes)), tokenizer)


def scores(source: JudgeSource, responses=RESPONSES, generate=None) -> tuple[list[float], dict[str, float]]:
    found = asyncio.run(source.score_group(group(responses, generate)))
    return [score.value for score in found], source.metrics([score.info for score in found])


class RubbishHandler(Handler):
    def write(self, status: int, kind: str, body: bytes) -> None:
        if status == 200 and self.command in self.server.commands:
            status, kind, body = self.server.rubbish
        super().write(status, kind, body)


class Rubbish(RuleJudge):
    """Answers requests of these methods with what OpenAI's API would not."""

    def __init__(self, kind: str, body: str, commands: tuple[str, ...] = ("POST",), **options):
        super().__init__(number, **options)
        self.rubbish, self.commands, self.RequestHandlerClass = (200, kind, body.encode()), commands, RubbishHandler


JSON, HTML = "application/json", "text/html; charset=utf-8"
