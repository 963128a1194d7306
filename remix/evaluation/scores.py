"""What graded responses say of a model: one equation, one function.

avg@k, pass@k and maj@k speak of one problem. A benchmark's score is their mean over its problems, and its interval
comes from the same values, since problems and not responses are what another benchmark would draw anew.

K samples of a problem, n of them drawn and c of them correct; P problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

import numpy as np

from remix.types import Verdict


@dataclass(frozen=True, slots=True)
class Grade:
    """What the grader made of one response."""

    extracted: str | None
    """The final answer as it stands in the response; None where there is none."""
    correct: bool


@dataclass(frozen=True, slots=True)
class Shares:
    """Of all responses, those that ended without a verdict on the mathematics. Each counts as not correct."""

    truncated: float
    """Cut at the token limit; such a response may yet hold a correct answer."""
    no_answer: float
    timeout: float
    error: float


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


def avg_at_k(correct: Sequence[bool]) -> float:
    """c / n: the share of correct samples, which estimates a single try (Pass@1) with less noise than one does."""
    if not correct:
        raise ValueError("avg@k needs at least one sample")
    return sum(correct) / len(correct)


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of the n samples, drawn without replacement, hold a correct one.

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374), eq. 1. Integers up to the last division, so exact.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct of {n} samples is impossible")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples: draw at least {max(k, 1)}, or lower k to {n}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def maj_at_k(grades: Sequence[Grade]) -> float:
    """1 if the answer that most samples give is correct, else 0 (Wang et al. 2022, arXiv 2203.11171).

    Correct answers vote together, since all are equal to the gold; others vote together where they are the same but for
    spaces. Samples without an answer do not vote. Among equals the answer that came first wins.
    """
    if not grades:
        raise ValueError("maj@k needs at least one sample")
    votes: dict[tuple[bool, str], int] = {}
    for grade in grades:
        if grade.correct or grade.extracted is not None:
            choice = (True, "") if grade.correct else (False, "".join((grade.extracted or "").split()))
            votes[choice] = votes.get(choice, 0) + 1
    # A dict keeps the order of first votes, and max returns the first of equals.
    return float(max(votes, key=lambda choice: votes[choice])[0]) if votes else 0.0


def bootstrap_interval(
    per_problem_P: Sequence[float], level: float = 0.95, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Percentile interval of the mean over problems (Efron 1979): problems are drawn anew, with replacement.

    It speaks of other problems of the same kind and of the sampling in one; a problem alone has no spread to show.
    """
    return macro_interval([per_problem_P], level, seed, resamples)


def macro_interval(
    benchmarks: Sequence[Sequence[float]], level: float = 0.95, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """The same for the macro average of several benchmarks: each draws its own problems anew."""
    if not benchmarks or not all(len(values) for values in benchmarks):
        raise ValueError("an interval needs the values of at least one problem of each benchmark")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    means_R = np.zeros(resamples)
    for place, values in enumerate(benchmarks):
        values_P = np.asarray(values, dtype=np.float64)
        rng = np.random.default_rng([seed, place])
        block = max(1, 4_000_000 // len(values_P))  # [resamples, P] indices at once would not fit any memory
        for start in range(0, resamples, block):
            rows = min(block, resamples - start)
            drawn = rng.integers(len(values_P), size=(rows, len(values_P)))
            means_R[start : start + rows] += values_P[drawn].mean(axis=1)
    means_R /= len(benchmarks)
    low, high = np.quantile(means_R, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(low), float(high))


def shares(verdicts: Sequence[Verdict], truncated: Sequence[bool]) -> Shares:
    """Of all responses of a benchmark, one verdict and one flag each."""
    if not verdicts or len(verdicts) != len(truncated):
        raise ValueError(f"{len(verdicts)} verdicts and {len(truncated)} flags: one each for every response")
    return Shares(
        truncated=fmean(truncated),
        no_answer=fmean(verdict == "no_answer" for verdict in verdicts),
        timeout=fmean(verdict == "timeout" for verdict in verdicts),
        error=fmean(verdict == "error" for verdict in verdicts),
    )


def mean_length(lengths: Sequence[int]) -> float:
    """Tokens of a response, the end-of-sequence token included."""
    if not lengths:
        raise ValueError("a mean length needs at least one response")
    return fmean(lengths)


def self_reflection_rate(texts: Sequence[str], phrases: Sequence[str]) -> float:
    """The share of responses that hold at least one of the phrases, case ignored."""
    if not texts:
        raise ValueError("a self-reflection rate needs at least one response")
    lowered = [phrase.lower() for phrase in phrases]
    return fmean(any(phrase in text.lower() for phrase in lowered) for text in texts)


def macro_average(scores: Sequence[float]) -> float:
    """The mean over benchmarks, each counted once whatever its size."""
    if not scores:
        raise ValueError("a macro average needs at least one benchmark")
    return fmean(scores)
