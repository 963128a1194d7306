"""Distances between the policy and its anchors, in nats, and the entropy.

B sequences, T tokens; N tokens of a [N, V] slab of logits, V the vocabulary. The anchor is never differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remix.algorithms.ratios import log_ratio as clamped_log_ratio


def kl_estimate(logprobs: Tensor, anchor_logprobs: Tensor, kind: str) -> Tensor:
    """Estimate KL(π_θ ‖ anchor) at tokens sampled from π_θ. With d = log π_θ − log anchor, [B, T] → [B, T]:

        k1 = d                   unbiased, signed
        k2 = d² / 2              biased, ≥ 0
        k3 = e^{−d} − 1 + d      unbiased, ≥ 0

    Schulman, "Approximating KL divergence" (2020); k3 is DeepSeekMath's (arXiv 2402.03300, eq. 4). At π_θ = anchor
    all three are 0, and so are the gradients of k2 and k3; that of k1 is ∇log π_θ, zero in expectation only.

    Unbiased says the *value*. The gradient of the expectation also moves the sampling distribution: see
    `importance_weighted`. In k3 d is clamped to ±LOG_RATIO_LIMIT, for the exponential's sake.
    """
    if kind == "k1":
        return logprobs - anchor_logprobs.detach()
    if kind == "k2":
        return 0.5 * (logprobs - anchor_logprobs.detach()).square()
    if kind == "k3":
        d_BT = clamped_log_ratio(logprobs, anchor_logprobs)
        return torch.expm1(-d_BT) + d_BT
    raise ValueError(f"unknown KL estimator {kind!r}: choose k1, k2 or k3")


def importance_weighted(per_token_kl: Tensor, log_ratio: Tensor) -> Tensor:
    """r · kl with r = e^{log r} = π_θ/π_{k-i} *differentiated*. [B, T] → [B, T].

    E_{a~b}[r·k] = E_{a~π_θ}[k], hence for k1 and k3 the value is that of the exact KL and, because r is differentiated,
    so is the gradient (Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL", 2025). The
    gradient needs r at lag 0 too, where its value is 1. `kl_full` needs none: it is summed over actions already.
    """
    return log_ratio.exp() * per_token_kl


def kl_full(logits_NV: Tensor, anchor_logits_NV: Tensor) -> Tensor:
    """KL(π ‖ anchor) = Σ_v π_v · (log π_v − log anchor_v), exact. [N, V], [N, V] → [N].

    A token with π_v = 0 (logit −inf) contributes 0, to value and gradient. The definition: `token_statistics` computes
    it without all the logits.
    """
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    anchor_NV = torch.log_softmax(anchor_logits_NV.detach(), dim=-1)
    probs_NV = logprobs_NV.exp()
    # Filled before the product: 0 · inf and its derivative would be NaN.
    difference_NV = (logprobs_NV - anchor_NV).masked_fill(probs_NV == 0, 0.0)
    return (probs_NV * difference_NV).sum(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """H[π] = −Σ_v π_v · log π_v. [..., V] → [...]. A token with π_v = 0 contributes 0, to value and gradient.

    The definition: `token_statistics` computes it without all the logits.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    probs = logprobs.exp()
    return -(probs * logprobs.masked_fill(probs == 0, 0.0)).sum(dim=-1)


def kl_convex(kl_reference: Tensor | None, kl_precedent: Tensor | None, weight: float) -> Tensor:
    """λ·KL(π_θ ‖ π_base) + (1 − λ)·KL(π_θ ‖ π_{k-1}). [B, T], [B, T] → [B, T].

    KL-Convex policy constraint, ReMix (arXiv 2507.06892). At λ = 1 and λ = 0 the other term is not touched: it may
    be None, so that nobody pays for it, or infinite.
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"the weight of a convex combination lies in [0, 1], not {weight}")
    if weight == 1.0 and kl_reference is not None:
        return kl_reference
    if weight == 0.0 and kl_precedent is not None:
        return kl_precedent
    if kl_reference is None or kl_precedent is None:
        raise ValueError(
            f"weight {weight} lacks a KL: None may be kl_precedent at 1, kl_reference at 0, nothing between"
        )
    return weight * kl_reference + (1.0 - weight) * kl_precedent
