"""Reward files that cannot work are refused before Ray starts, by one message with the remedy; none is run."""

import pytest

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
