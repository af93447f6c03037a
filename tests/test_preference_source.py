"""Preference sources of one's own."""

import asyncio
import functools
from pathlib import Path

import pytest

from recipe.spin.preferences.judge import JudgeSource
from recipe.spin.preferences.source import Group, PreferenceSource, Score, source_class

ROOT = Path(__file__).resolve().parents[1]


def test_a_source_of_ones_own_is_named_by_its_module():
    assert source_class("recipe.spin.preferences.judge:JudgeSource") is JudgeSource
    assert JudgeSource.scores_groups() and not source_class("reward").scores_groups()


class Plain(PreferenceSource):
    def score_group(self, group: Group) -> list[Score]:
        return []


def noted(function):
    @functools.wraps(function)
    def call(*arguments):
        return function(*arguments)

    return call


class Decorated(PreferenceSource):
    @noted
    async def score_group(self, group: Group) -> list[Score]:
        return []


def test_a_decorated_source_is_one():
    assert source_class("test_preference_source:Decorated").__name__ == "Decorated"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jury", "choose one of reward, judge, self_play, or name a class of your own as module:Class"),
        ("no_such_module:Source", "cannot be imported"),
        ("recipe.spin.preferences.judge:NoSuch", "cannot be imported"),
        ("'..:x'", "cannot be imported (TypeError: "),
        ("':x'", "cannot be imported (ValueError: "),
        ("source_in_pieces:Source", "cannot be imported (SyntaxError: "),
        ("recipe.spin.preferences.judge:Group", "derived from"),
        (
            "test_preference_source:Plain",
            "score_group is no coroutine function, and is awaited; write async def score_group",
        ),
        (5, "must be a text"),
    ],
)
def test_a_source_that_is_none_is_refused(run, tmp_path, monkeypatch, name, words):
    (tmp_path / "source_in_pieces.py").write_text("class Source(")
    monkeypatch.syspath_prepend(tmp_path)
    message = run.refusal(f"algorithm.preference_source={name}")
    assert "algorithm.preference_source=" in message and words in message


def test_the_example_of_the_documentation_prefers_the_shorter_of_two_right_responses():
    text = (ROOT / "docs" / "preferences.md").read_text()
    names: dict = {}
    exec(text.split("```python")[1].split("```")[0], names)
    asked = Group(1, [], ["12345", "123", "1"], [1.0, 1.0, 0.0], {}, None)
    source = names["ShortestRight"](None, None)
    found = asyncio.run(source.score_group(asked))
    assert [score.value for score in found] == pytest.approx([1.0, 1.04, 0.0])
    assert source.metrics([score.info for score in found]) == {"mine/length": 3.0}
