"""Advantages: hand values, a brute-force GAE straight from the sums, invariance to whatever is masked out."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remix.algorithms import (
    dr_grpo_advantage,
    gae,
    group_relative_advantage,
    rloo_advantage,
    vtrace_gae,
    whiten,
)

ESTIMATORS: list[Callable[[Tensor, int], Tensor]] = [group_relative_advantage, dr_grpo_advantage, rloo_advantage]


# --- within a group ---


def test_group_relative_advantage_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 4.0, 0.0, 0.0, 0.0])
    # group 1: mean 0.5, unbiased variance 4·0.25/3 = 1/3, std 0.577350; ±0.5/0.577351 = ±0.866024
    # group 2: mean 1, unbiased variance (9 + 3)/3 = 4, std 2; 3/2.000001 and -1/2.000001
    expected = [0.8660239, -0.8660239, -0.8660239, 0.8660239, 1.49999925, -0.49999975, -0.49999975, -0.49999975]
    torch.testing.assert_close(group_relative_advantage(rewards, 4), torch.tensor(expected), rtol=2e-7, atol=0)


def test_dr_grpo_and_rloo_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(dr_grpo_advantage(rewards, 3), torch.tensor([2 / 3, -1 / 3, -1 / 3]))  # minus mean 1/3
    # minus the mean of the others: 1 - 0, 0 - (1 + 0)/2
    torch.testing.assert_close(rloo_advantage(rewards, 3), torch.tensor([1.0, -0.5, -0.5]))


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_a_uniform_group_has_no_advantage_at_all(estimate):
    uniform = torch.full((7,), 0.1)
    assert (uniform - uniform.mean()).abs().max() > 0  # rounding alone would leave something
    rewards = torch.cat([uniform, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])])
    advantages = estimate(rewards, 7)
    assert torch.equal(advantages[:7], torch.zeros(7))
    assert (advantages[7:] != 0).all()


@pytest.mark.parametrize("estimate", ESTIMATORS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_advantages_follow_a_permutation_and_ignore_a_shift(estimate, data):
    values = st.integers(-8, 8).map(lambda i: i / 4)  # exact in float32, so that groups stay uniform when shifted
    rewards = torch.tensor(data.draw(st.lists(values, min_size=12, max_size=12)))
    within = torch.tensor(data.draw(st.permutations(range(4))))
    groups = torch.tensor(data.draw(st.permutations(range(3))))
    moved = rewards.view(3, 4)[groups][:, within].flatten() + 2.0
    expected = estimate(rewards, 4).view(3, 4)[groups][:, within].flatten()
    torch.testing.assert_close(estimate(moved, 4), expected, rtol=1e-5, atol=1e-6)
    assert expected.view(3, 4).sum(dim=1).abs().max() < 1e-4


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_rewards_without_whole_groups_are_refused(estimate):
    with pytest.raises(ValueError, match="group_size is 1"):
        estimate(torch.ones(4), 1)
    with pytest.raises(ValueError, match="whole groups of 3"):
        estimate(torch.ones(4), 3)
    with pytest.raises(ValueError, match="whole groups of 2"):
        estimate(torch.ones(2, 2), 2)


# --- over time ---


def brute_force(rewards, values, mask, ratios, gamma, gae_lambda, c_bar):
    """A_t = Σ_i (γλ)^i · Π_{j=1..i} w_{t+j} · δ_{t+i} over the masked-in tokens, in O(T²) Python floats."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(values.shape[0]):
        tokens = [t for t in range(values.shape[1]) if mask[b, t]]
        r, v = [rewards[b, t].item() for t in tokens], [values[b, t].item() for t in tokens] + [0.0]
        w = [min(c_bar, ratios[b, t].item()) for t in tokens]
        for t, column in enumerate(tokens):
            total = 0.0
            for i in range(len(tokens) - t):
                delta = r[t + i] + gamma * v[t + i + 1] - v[t + i]
                total += (gamma * gae_lambda) ** i * math.prod(w[t + 1 : t + i + 1]) * delta
            advantages[b, column] = total
            returns[b, column] = v[t] + w[t] * total
    return advantages, returns


@st.composite
def trajectories(draw):
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards, values = torch.randn(2, batch, length, generator=generator)
    ratios = torch.randn(batch, length, generator=generator).exp()
    mask = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    return rewards, values, mask, ratios


ALL = torch.ones(1, 3, dtype=torch.bool)
REWARDS = torch.tensor([[0.0, 0.0, 1.0]])
VALUES = torch.tensor([[0.5, 0.2, 0.4]])


def test_gae_by_hand():
    advantages, returns = gae(REWARDS, VALUES, ALL, gamma=0.9, gae_lambda=0.5)
    # δ_2 = 1 + 0 - 0.4 = 0.6            A_2 = 0.6                           R_2 = 1.0
    # δ_1 = 0 + 0.9·0.4 - 0.2 = 0.16     A_1 = 0.16 + 0.45·0.6 = 0.43        R_1 = 0.63
    # δ_0 = 0 + 0.9·0.2 - 0.5 = -0.32    A_0 = -0.32 + 0.45·0.43 = -0.1265   R_0 = 0.3735
    torch.testing.assert_close(advantages, torch.tensor([[-0.1265, 0.43, 0.6]]))
    torch.testing.assert_close(returns, torch.tensor([[0.3735, 0.63, 1.0]]))


def test_vtrace_gae_by_hand():
    advantages, returns = vtrace_gae(
        REWARDS, VALUES, ALL, torch.tensor([[3.0, 0.5, 2.0]]), gamma=0.9, gae_lambda=0.5, c_bar=1.0
    )
    # w = (1, 0.5, 1), δ as above
    # A_2 = 0.6                                   R_2 = 0.4 + 1·0.6 = 1
    # A_1 = 0.16 + 0.45·1·0.6 = 0.43              R_1 = 0.2 + 0.5·0.43 = 0.415
    # A_0 = -0.32 + 0.45·0.5·0.43 = -0.22325      R_0 = 0.5 + 1·(-0.22325) = 0.27675
    torch.testing.assert_close(advantages, torch.tensor([[-0.22325, 0.43, 0.6]]))
    torch.testing.assert_close(returns, torch.tensor([[0.27675, 0.415, 1.0]]))


def test_final_reward_at_every_token_without_discount_and_critic():
    mask = torch.tensor([[False, True, True, True, False], [True, True, False, True, True]])
    rewards = torch.zeros(2, 5)
    rewards[0, 3], rewards[1, 4] = 0.3, -1.0
    advantages, returns = gae(rewards, torch.zeros(2, 5), mask, gamma=1.0, gae_lambda=1.0)
    expected = torch.tensor([[0.0, 0.3, 0.3, 0.3, 0.0], [-1.0, -1.0, 0.0, -1.0, -1.0]])
    assert torch.equal(advantages, expected)
    assert torch.equal(returns, expected)


@settings(deadline=None, max_examples=60)
@given(trajectories(), st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]), st.sampled_from([0.7, 2.0]))
def test_gae_and_vtrace_match_the_sums(trajectory, gamma, gae_lambda, c_bar):
    rewards, values, mask, ratios = trajectory
    traced = vtrace_gae(*trajectory, gamma=gamma, gae_lambda=gae_lambda, c_bar=c_bar)
    torch.testing.assert_close(
        traced, brute_force(rewards, values, mask, ratios, gamma, gae_lambda, c_bar), rtol=1e-4, atol=1e-4
    )
    plain = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    ones = torch.ones_like(ratios)
    torch.testing.assert_close(
        plain, brute_force(rewards, values, mask, ones, gamma, gae_lambda, 1.0), rtol=1e-4, atol=1e-4
    )
    fresh = vtrace_gae(rewards, values, mask, ones, gamma=gamma, gae_lambda=gae_lambda, c_bar=2.0)
    assert torch.equal(fresh[0], plain[0])
    assert torch.equal(fresh[1], plain[1])


@settings(deadline=None, max_examples=60)
@given(trajectories(), st.integers(0, 5), st.integers(0, 5))
def test_nothing_masked_out_matters(trajectory, left, right):
    """NaN in holes, padding on either side, or the holes squeezed out: the same bits at the trained tokens."""
    rewards, values, mask, ratios = trajectory
    clean = vtrace_gae(*trajectory, gamma=0.99, gae_lambda=0.9)
    garbage = [
        torch.nn.functional.pad(x.masked_fill(~mask, math.nan), (left, right), value=math.nan)
        for x in (rewards, values, ratios)
    ]
    padded_mask = torch.nn.functional.pad(mask, (left, right))
    dirty = vtrace_gae(garbage[0], garbage[1], padded_mask, garbage[2], gamma=0.99, gae_lambda=0.9)
    for got, expected in zip(dirty, clean, strict=True):
        assert torch.equal(got[padded_mask], expected[mask])
        assert torch.equal(got[~padded_mask], torch.zeros_like(got[~padded_mask]))
    for b in range(mask.shape[0]):
        squeezed = [x[b : b + 1, mask[b]] for x in (rewards, values, mask, ratios)]
        for got, expected in zip(vtrace_gae(*squeezed, gamma=0.99, gae_lambda=0.9), clean, strict=True):
            assert torch.equal(got[0], expected[b, mask[b]])


def test_vtrace_is_unbiased_for_the_current_policy_where_gae_is_not():
    """One decision after this one, two actions, rewards 1 and 0: enumerate it under the behaviour policy."""
    behaviour, current = (0.5, 0.5), (0.8, 0.2)
    values = torch.tensor([[0.1, 0.3]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    traced = plain = value_target = 0.0
    for action, reward in ((0, 1.0), (1, 0.0)):
        rewards = torch.tensor([[0.0, reward]])
        ratios = torch.tensor([[1.0, current[action] / behaviour[action]]])
        advantages, returns = vtrace_gae(rewards, values, mask, ratios, gamma=1.0, gae_lambda=1.0, c_bar=10.0)
        traced += behaviour[action] * advantages[0, 0].item()
        value_target += behaviour[action] * returns[0, 1].item()
        plain += behaviour[action] * gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)[0][0, 0].item()
    # Q of the current policy at the first token is 0.8·1 + 0.2·0 = 0.8; minus V = 0.1. Under the behaviour policy 0.5.
    assert traced == pytest.approx(0.7, abs=1e-6)
    assert plain == pytest.approx(0.4, abs=1e-6)
    assert value_target == pytest.approx(0.8, abs=1e-6)


def test_advantages_carry_no_gradient():
    values = VALUES.clone().requires_grad_()
    assert not any(x.requires_grad for x in gae(REWARDS, values, ALL, gamma=1.0, gae_lambda=1.0))
    assert not group_relative_advantage(torch.tensor([1.0, 0.0], requires_grad=True), 2).requires_grad


# --- whitening ---


def test_whiten_by_hand():
    values = torch.tensor([[1.0, math.nan, 2.0], [6.0, 3.0, math.inf]])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    # 1, 2, 6, 3: mean 3, unbiased variance (4 + 1 + 9 + 0)/3 = 14/3, std 2.160247
    expected = torch.tensor([[-0.9258201, 0.0, -0.4629100], [1.3887301, 0.0, 0.0]])
    torch.testing.assert_close(whiten(values, mask), expected)


def test_whiten_of_one_or_no_value_is_zero():
    values = torch.tensor([[5.0, 7.0]])
    assert torch.equal(whiten(values, torch.tensor([[True, False]])), torch.zeros(1, 2))
    assert torch.equal(whiten(values, torch.tensor([[False, False]])), torch.zeros(1, 2))
