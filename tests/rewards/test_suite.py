"""Every reward through the suite, as the training loop calls it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
import yaml

from remix.config import ExactMatchReward, FormatReward, LengthReward, MathReward, PythonReward
from remix.replay import read_shard, write_shard
from remix.rewards import RewardSuite
from remix.types import Prompt, Rollout, RolloutGroup, Score
from tests.rewards.processes import children

RECIPES = Path(__file__).parents[2] / "recipes"

MODULE = """
import numpy as np

def one(prompt, response): return 1.0 if response == prompt.answer else 0.25
def count(prompt, response): return len(response)
def numpy_value(prompt, response): return np.float32(0.5)
def broken(prompt, response): raise KeyError("x")
def vast(prompt, response): return 1e30
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
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


def test_exact_match_of_words_alone():
    def verdicts(answer: str, *responses: str) -> list[str]:
        return [s.verdict[0] for s in score([ExactMatchReward(normalize=True)], *responses, answer=answer)]

    assert verdicts("3,1,2", "3, 1,2", "[3 1 2].", "3,2,1", "312", " ") == ["c", "c", "w", "w", "n"]
    assert verdicts("Place_inside", "'place_inside'.", "PLACE_INSIDE", "place inside") == ["c", "c", "w"]
    assert verdicts("-1.5", "-1.5", "1.5", "-15", "-1,5") == ["c", "w", "w", "w"]
    assert verdicts("+", "+", "-", "plus") == ["c", "w", "w"]  # no word at all: as it stands
    assert verdicts("Übung", "übung!", "ubung") == ["c", "w"]


def test_math_verdicts_and_values():
    scores = score([MathReward(timeout=30, workers=1)], r"\boxed{\frac{32}{2}}", r"\boxed{17}", "hm", answer="16")
    assert [(s.value, s.verdict) for s in scores] == [(1, "correct"), (0, "wrong"), (0, "no_answer")]


def test_math_timeouts_are_not_wrong():
    (found,) = score([MathReward(timeout=1, workers=1)], r"\boxed{\sum_{k=1}^{10^9} \sin(k^k)}")
    assert found.verdict in ("timeout", "error")
    assert found.value == 0
    assert found.note in (
        "the math grader did not finish within 1 s on prompt 'p7'",
        "the math grader failed on prompt 'p7'",
    )


def test_format_matches_the_whole_response():
    suite = [FormatReward(pattern=r"<a>\d+</a>")]
    assert [s.value for s in score(suite, "<a>12</a>", "<a>12</a> ", "x<a>1</a>")] == [1, 0, 0]
    good = "<think>a\nb</think> so \\boxed{5}"
    assert [s.value for s in score([FormatReward()], good, "\\boxed{5}")] == [1, 0]


def test_a_pattern_that_backtracks_without_end_costs_its_own_response_only():
    found = score([FormatReward(pattern="(a|aa)+", timeout=0.3), ExactMatchReward()], "a" * 99, "a" * 99 + "b", "b")
    assert [(s.value, s.verdict) for s in found] == [(1, "wrong"), (0, "timeout"), (0, "wrong")]
    assert [s.note for s in found[::2]] == ["", ""]
    assert found[1].note == (
        "the format reward's pattern (a|aa)+ took more than 0.3 s on a response of 100 characters to prompt 'p7'"
    )


def test_patterns_that_are_shipped_mean_what_they_mean_in_re():
    patterns = {FormatReward().pattern}
    for recipe in RECIPES.rglob("*.yaml"):
        content = yaml.safe_load(recipe.read_text())
        patterns |= {r["pattern"] for r in content.get("rewards", ()) if r["type"] == "format" and "pattern" in r}
    assert len(patterns) > 1
    pieces = ["<think>", "</think>", r"\boxed{", "}", "5", "\n", " so ", "{", "\\"]
    draw = random.Random(0)
    responses = ["<think>" * draw.randint(0, 1) + "".join(draw.choices(pieces, k=12)) for _ in range(3_000)]
    for pattern in patterns:
        expected = [float(re.fullmatch(pattern, response) is not None) for response in responses]
        assert 30 < sum(expected) < 2_970, pattern
        assert [s.value for s in score([FormatReward(pattern=pattern)], *responses)] == expected


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


def test_one_failure_fails_the_score_whatever_the_others_say():
    configs = [ExactMatchReward(), PythonReward(function="my_rewards:broken", weight=3), FormatReward(pattern="16")]
    (found,) = score(configs, "16")
    assert (found.verdict, found.failed) == ("error", True)
    assert found.note.startswith("the reward function my_rewards:broken raised KeyError ('x') on prompt 'p7'; let it")
    assert found.parts == {"exact_match": 1, "python": 0, "format": 1}
    assert found.value == 2  # 1·1 + 3·0 + 1·1


def test_a_sum_that_single_precision_cannot_hold_is_a_failure():
    vast = PythonReward(function="my_rewards:vast", weight=1e9)
    (found,) = score([ExactMatchReward(), vast], "16")
    assert (found.value, found.verdict) == (0, "error")
    assert found.note == "the weighted sum of the rewards is 1e+39, beyond single precision"
    assert score([vast.model_copy(update={"weight": 1e8})], "16")[0].verdict == "correct"


def test_a_failed_score_goes_through_the_rollout_log(tmp_path):
    (found,) = score([PythonReward(function="my_rewards:broken")], "16")
    ids, logprobs = torch.tensor([1, 2]), torch.zeros(2)
    rollout = Rollout(ids, ids, logprobs, 0, "stop", 7, "16", found)
    write_shard(tmp_path / "s.parquet", 0, [RolloutGroup(Prompt("p7", "3", "16", "sums"), (rollout,))])
    read = read_shard(tmp_path / "s.parquet")[0].rollouts[0].score
    assert read is not None
    assert (read.verdict, read.value, read.parts) == ("error", 0, {"python": 0})


def test_processes_of_a_suite_that_fails_to_build_are_given_back():
    before = children()
    with pytest.raises(ValueError, match="not a regular expression"):
        RewardSuite([PythonReward(function="my_rewards:one"), FormatReward(pattern="(")])
    assert children() == before


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_deadlines_are_positive_and_finite(value):
    for config, keys in [(MathReward, {}), (FormatReward, {}), (PythonReward, {"function": "m:f"})]:
        with pytest.raises(ValueError, match="timeout"):
            config(timeout=value, **keys)


def test_lists_of_unequal_length_are_refused():
    with RewardSuite([FormatReward()]) as suite, pytest.raises(ValueError, match="1 prompts, 2 responses and 1 token"):
        suite.score([Prompt("p", "c", "a", "t")], ["x", "y"], [1])
