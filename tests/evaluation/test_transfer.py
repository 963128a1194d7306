"""The four numbers of a continual run, by hand."""

from __future__ import annotations

import pytest

from remix.evaluation.transfer import average_accuracy, backward_transfer, forgetting, summary, zero_shot

MATRIX = [
    [0.9, 0.2, 0.1],
    [0.5, 0.8, 0.3],
    [0.6, 0.4, 1.0],
]


def test_by_hand() -> None:
    # ACC: (.6 + .4 + 1)/3. BWT: ((.6 - .9) + (.4 - .8))/2. forgetting: ((max(.9, .5) - .6) + (.8 - .4))/2.
    # zero-shot: (.2 + .1 + .3)/3.
    assert average_accuracy(MATRIX) == pytest.approx(2 / 3)
    assert backward_transfer(MATRIX) == pytest.approx(-0.35)
    assert forgetting(MATRIX) == pytest.approx(0.35)
    assert zero_shot(MATRIX) == pytest.approx(0.2)


def test_forgetting_counts_from_the_best_and_backward_transfer_from_the_first() -> None:
    better_later = [[0.5, 0.0, 0.0], [0.9, 0.8, 0.0], [0.7, 0.8, 1.0]]
    assert backward_transfer(better_later) == pytest.approx((0.2 + 0.0) / 2)
    assert forgetting(better_later) == pytest.approx((0.2 + 0.0) / 2)


def test_the_best_may_have_been_before_it_was_learnt() -> None:
    assert forgetting([[0.5, 0.9, 0.0], [0.4, 0.3, 0.0], [0.5, 0.2, 0.7]]) == pytest.approx(
        ((0.5 - 0.5) + (0.9 - 0.2)) / 2
    )


def test_a_run_under_way() -> None:
    assert average_accuracy(MATRIX[:2]) == pytest.approx((0.5 + 0.8) / 2)
    assert summary(MATRIX[:1]) == {"ACC": 0.9, "BWT": None, "forgetting": None, "zero_shot": pytest.approx(0.15)}
    assert zero_shot([[0.7]]) is None
