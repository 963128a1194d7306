"""Schedules: the paper's λ, step by step, and DAPO's soft length penalty."""

import pytest

from remix.algorithms import lambda_decay, overlong_penalty


@pytest.mark.parametrize(("step", "expected"), [
    (0, 1.0), (50, 1.0),              # max(t - 50, 0) = 0
    (51, 0.9), (60, 0.9),             # ceil(1/10) = ceil(10/10) = 1
    (61, 0.8), (70, 0.8), (71, 0.7), (81, 0.6), (90, 0.6),
    (91, 0.5), (100, 0.5), (101, 0.5), (10_000, 0.5),
])  # fmt: skip
def test_lambda_decay_of_the_paper(step, expected):
    assert lambda_decay(step) == expected  # to the bit


def test_lambda_decay_does_not_drift():
    assert 1.0 - 0.05 * 7 != 0.65  # plain floats give 0.6499999999999999
    assert lambda_decay(7, hold=0, every=1, drop=0.05, floor=0.0) == 0.65


def test_lambda_decay_takes_its_own_numbers():
    # 0.9 - 0.2·ceil((9 - 2)/3) = 0.9 - 0.6 = 0.3; below the floor 0.4 with one more drop
    assert lambda_decay(9, start=0.9, hold=2, every=3, drop=0.2, floor=0.1) == 0.3
    assert lambda_decay(9, start=0.9, hold=2, every=3, drop=0.2, floor=0.4) == 0.4
    assert lambda_decay(500, start=0.3, hold=0, every=1, drop=0.0, floor=0.0) == 0.3


@pytest.mark.parametrize(("length", "expected"), [
    (0, 0.0), (60, 0.0),     # 100 - 40 = 60 tokens are free
    (61, -0.025),            # (60 - 61)/40
    (80, -0.5), (100, -1.0),  # (60 - 80)/40, (60 - 100)/40
    (101, -1.0), (1000, -1.0),
])  # fmt: skip
def test_overlong_penalty_by_hand(length, expected):
    assert overlong_penalty(length, 100, 40) == expected


def test_overlong_penalty_without_buffer_is_a_step():
    assert overlong_penalty(100, 100, 0) == 0.0
    assert overlong_penalty(101, 100, 0) == -1.0


@pytest.mark.parametrize("buffer", [-1, 101])
def test_the_buffer_lies_within_the_response(buffer):
    with pytest.raises(ValueError, match="between 0 and max_tokens"):
        overlong_penalty(50, 100, buffer)
