"""Losses: hand values on both sides of the clip, the degenerate cases that prove Mix-PPG, and the reduction."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remix.algorithms import (
    aggregate,
    cispo,
    clipped_surrogate,
    clipped_value_loss,
    gspo,
    importance_ratio,
    is_clipped,
    mix_ppg,
    negative_log_likelihood,
)


def logs(*probabilities):
    return torch.tensor([probabilities]).log()


def gradient(per_token, leaf):
    return torch.autograd.grad(per_token.sum(), leaf)[0]


@st.composite
def batches(draw):
    """(logprobs, behaviour, proximal, advantages, mask): policies a few tenths of a nat apart, some A exactly 0."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    behaviour = -3 * torch.rand(shape, generator=generator)
    proximal = behaviour + 0.6 * torch.randn(shape, generator=generator)
    logprobs = proximal + 0.4 * torch.randn(shape, generator=generator)
    advantages = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.8)
    mask = torch.rand(shape, generator=generator) < 0.7
    return logprobs, behaviour, proximal, advantages, mask


# --- PPO ---


def test_clipped_surrogate_by_hand():
    # r = 1.5: A = 1 -> -min(1.5, 1.2) = -1.2;  A = -1 -> -min(-1.5, -1.2) = 1.5
    # r = 0.5: A = 1 -> -min(0.5, 0.8) = -0.5;  A = -1 -> -min(-0.5, -0.8) = 0.8
    logprobs, behaviour = logs(0.6, 0.6, 0.2, 0.2), logs(0.4, 0.4, 0.4, 0.4)
    loss = clipped_surrogate(logprobs, behaviour, torch.tensor([[1.0, -1.0, 1.0, -1.0]]))
    torch.testing.assert_close(loss, torch.tensor([[-1.2, 1.5, -0.5, 0.8]]))


def test_clip_bounds_may_differ():
    logprobs, behaviour = logs(0.6, 0.2), logs(0.4, 0.4)
    loss = clipped_surrogate(logprobs, behaviour, torch.tensor([[1.0, -1.0]]), clip_low=0.4, clip_high=0.3)
    torch.testing.assert_close(loss, torch.tensor([[-1.3, 0.6]]))  # -min(1.5, 1.3); -min(-0.5, -0.6)


# --- Mix-PPG ---


def test_mix_ppg_by_hand():
    # π_{k-i} = 0.2, π_k = 0.4: ρ = 2, range [1.8, 2.2]
    # r = 2.3: A = 1 -> -2.2, clipped;  A = -1 -> 2.3.   r = 2.1: A = 2 -> -4.2
    # r = 1.7: A = -1 -> 1.8, clipped;  A = 1 -> -1.7.
    logprobs = logs(0.46, 0.46, 0.42, 0.34, 0.34)
    behaviour, proximal = logs(*[0.2] * 5), logs(*[0.4] * 5)
    advantages = torch.tensor([[1.0, -1.0, 2.0, -1.0, 1.0]])
    loss = mix_ppg(logprobs, behaviour, proximal, advantages)
    torch.testing.assert_close(loss, torch.tensor([[-2.2, 2.3, -4.2, 1.8, -1.7]]))
    clipped = is_clipped(logprobs, behaviour, proximal, advantages)
    assert clipped.tolist() == [[True, False, False, True, False]]
    assert not is_clipped(logprobs, behaviour, proximal, torch.zeros(1, 5)).any()  # A = 0 has no branch to take
    # low 0.4, high 0.05: range [1.6, 2.05]
    loss = mix_ppg(logprobs, behaviour, proximal, advantages, clip_low=0.4, clip_high=0.05)
    torch.testing.assert_close(loss, torch.tensor([[-2.05, 2.3, -4.1, 1.7, -1.7]]))
    clipped = is_clipped(logprobs, behaviour, proximal, advantages, clip_low=0.4, clip_high=0.05)
    assert clipped.tolist() == [[True, False, True, False, False]]


@settings(deadline=None, max_examples=60)
@given(batches(), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_at_lag_zero_mix_ppg_is_the_clipped_surrogate_to_the_bit(batch, clip_low, clip_high):
    logprobs, _, proximal, advantages, _ = batch
    logprobs.requires_grad_()
    mixed = mix_ppg(logprobs, proximal, proximal, advantages, clip_low=clip_low, clip_high=clip_high)
    plain = clipped_surrogate(logprobs, proximal, advantages, clip_low=clip_low, clip_high=clip_high)
    assert torch.equal(mixed, plain)
    assert torch.equal(gradient(mixed, logprobs), gradient(plain, logprobs))


@settings(deadline=None, max_examples=60)
@given(batches())
def test_as_the_step_begins_nothing_is_clipped_at_any_lag(batch):
    """θ = π_k: the gradient is −ρ·A·∇log π, where a range centred on 1 would already have clipped old tokens."""
    _, behaviour, proximal, advantages, _ = batch
    logprobs = proximal.clone().requires_grad_()
    rho = importance_ratio(proximal, behaviour)
    loss = mix_ppg(logprobs, behaviour, proximal, advantages)
    assert not is_clipped(logprobs, behaviour, proximal, advantages).any()
    assert not is_clipped(logprobs, behaviour, proximal, advantages, clip_low=0.0, clip_high=0.0).any()
    assert torch.equal(loss, -rho * advantages)
    torch.testing.assert_close(gradient(loss, logprobs), -rho * advantages, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(batches())
def test_clipped_is_where_the_gradient_is_zero(batch):
    logprobs, behaviour, proximal, advantages, _ = batch
    logprobs.requires_grad_()
    clipped = is_clipped(logprobs, behaviour, proximal, advantages)
    slope = gradient(mix_ppg(logprobs, behaviour, proximal, advantages), logprobs)
    assert torch.equal(slope == 0, clipped | (advantages == 0))
    expected = torch.where(clipped, 0.0, -importance_ratio(logprobs, behaviour).detach() * advantages)
    torch.testing.assert_close(slope, expected)


def test_mix_ppg_gradient():
    # away from the kinks, r = (2.3, 2.1, 1.7) with ρ = 2
    logprobs = logs(0.46, 0.42, 0.34).double().requires_grad_()
    behaviour, proximal = logs(0.2, 0.2, 0.2).double(), logs(0.4, 0.4, 0.4).double()
    advantages = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mix_ppg(x, behaviour, proximal, advantages), (logprobs,))
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, behaviour, advantages, clip_high=2.0), (logprobs,))


@pytest.mark.parametrize("loss", [mix_ppg, cispo])
def test_losses_differentiate_only_the_policy_in_training(loss):
    tensors = [torch.tensor([[-1.0, -2.0]], requires_grad=True) for _ in range(3)]
    loss(*tensors, torch.ones(1, 2), clip_low=0.2, clip_high=0.2).sum().backward()
    assert (tensors[0].grad != 0).all()
    assert tensors[1].grad is None
    assert tensors[2].grad is None


def test_absurd_ratios_stay_finite():
    logprobs = torch.tensor([[0.0, -500.0, 0.0]], requires_grad=True)
    behaviour, proximal = torch.tensor([[-500.0, 0.0, -500.0]]), torch.tensor([[-500.0, 0.0, 0.0]])
    loss = mix_ppg(logprobs, behaviour, proximal, torch.tensor([[-1.0, 1.0, 1.0]]))
    assert loss.isfinite().all()
    assert gradient(loss, logprobs).isfinite().all()


# --- GSPO and CISPO ---


def paper_gspo(logprobs, behaviour, proximal, advantages, mask, clip_low, clip_high):
    """−min(s·A, clip(s, ρ − ε_low, ρ + ε_high)·A) per sequence, s differentiated as it stands. [B]"""
    losses = []
    for b in range(mask.shape[0]):
        own = mask[b]
        s = (logprobs[b, own] - behaviour[b, own]).mean().exp()
        rho = (proximal[b, own] - behaviour[b, own]).mean().exp()
        a = advantages[b, own][0]
        losses.append(-torch.minimum(s * a, torch.clamp(s, rho - clip_low, rho + clip_high) * a))
    return torch.stack(losses)


def test_gspo_by_hand():
    # ratios to π_{k-i} = 0.2 over the masked-in tokens: θ (4, 1) -> s = √4 = 2; k (2.25, 1) -> ρ = 1.5
    logprobs = torch.tensor([[0.8, 0.5, 0.2]]).log().requires_grad_()
    behaviour, proximal = logs(0.2, 0.2, 0.2), logs(0.45, 0.3, 0.2)
    mask = torch.tensor([[True, False, True]])
    up, down = torch.full((1, 3), 3.0), torch.full((1, 3), -3.0)
    # A = 3: clip(2, 1.4, 1.7) = 1.7 -> -5.1 at both tokens, no gradient
    loss = gspo(logprobs, behaviour, proximal, up, mask, clip_low=0.1, clip_high=0.2)
    torch.testing.assert_close(loss, torch.tensor([[-5.1, 0.0, -5.1]]))
    assert torch.equal(gradient(loss, logprobs), torch.zeros(1, 3))
    # A = -3: -min(-6, -5.1) = 6 at both, gradient of each token -s·A = 6
    loss = gspo(logprobs, behaviour, proximal, down, mask, clip_low=0.1, clip_high=0.2)
    torch.testing.assert_close(loss, torch.tensor([[6.0, 0.0, 6.0]]))
    torch.testing.assert_close(gradient(loss, logprobs), torch.tensor([[6.0, 0.0, 6.0]]))


@settings(deadline=None, max_examples=60)
@given(batches())
def test_gspo_sequence_mean_is_the_papers_loss_with_the_papers_gradient(batch):
    logprobs, behaviour, proximal, advantages, mask = batch
    mask[:, 0] = True
    advantages = advantages[:, :1].expand_as(mask)
    logprobs.requires_grad_()
    expected = paper_gspo(logprobs, behaviour, proximal, advantages, mask, 0.1, 0.15)
    per_token = gspo(logprobs, behaviour, proximal, advantages, mask, clip_low=0.1, clip_high=0.15)
    torch.testing.assert_close(per_token.sum(dim=1) / mask.sum(dim=1), expected, rtol=1e-4, atol=1e-5)
    loss = aggregate(per_token, mask, mode="sequence", denominator=1)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(expected, logprobs), rtol=1e-4, atol=1e-5)


def test_gspo_as_the_step_begins_is_not_clipped():
    behaviour, proximal = logs(0.1, 0.1), logs(0.4, 0.1)  # ρ = √4 = 2
    logprobs = proximal.clone().requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = gspo(logprobs, behaviour, proximal, torch.ones(1, 2), mask, clip_low=3e-4, clip_high=4e-4)
    # averaged over the sequence: -ρ·A/|y| = -2·1/2
    torch.testing.assert_close(gradient(loss / 2, logprobs), torch.tensor([[-1.0, -1.0]]))


def test_cispo_by_hand():
    # ρ = 2, range [1.8, 2.2]; r = 2.3 -> 2.2, r = 2.1, r = 1.7 -> 1.8: clipped tokens keep a gradient
    logprobs = torch.tensor([[0.46, 0.42, 0.34]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, 2.0, -1.0]])
    loss = cispo(logprobs, logs(0.2, 0.2, 0.2), logs(0.4, 0.4, 0.4), advantages, clip_low=0.2, clip_high=0.2)
    weights = torch.tensor([[-2.2, -4.2, 1.8]])  # -clip(r)·A
    torch.testing.assert_close(loss.detach(), weights * torch.tensor([[-0.7765288, -0.8675006, -1.0788097]]))
    torch.testing.assert_close(gradient(loss, logprobs), weights)


def test_a_demonstration_pulls_each_token_alike():
    leaf = logs(0.5, 0.25).requires_grad_()
    loss = negative_log_likelihood(leaf)
    torch.testing.assert_close(loss, torch.tensor([[math.log(2), math.log(4)]]))
    assert gradient(loss, leaf).tolist() == [[-1.0, -1.0]]


# --- the critic ---


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 1.0, 1.0]], requires_grad=True)
    old, returns = torch.tensor([[0.5, 0.9, 0.5]]), torch.tensor([[2.0, 2.0, 0.0]])
    # ½·(1 - 2)² = ½·(1 - 0)² = 0.5
    plain = clipped_value_loss(values, old, returns, clip=None)
    torch.testing.assert_close(plain, torch.tensor([[0.5, 0.5, 0.5]]))
    # V clipped to 0.7, 1.0, 0.7: ½·max(1, 1.69) = 0.845, no gradient; 0.5; ½·max(1, 0.49) = 0.5
    clipped = clipped_value_loss(values, old, returns, clip=0.2)
    torch.testing.assert_close(clipped, torch.tensor([[0.845, 0.5, 0.5]]))
    torch.testing.assert_close(gradient(clipped, values), torch.tensor([[0.0, -1.0, 1.0]]))  # V - R where unclipped


# --- the reduction ---

PER_TOKEN = [[1.0, 2.0, math.nan], [6.0, math.inf, math.nan], [math.nan, math.nan, math.nan]]
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(("mode", "denominator", "value", "slopes"), [
    ("token", 3, 3.0, (1 / 3, 1 / 3)),       # (1 + 2 + 6)/3
    ("sequence", 2, 3.75, (0.25, 0.5)),      # ((1 + 2)/2 + 6)/2
    ("constant", 18.0, 0.5, (1 / 18, 1 / 18)),  # (1 + 2 + 6)/(3·6)
])  # fmt: skip
def test_aggregate_by_hand_with_nan_masked_out(mode, denominator, value, slopes):
    per_token = torch.tensor(PER_TOKEN, requires_grad=True)
    loss = aggregate(per_token, MASK, mode=mode, denominator=denominator)
    assert loss.shape == ()
    torch.testing.assert_close(loss, torch.tensor(value))
    expected = torch.tensor([[slopes[0], slopes[0], 0.0], [slopes[1], 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(gradient(loss, per_token), expected)


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
def test_an_empty_batch_is_zero(mode):
    per_token = torch.full((2, 3), math.nan, requires_grad=True)
    loss = aggregate(per_token, torch.zeros(2, 3, dtype=torch.bool), mode=mode, denominator=1)
    assert loss == 0
    assert torch.equal(gradient(loss, per_token), torch.zeros(2, 3))


def test_aggregate_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'mean': choose token, sequence or constant"):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), mode="mean", denominator=1)
    for denominator in (0, -3.0, math.nan):
        with pytest.raises(ValueError, match="positive count"):
            aggregate(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), mode="token", denominator=denominator)


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
@settings(deadline=None, max_examples=30)
@given(batch=batches(), seed=st.integers(0, 2**31), right=st.integers(0, 4))
def test_order_split_padding_and_masked_garbage_leave_the_gradient_alone(mode, batch, seed, right):
    """The gradient of a step is that of its micro-batches, in any order and padding, whatever lies under the mask."""
    logprobs, behaviour, proximal, advantages, mask = batch
    logprobs.requires_grad_()

    def loss_of(*tensors):
        *inputs, own_mask = tensors
        return aggregate(mix_ppg(*inputs), own_mask, mode=mode, denominator=7.5)

    whole = loss_of(logprobs, behaviour, proximal, advantages, mask)
    expected = gradient(whole, logprobs)
    assert torch.equal(expected[~mask], torch.zeros_like(expected[~mask]))

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(mask.shape[0], generator=generator)
    total = torch.zeros(())
    for rows in order.split(2):
        own = torch.nn.functional.pad(mask[rows], (0, right))
        padded = [torch.nn.functional.pad(x[rows], (0, right)) for x in (logprobs, behaviour, proximal, advantages)]
        dirty = [torch.where(own, x, 9 * torch.randn(own.shape, generator=generator)) for x in padded]
        total = total + loss_of(*dirty, own)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(total, logprobs), expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(batch=batches())
def test_gspo_never_reads_masked_positions(batch):
    logprobs, behaviour, proximal, advantages, mask = batch
    clean = gspo(logprobs, behaviour, proximal, advantages, mask, clip_low=0.1, clip_high=0.1)
    dirty = [x.masked_fill(~mask, math.nan) for x in (logprobs, behaviour, proximal, advantages)]
    leaf = dirty[0].requires_grad_()
    loss = gspo(leaf, *dirty[1:], mask, clip_low=0.1, clip_high=0.1)
    assert torch.equal(loss, clean)
    assert torch.equal(clean[~mask], torch.zeros_like(clean[~mask]))
    slope = gradient(loss, leaf)
    assert torch.equal(slope[~mask], torch.zeros_like(slope[~mask]))
    assert slope.isfinite().all()
