"""Every reward through the suite, as the training loop calls it."""

from __future__ import annotations

import pytest

from remix.config import ExactMatchReward, FormatReward, LengthReward, MathReward, PythonReward
from remix.rewards import RewardSuite
from remix.types import Prompt, Score

MODULE = """
import numpy as np

def one(prompt, response): return 1.0 if response == prompt.answer else 0.25
def count(prompt, response): return len(response)
def numpy_value(prompt, response): return np.float32(0.5)
def nothing(prompt, response): return None
def infinite(prompt, response): return float("inf")
def broken(prompt, response): raise KeyError("x")
constant = 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "half_installed.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)


def score(configs, *responses: str, answer: str = "16", tokens: int = 10) -> list[Score]:
    prompt = Prompt("p7", "3+8-4+9=", answer, "sums")
    with RewardSuite(configs) as suite:
        return suite.score([prompt] * len(responses), responses, [tokens] * len(responses))


def test_exact_match_after_a_marker():
    scores = score([ExactMatchReward(after="#")], "11;7;16#16", "1#16#17", "1#15# 16 ", "11;7;16", "16#")
    assert [s.verdict for s in scores] == ["correct", "wrong", "correct", "no_answer", "no_answer"]
    assert [s.value for s in scores] == [1, 0, 1, 0, 0]


def test_exact_match_of_the_whole_response():
    verdicts = [s.verdict for s in score([ExactMatchReward()], " 16\n", "16.", "  ")]
    assert verdicts == ["correct", "wrong", "no_answer"]


def test_math_verdicts_and_values():
    scores = score([MathReward(timeout=30, workers=1)], r"\boxed{\frac{32}{2}}", r"\boxed{17}", "hm", answer="16")
    assert [(s.value, s.verdict) for s in scores] == [(1, "correct"), (0, "wrong"), (0, "no_answer")]


def test_math_timeouts_are_not_wrong():
    (found,) = score([MathReward(timeout=1, workers=1)], r"\boxed{\sum_{k=1}^{10^9} \sin(k^k)}")
    assert found.verdict in ("timeout", "error")
    assert found.value == 0


def test_format_matches_the_whole_response():
    suite = [FormatReward(pattern=r"<a>\d+</a>")]
    assert [s.value for s in score(suite, "<a>12</a>", "<a>12</a> ", "x<a>1</a>")] == [1, 0, 0]
    good = "<think>a\nb</think> so \\boxed{5}"
    assert [s.value for s in score([FormatReward()], good, "\\boxed{5}")] == [1, 0]


def test_an_invalid_pattern_is_refused_when_built():
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression"):
        RewardSuite([FormatReward(pattern="(")])


@pytest.mark.parametrize(("tokens", "value"), [(8, 0.0), (10, -0.5), (12, -1.0), (20, -1.0)])
def test_length_counts_tokens(tokens, value):
    # Free up to 8, -1 at 12: 10 tokens are half way.
    (found,) = score([LengthReward(free_tokens=8, max_tokens=12)], "some text", tokens=tokens)
    assert found.value == value


def test_weights_parts_and_names():
    configs = [
        ExactMatchReward(after="#", weight=2.0),
        FormatReward(pattern=".*#.*", weight=0.5),
        FormatReward(pattern="[0-9]*", weight=-1.0),
        LengthReward(free_tokens=5, max_tokens=25, weight=0.4),
    ]
    right, bare = score(configs, "x#16", "16")
    # 2·1 + 0.5·1 - 1·0 + 0.4·(-5/20) = 2.4, and 2·0 + 0.5·0 - 1·1 - 0.1 = -1.1
    assert right.value == pytest.approx(2.4)
    assert right.parts == {"exact_match": 1, "format": 1, "format_2": 0, "length": -0.25}
    assert (bare.value, bare.verdict) == (pytest.approx(-1.1), "no_answer")


def test_the_verdict_is_that_of_the_first_that_checks_the_answer():
    always = FormatReward(pattern="(?s).*")
    count = PythonReward(function="my_rewards:count")
    (found,) = score([always, count, ExactMatchReward(after="#"), ExactMatchReward()], "16")
    assert found.verdict == "no_answer"
    assert [s.verdict for s in score([PythonReward(function="my_rewards:one")], "16", "17")] == ["correct", "wrong"]
    assert [s.verdict for s in score([always, count], "", "a")] == ["wrong", "correct"]
    assert [s.verdict for s in score([FormatReward(pattern="a")], "a", "b")] == ["correct", "wrong"]


def test_numpy_numbers_are_numbers():
    assert score([PythonReward(function="my_rewards:numpy_value")], "x")[0].value == 0.5


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_rewards", "not of the form module:function"),
        ("my_reward:one", "there is no module 'my_reward'; put its folder on PYTHONPATH"),
        ("my_rewards:ones", "module 'my_rewards' has no 'ones'; did you mean 'one'"),
        ("my_rewards:constant", "is a int, which cannot be called"),
        ("my_rewards:nothing", "my_rewards:nothing returned None on prompt 'p7'; it has to return a finite number"),
        ("my_rewards:infinite", "returned inf on prompt 'p7'"),
        ("my_rewards:broken", r"my_rewards:broken raised KeyError \('x'\) on prompt 'p7'; let it return"),
    ],
)
def test_python_errors_name_the_function(function, message):
    with pytest.raises(ValueError, match=message):
        score([PythonReward(function=function)], "x")


def test_a_module_that_lacks_its_own_imports_is_not_called_missing():
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        RewardSuite([PythonReward(function="half_installed:f")])


def test_lists_of_unequal_length_are_refused():
    with RewardSuite([FormatReward()]) as suite, pytest.raises(ValueError, match="1 prompts, 2 responses and 1 token"):
        suite.score([Prompt("p", "c", "a", "t")], ["x", "y"], [1])
