"""Every score against hand arithmetic, or against the counting of all cases."""

from __future__ import annotations

from itertools import combinations, product
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remix.evaluation.scores import (
    Grade,
    Interval,
    Shares,
    avg_at_k,
    bootstrap_interval,
    macro_average,
    macro_interval,
    maj_at_k,
    mean_length,
    pass_at_k,
    self_reflection_rate,
    shares,
)


def test_avg_at_k():
    assert avg_at_k([True, False, False, True]) == 0.5
    assert avg_at_k([True]) == 1.0
    with pytest.raises(ValueError, match="at least one sample"):
        avg_at_k([])


def test_pass_at_k_by_hand():
    # 1 - C(3, 2) / C(5, 2) = 1 - 3/10
    assert pass_at_k(n=5, c=2, k=2) == pytest.approx(0.7, abs=1e-15)
    assert pass_at_k(n=5, c=2, k=1) == pytest.approx(2 / 5, abs=1e-15)  # one try: the share of correct ones
    assert pass_at_k(n=5, c=2, k=4) == 1.0  # only 3 are wrong, so any 4 hold a correct one
    assert pass_at_k(n=7, c=0, k=7) == 0.0
    assert pass_at_k(n=1000, c=1, k=500) == 0.5


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_one(n):
    for c in range(n + 1):
        correct = [place < c for place in range(n)]
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(fmean(map(any, combinations(correct, k))), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Over all outcomes of 6 tries of chance 0.3, its mean is the chance that 2 tries hold a success: 1 - 0.7²."""
    expected = sum(
        0.3 ** sum(tries) * 0.7 ** (6 - sum(tries)) * pass_at_k(6, sum(tries), 2)
        for tries in product((False, True), repeat=6)
    )
    assert expected == pytest.approx(0.51, abs=1e-12)


def test_pass_at_k_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="pass@8 cannot be estimated from 4 samples: draw at least 8, or lower k to 4"):
        pass_at_k(n=4, c=1, k=8)
    with pytest.raises(ValueError, match="pass@0"):
        pass_at_k(n=4, c=1, k=0)
    with pytest.raises(ValueError, match="5 correct of 4"):
        pass_at_k(n=4, c=5, k=1)


RIGHT, HALF, OTHER, NONE = Grade("1/2", True), Grade("0.5", True), Grade("3", False), Grade(None, False)


def test_maj_at_k():
    assert maj_at_k([RIGHT, OTHER, RIGHT]) == 1.0
    assert maj_at_k([OTHER, RIGHT, OTHER]) == 0.0
    # 1/2 and 0.5 are the same answer and outvote two of the other.
    assert maj_at_k([OTHER, OTHER, RIGHT, HALF, HALF]) == 1.0
    # Wrong answers are apart unless they are the same but for spaces: 2, 1 and 1 votes, and then 2 and 3.
    assert maj_at_k([RIGHT, RIGHT, OTHER, Grade("4", False)]) == 1.0
    assert maj_at_k([RIGHT, RIGHT, OTHER, Grade(" 3", False), Grade("3 ", False)]) == 0.0
    # Samples without an answer do not vote, however many.
    assert maj_at_k([NONE, NONE, NONE, RIGHT]) == 1.0
    assert maj_at_k([NONE, NONE]) == 0.0
    assert maj_at_k([Grade(None, True)]) == 1.0
    with pytest.raises(ValueError, match="at least one sample"):
        maj_at_k([])


def test_maj_at_k_ties_go_to_the_first():
    assert maj_at_k([RIGHT, OTHER]) == 1.0
    assert maj_at_k([OTHER, RIGHT]) == 0.0
    assert maj_at_k([NONE, OTHER, RIGHT, RIGHT, OTHER]) == 0.0


@given(st.lists(st.sampled_from([RIGHT, HALF, OTHER, NONE, Grade("4", False)]), min_size=1, max_size=9))
def test_a_true_majority_decides_whatever_the_order(grades):
    correct = sum(grade.correct for grade in grades)
    if 2 * correct > len(grades):
        assert maj_at_k(grades) == 1.0
    if correct == 0:
        assert maj_at_k(grades) == 0.0


def test_bootstrap_against_every_resample():
    """Two problems, scores 0 and 1: the mean of a resample is 0, 1/2 or 1 with chances 1/4, 1/2 and 1/4."""
    assert bootstrap_interval([0.0, 1.0], level=0.4) == Interval(0.5, 0.5)  # from 0.3 to 0.7 of the distribution
    assert bootstrap_interval([0.0, 1.0], level=0.6) == Interval(0.0, 1.0)  # from 0.2 to 0.8
    every = sorted(fmean(drawn) for drawn in product([0.0, 0.25, 0.5, 1.0], repeat=4))
    found = bootstrap_interval([0.0, 0.25, 0.5, 1.0], level=0.9, resamples=100_000)
    assert found.low == pytest.approx(np.quantile(every, 0.05), abs=0.0626)  # to the next mean, 1/16 away
    assert found.high == pytest.approx(np.quantile(every, 0.95), abs=0.0626)


def test_bootstrap_against_the_normal_limit():
    """400 problems, half of them solved: the standard error is 0.5 / 20, and 95% is 1.96 of it on either side."""
    found = bootstrap_interval([0.0, 1.0] * 200)
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_bootstrap_is_deterministic_and_degenerate_where_problems_agree():
    values = [0.1, 0.7, 0.4, 0.9, 0.2]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(tuple(values), seed=3)
    assert bootstrap_interval(values, resamples=101, seed=3) != bootstrap_interval(values, resamples=101, seed=4)
    assert bootstrap_interval([0.25] * 7) == Interval(0.25, 0.25)
    assert bootstrap_interval([0.5]) == Interval(0.5, 0.5)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        bootstrap_interval([1.0], level=95)


def test_large_benchmarks_are_drawn_in_blocks():
    found = bootstrap_interval([0.0, 1.0] * 1000, resamples=3000)  # 2000 problems: two blocks
    half = 1.96 * 0.5 / 2000**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_macro_interval_draws_each_benchmark_by_itself():
    # The mean of two independent means of standard error 0.025 has 0.025 / sqrt(2).
    one = [0.0, 1.0] * 200
    found = macro_interval([one, one])
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.025 / 2**0.5, rel=0.1)
    # A benchmark without spread moves the middle and halves the width.
    narrow = macro_interval([one, [1.0] * 30])
    assert narrow.high - narrow.low == pytest.approx(1.96 * 0.025, rel=0.1)
    assert (narrow.low + narrow.high) / 2 == pytest.approx(0.75, abs=0.01)
    with pytest.raises(ValueError, match="of each benchmark"):
        macro_interval([one, []])


def test_shares():
    found = shares(["correct", "no_answer", "timeout", "error", "no_answer"], [False, True, False, False, False])
    assert found == Shares(truncated=0.2, no_answer=0.4, timeout=0.2, error=0.2)
    with pytest.raises(ValueError, match="2 verdicts and 1 flags"):
        shares(["correct", "wrong"], [True])


def test_lengths_reflection_and_macro_average():
    assert mean_length([10, 20, 60]) == 30.0
    assert self_reflection_rate(["Wait, no.", "So 4.", "let me CHECK", "wait wait"], ["wait", "Let me check"]) == 0.75
    assert self_reflection_rate(["anything"], []) == 0.0
    assert macro_average([0.5, 1.0, 0.0]) == 0.5  # whatever the sizes
    for call in (lambda: mean_length([]), lambda: self_reflection_rate([], ["wait"]), lambda: macro_average([])):
        with pytest.raises(ValueError, match="at least one"):
            call()
