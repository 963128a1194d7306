"""Metrics of a step's rollouts, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from remix.tracking.rollout_stats import rollout_metrics, sampler_mismatch
from remix.types import FinishReason, Prompt, Rollout, RolloutGroup, Score, Verdict

PROMPT = Prompt("1", "1+1=", "2", "sum")


def rollout(
    num_tokens: int,
    value: float = 0.0,
    verdict: Verdict = "wrong",
    *,
    text: str = "",
    finish: FinishReason = "stop",
    sampler: list[float] | None = None,
    trainer: list[float] | None = None,
    **parts: float,
) -> Rollout:
    return Rollout(
        prompt_ids=torch.tensor([1, 2, 3]),
        response_ids=torch.arange(num_tokens),
        sampler_logprobs=torch.tensor(sampler or [0.0] * num_tokens),
        policy_version=0,
        finish_reason=finish,
        seed=0,
        text=text,
        score=Score(value, verdict, parts),
        behaviour_logprobs=None if trainer is None else torch.tensor(trainer),
    )


def groups(*members: tuple[Any, ...]) -> list[RolloutGroup]:
    return [RolloutGroup(PROMPT, rollouts) for rollouts in members]


def test_by_hand() -> None:
    metrics = rollout_metrics(
        groups(
            (
                rollout(2, 1.0, "correct", text="Wait, no", exact=1.0, length=0.0),
                rollout(4, 0.0, "wrong", text="so it is", finish="length", exact=0.0, length=-1.0),
            ),
            (
                rollout(6, 0.5, "timeout", text="let me CHECK", exact=0.5, length=0.0),
                rollout(8, 0.5, "no_answer", text="awaiting", exact=0.5, length=-0.5),
            ),
        ),
        ["wait", "Let me check"],
    )
    assert metrics == pytest.approx(
        {
            "reward/mean": 0.5,
            # Squares about .5: .25, .25, 0, 0; their mean .125
            "reward/std": math.sqrt(0.125),
            "rollouts/uniform_groups": 0.5,
            "tokens/sampled": 2 + 4 + 6 + 8,
            "response/length": 5.0,
            "response/length_max": 8.0,
            "response/truncated": 0.25,
            # "Wait", "let me CHECK" and "awaiting", which holds "wait"
            "response/self_reflection": 0.75,
            "verdict/correct": 0.25,
            "verdict/no_answer": 0.25,
            "verdict/timeout": 0.25,
            "verdict/error": 0.0,
            "reward/exact": 0.5,
            "reward/length": -0.375,
        }
    )


def test_no_patterns_no_reflection_and_no_rollouts_no_metrics() -> None:
    assert rollout_metrics(groups((rollout(1, text="wait"),)), [])["response/self_reflection"] == 0.0
    assert rollout_metrics([], ["wait"]) == {}


def test_sampler_mismatch_by_hand() -> None:
    # d = trainer - sampler: 0, ln 2, -ln 2. Per-token k3 of KL(sampler || trainer): e^d - 1 - d
    # 0; 2 - 1 - ln 2; 1/2 - 1 + ln 2: the sum is 1/2.
    ln2 = math.log(2)
    known = rollout(3, sampler=[-1.0, -2.0, -1.0], trainer=[-1.0, -2.0 + ln2, -1.0 - ln2])
    unknown = rollout(2, sampler=[-9.0, -9.0])  # of a dropped group
    metrics = sampler_mismatch(groups((known, unknown)))
    assert metrics == pytest.approx(
        {"sampler/mismatch_mean": 2 * ln2 / 3, "sampler/mismatch_max": ln2, "sampler/mismatch_kl": 0.5 / 3}, rel=1e-6
    )
    assert sampler_mismatch(groups((unknown,))) == {}
    assert sampler_mismatch([]) == {}


def test_the_mismatch_kl_is_that_of_the_sampler_to_the_trainer() -> None:
    """Tokens in the shares of the sampler μ = (3/4, 1/4); the trainer is π = (1/2, 1/2)."""
    mu, pi = (0.75, 0.25), (0.5, 0.5)
    exact = sum(m * math.log(m / p) for m, p in zip(mu, pi, strict=True))
    drawn = [0, 0, 0, 1]
    one = rollout(4, sampler=[math.log(mu[a]) for a in drawn], trainer=[math.log(pi[a]) for a in drawn])
    assert sampler_mismatch(groups((one,)))["sampler/mismatch_kl"] == pytest.approx(exact, rel=1e-5)


def test_a_tiny_mismatch_is_not_rounded_away() -> None:
    # d = 2^-12: d^2 / 2 = 2^-25, which float32 loses against 1 in e^d - 1 - d.
    step = 2.0**-12
    one = rollout(1, sampler=[0.0], trainer=[step])
    assert sampler_mismatch(groups((one,)))["sampler/mismatch_kl"] == pytest.approx(step**2 / 2, rel=1e-3)
