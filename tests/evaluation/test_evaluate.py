"""pass@1 by hand."""

from __future__ import annotations

import pytest
import torch

from remix.evaluation.evaluate import evaluate
from remix.types import FinishReason, Prompt, Rollout, RolloutGroup, Score, Verdict


def group(*members: tuple[Verdict, int, FinishReason]) -> RolloutGroup:
    rollouts = tuple(
        # The reward is no part of it: a wrong answer may well be rewarded for its form.
        Rollout(torch.tensor([1]), torch.arange(length), torch.zeros(length), -1, finish, 0, "", Score(7.0, verdict))
        for verdict, length, finish in members
    )
    return RolloutGroup(Prompt("x", "?", "!", "sum"), rollouts)


def test_by_hand() -> None:
    evaluation = evaluate(
        [
            group(("correct", 1, "stop"), ("wrong", 2, "length")),
            group(("correct", 3, "stop"), ("correct", 4, "stop")),
            group(("timeout", 5, "stop"), ("error", 6, "stop")),
            group(("no_answer", 7, "length"), ("wrong", 8, "length")),
        ]
    )
    assert evaluation.pass_at_1 == (0.5 + 1 + 0 + 0) / 4
    assert evaluation.response_length == 4.5
    assert evaluation.truncated == 3 / 8
    assert evaluation.failed == 2 / 8
    assert evaluation.metrics() == {
        "eval/pass@1": 0.375,
        "eval/response_length": 4.5,
        "eval/truncated": 0.375,
        "eval/grader_failed": 0.25,
    }


def test_every_problem_counts_the_same_whatever_its_samples() -> None:
    # (1/3 + 1) / 2, not 2 correct of 4
    evaluation = evaluate([group(("correct", 1, "stop"), *[("wrong", 1, "stop")] * 2), group(("correct", 1, "stop"))])
    assert evaluation.pass_at_1 == pytest.approx(2 / 3)


def test_nothing_to_evaluate() -> None:
    with pytest.raises(ValueError, match="holdout"):
        evaluate([])
