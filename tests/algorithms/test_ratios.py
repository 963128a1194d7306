"""Ratios: hand values, overflow, and what carries gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remix.algorithms import (
    LOG_RATIO_LIMIT,
    effective_sample_size,
    importance_ratio,
    log_ratio,
    sequence_log_ratio,
    truncated_importance_weight,
)


def test_ratio_is_the_quotient_of_probabilities():
    logprobs = torch.tensor([[0.6, 0.1]]).log()
    behaviour = torch.tensor([[0.3, 0.4]]).log()
    torch.testing.assert_close(importance_ratio(logprobs, behaviour), torch.tensor([[2.0, 0.25]]))  # 0.6/0.3, 0.1/0.4
    torch.testing.assert_close(log_ratio(logprobs, behaviour), torch.tensor([[math.log(2.0), -math.log(4.0)]]))


def test_ratio_of_equal_policies_is_one_to_the_bit():
    logprobs = -torch.rand(4, 33) * 30
    assert torch.equal(importance_ratio(logprobs, logprobs.clone()), torch.ones(4, 33))


def test_only_the_first_policy_is_differentiated():
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    behaviour = torch.tensor([[-2.0]], requires_grad=True)
    importance_ratio(logprobs, behaviour).sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[math.e]]))  # d e^(x-y) / dx = e^1
    assert behaviour.grad is None


def test_extreme_log_ratios_stay_finite_and_drop_their_gradient():
    logprobs = torch.tensor([[0.0, -1000.0, -3.0]], requires_grad=True)
    ratio = importance_ratio(logprobs, torch.tensor([[-1000.0, 0.0, -3.0]]))
    ratio.square().sum().backward()
    expected = torch.tensor([[math.exp(LOG_RATIO_LIMIT), math.exp(-LOG_RATIO_LIMIT), 1.0]])
    torch.testing.assert_close(ratio.detach(), expected)
    assert torch.equal(logprobs.grad, torch.tensor([[0.0, 0.0, 2.0]]))  # d r²/dx = 2r² = 2 inside the clamp


def test_sequence_log_ratio_is_the_masked_mean():
    logprobs = torch.tensor([[-1.0, math.nan, -1.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0]], requires_grad=True)
    behaviour = torch.tensor([[-1.2, 7.0, -1.4], [0.0, math.nan, 0.0], [-90.0, -90.0, -90.0]])
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    result = sequence_log_ratio(logprobs, behaviour, mask)
    # (0.2 + 0.4) / 2 = 0.3; an empty sequence 0; a mean of 90 is clamped to 20
    torch.testing.assert_close(result, torch.tensor([0.3, 0.0, 20.0]))
    result.sum().backward()
    assert torch.equal(logprobs.grad, torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_sequence_log_ratio_clamps_the_mean_not_its_terms():
    logprobs, behaviour = torch.tensor([[0.0, -30.0]]), torch.tensor([[-30.0, -10.0]])
    result = sequence_log_ratio(logprobs, behaviour, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(result, torch.tensor([5.0]))  # (30 - 20) / 2, where clamped terms give 0


def test_truncated_weight_is_capped_and_constant():
    trainer = torch.tensor([[0.8, 0.2, 0.3]]).log().requires_grad_()
    sampler = torch.tensor([[0.4, 0.4, 0.3]]).log()
    weight = truncated_importance_weight(trainer, sampler, cap=1.5)
    torch.testing.assert_close(weight, torch.tensor([[1.5, 0.5, 1.0]]))  # min(2, 1.5), 0.2/0.4, 1
    assert not weight.requires_grad


def test_effective_sample_size_by_hand():
    assert effective_sample_size(torch.full((7,), -3.3)) == 1.0
    # weights 1 and 3: (1 + 3)² / (2·(1 + 9)) = 16/20
    torch.testing.assert_close(effective_sample_size(torch.tensor([1.0, 3.0]).log()), torch.tensor(0.8))
    # one weight carries all: 1/N
    torch.testing.assert_close(effective_sample_size(torch.tensor([0.0, -900.0, -900.0, -900.0])), torch.tensor(0.25))
    # only relative weights count, and e^9000 must not overflow
    shifted = torch.tensor([9000.0, 9000.0 + math.log(3.0)])
    torch.testing.assert_close(effective_sample_size(shifted), torch.tensor(0.8), rtol=1e-3, atol=0)


def test_effective_sample_size_never_exceeds_the_sample():
    log_weights = torch.tensor([-6.159e-05, 0.0])  # nearly equal: rounding alone gives 1.0000001
    weights = log_weights.exp()
    assert weights.sum().square() / (2 * weights.square().sum()) > 1
    assert effective_sample_size(log_weights) == 1.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=40))
def test_effective_sample_size_lies_between_one_sample_and_all(log_weights):
    size = effective_sample_size(torch.tensor(log_weights)).item()
    assert 1 / len(log_weights) - 1e-6 <= size <= 1.0


def test_effective_sample_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one weight"):
        effective_sample_size(torch.empty(0))
