"""Divergences: hand values, and expectations by enumerating every action of a small categorical."""

import math

import pytest
import torch

from remix.algorithms import entropy, importance_weighted, kl_convex, kl_estimate, kl_full, log_ratio

LOGITS = torch.tensor([0.3, -1.1, 0.9, 0.0], dtype=torch.float64)
ANCHOR = torch.tensor([-0.4, 0.2, 1.3, -0.7], dtype=torch.float64)
BEHAVIOUR = torch.tensor([0.8, 0.1, -0.5, 0.4], dtype=torch.float64).log_softmax(0)


def exact_kl(logits):
    logprobs = logits.log_softmax(0)
    return (logprobs.exp() * (logprobs - ANCHOR.log_softmax(0))).sum()


def gradient(scalar, leaf):
    return torch.autograd.grad(scalar, leaf, retain_graph=True)[0]


# --- estimators at sampled tokens ---


def test_estimators_by_hand():
    # π = 0.5, anchor = 0.25: d = log 2. k1 = 0.693147, k2 = 0.240227, k3 = 1/2 - 1 + 0.693147 = 0.193147
    # π = 0.25, anchor = 0.5: d = -log 2. k1 = -0.693147, k2 = 0.240227, k3 = 2 - 1 - 0.693147 = 0.306853
    logprobs, anchor = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    torch.testing.assert_close(kl_estimate(logprobs, anchor, "k1"), torch.tensor([[0.6931472, -0.6931472]]))
    torch.testing.assert_close(kl_estimate(logprobs, anchor, "k2"), torch.tensor([[0.2402265, 0.2402265]]))
    torch.testing.assert_close(kl_estimate(logprobs, anchor, "k3"), torch.tensor([[0.1931472, 0.3068528]]))


def test_unknown_estimator_names_the_valid_ones():
    with pytest.raises(ValueError, match="'k4': choose k1, k2 or k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


@pytest.mark.parametrize(("kind", "slope"), [("k1", 1.0), ("k2", 0.0), ("k3", 0.0)])
def test_at_the_anchor_every_estimator_is_zero_and_so_is_its_gradient_but_for_k1(kind, slope):
    """k1's gradient is ∇log π at every token, whatever the anchor: it vanishes only in expectation over π."""
    logprobs = (-torch.rand(3, 5) * 12).requires_grad_()
    estimate = kl_estimate(logprobs, logprobs.detach().clone(), kind)
    assert torch.equal(estimate, torch.zeros(3, 5))
    assert torch.equal(gradient(estimate.sum(), logprobs), torch.full((3, 5), slope))


def test_k3_survives_an_anchor_that_is_nats_away():
    logprobs = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    estimate = kl_estimate(logprobs, torch.tensor([[0.0, -200.0]]), "k3")
    # d clamped to ∓20: e^20 - 1 - 20 = 4.85165e8 - 21; e^-20 - 1 + 20 = 19
    torch.testing.assert_close(estimate.detach(), torch.tensor([[4.85165174e8, 19.0]]))
    assert torch.equal(gradient(estimate.sum(), logprobs), torch.zeros(1, 2))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimators_differentiate_only_the_policy(kind):
    logprobs = torch.tensor([[-1.0, -0.2]], dtype=torch.float64, requires_grad=True)
    anchor = torch.tensor([[-0.5, -0.9]], dtype=torch.float64, requires_grad=True)
    kl_estimate(logprobs, anchor, kind).sum().backward()
    assert anchor.grad is None
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, anchor.detach(), kind), (logprobs,))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_on_policy_expectation_is_the_exact_kl(kind):
    logprobs = LOGITS.log_softmax(0)
    estimate = kl_estimate(logprobs, ANCHOR.log_softmax(0), kind)
    torch.testing.assert_close((logprobs.exp() * estimate).sum(), exact_kl(LOGITS))


def test_k2_is_biased():
    logprobs = LOGITS.log_softmax(0)
    expectation = (logprobs.exp() * kl_estimate(logprobs, ANCHOR.log_softmax(0), "k2")).sum()
    assert abs(expectation - exact_kl(LOGITS)) > 0.01


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("sampler", ["behaviour", "policy itself"])
def test_weighted_expectation_has_the_value_and_the_gradient_of_the_exact_kl(kind, sampler):
    """E_{a~b}[r·k], b another policy or, at lag 0, π_θ itself as a constant."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    behaviour = BEHAVIOUR if sampler == "behaviour" else logprobs.detach()
    estimate = kl_estimate(logprobs, ANCHOR.log_softmax(0), kind)
    expectation = (behaviour.exp() * importance_weighted(estimate, log_ratio(logprobs, behaviour))).sum()
    torch.testing.assert_close(expectation, exact_kl(logits))
    exact = gradient(exact_kl(logits), logits)
    torch.testing.assert_close(gradient(expectation, logits), exact)

    # Neither dropping the weight nor stopping its gradient would do, on these numbers.
    stopped = log_ratio(logprobs, behaviour).detach()
    for wrong in (estimate, importance_weighted(estimate, stopped)):
        assert (gradient((behaviour.exp() * wrong).sum(), logits) - exact).abs().max() > 0.01


# --- over the vocabulary ---


def test_full_kl_and_entropy_by_hand():
    logits = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log() + 3.0  # a shift of the logits changes nothing
    anchor = torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log()
    # ½·log(0.5/0.25) + ½·log(0.5/0.75) = ½·(0.693147 - 0.405465) = 0.143841; equal distributions: 0
    torch.testing.assert_close(kl_full(logits, anchor), torch.tensor([0.1438410, 0.0]), atol=1e-6, rtol=1e-5)
    # log 2; 0.75·0.287682 + 0.25·1.386294 = 0.562335
    torch.testing.assert_close(entropy(logits), torch.tensor([0.6931472, 0.5623351]))
    assert entropy(torch.zeros(2, 3, 8)).shape == (2, 3)


def test_full_kl_is_the_expectation_of_k3():
    logprobs = LOGITS.log_softmax(0)
    expectation = (logprobs.exp() * kl_estimate(logprobs, ANCHOR.log_softmax(0), "k3")).sum()
    torch.testing.assert_close(kl_full(LOGITS[None], ANCHOR[None])[0], expectation)


def test_full_kl_at_the_anchor_is_zero_with_zero_gradient():
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    divergence = kl_full(logits, logits)
    assert torch.equal(divergence, torch.zeros(6, dtype=torch.float64))
    assert gradient(divergence.sum(), logits).abs().max() < 1e-15


def test_forbidden_tokens_count_nothing():
    """Logits of −inf, in both or in the policy alone, equal the distribution over the remaining tokens."""
    logits = torch.tensor([[0.3, -math.inf, -1.0]], requires_grad=True)
    kept = torch.tensor([[0.3, -1.0]], requires_grad=True)
    for anchor, kept_anchor in (
        (torch.tensor([[1.0, -math.inf, 0.0]]), torch.tensor([[1.0, 0.0]])),
        (torch.tensor([[1.0, 0.0, 0.0]]), None),
    ):
        divergence = kl_full(logits, anchor)
        assert divergence.isfinite().all()
        assert gradient(divergence.sum(), logits).isfinite().all()
        if kept_anchor is not None:
            torch.testing.assert_close(divergence, kl_full(kept, kept_anchor))
    torch.testing.assert_close(entropy(logits), entropy(kept))
    expected = gradient(entropy(kept).sum(), kept)
    torch.testing.assert_close(gradient(entropy(logits).sum(), logits)[:, [0, 2]], expected)


def test_full_kl_is_infinite_where_only_the_anchor_forbids():
    assert kl_full(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])).item() == math.inf


def test_full_kl_and_entropy_gradients():
    logits = torch.stack([LOGITS, ANCHOR]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_full(x, torch.stack([ANCHOR, BEHAVIOUR])), (logits,))
    assert torch.autograd.gradcheck(entropy, (logits,))
    anchor = ANCHOR[None].clone().requires_grad_()
    kl_full(logits[:1], anchor).sum().backward()
    assert anchor.grad is None


# --- KL-Convex ---


def test_convex_combination_by_hand():
    # 0.7·1 + 0.3·3 = 1.6; 0.7·2 + 0.3·0 = 1.4
    combined = kl_convex(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]), 0.7)
    torch.testing.assert_close(combined, torch.tensor([[1.6, 1.4]]))


@pytest.mark.parametrize("other", [None, torch.tensor([[math.inf, math.nan]])])
def test_an_end_of_the_range_is_one_kl_and_never_looks_at_the_other(other):
    kl = torch.tensor([[0.1, 0.2]])
    assert torch.equal(kl_convex(kl, other, 1.0), kl)
    assert torch.equal(kl_convex(other, kl, 0.0), kl)


@pytest.mark.parametrize(("weight", "reference", "precedent"), [
    (1.0, None, torch.zeros(1)), (0.0, torch.zeros(1), None), (0.5, None, torch.zeros(1)), (0.5, torch.zeros(1), None),
])  # fmt: skip
def test_a_needed_kl_may_not_be_missing(weight, reference, precedent):
    with pytest.raises(ValueError, match="lacks a KL"):
        kl_convex(reference, precedent, weight)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_the_weight_is_convex(weight):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        kl_convex(torch.zeros(1), torch.zeros(1), weight)
