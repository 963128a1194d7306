"""Importance ratios between policies, always formed in log space.

B sequences, T tokens, N samples. The second argument is the policy that sampled: a constant, never differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ±20 nats before `exp`: e^20 ≈ 4.9e8 squares without overflow in float32.

A guard against overflow, not a trust region: beyond it the gradient is 0.
"""


def log_ratio(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """log π(a|s) − log b(a|s), clamped to ±LOG_RATIO_LIMIT. [B, T] → [B, T]."""
    return (logprobs - behaviour_logprobs.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def importance_ratio(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """π(a|s) / b(a|s) = exp(log π − log b). [B, T] → [B, T].

    ReMix (arXiv 2507.06892): r with π = π_θ, ρ with π = π_k, both over b = π_{k-i}. Exactly 1 where the two agree.
    """
    return log_ratio(logprobs, behaviour_logprobs).exp()


def sequence_log_ratio(logprobs: Tensor, behaviour_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """log s_i = 1/|y_i| · Σ_t (log π(y_it) − log b(y_it)), the log of the geometric-mean ratio. [B, T] → [B].

    GSPO (arXiv 2507.18071, eq. 7). The mean is clamped, not its terms. 0 (s = 1) for an empty mask.
    """
    difference_BT = torch.where(response_mask, logprobs - behaviour_logprobs.detach(), 0.0)
    mean_B = difference_BT.sum(dim=1) / response_mask.sum(dim=1).clamp(min=1)
    return mean_B.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def truncated_importance_weight(behaviour_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """w = min(π_{k-i}/μ, c), without gradient. [B, T] → [B, T].

    Corrects for an inference engine μ that is numerically not the trainer's policy π_{k-i}. Truncation bounds the
    variance at the price of a small bias (Ionides 2008, Truncated Importance Sampling).
    """
    return importance_ratio(behaviour_logprobs, sampler_logprobs).clamp(max=cap).detach()


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """ESS / N = (Σ w)² / (N · Σ w²), a scalar in (0, 1]: 1 for equal weights, 1/N when one carries all. [N] → [].

    Kish 1965. Scale-free, so weights are taken relative to the largest, which cannot overflow.
    """
    if log_weights.numel() == 0:
        raise ValueError("effective_sample_size needs at least one weight")
    weights_N = (log_weights - log_weights.max()).exp()
    return (weights_N.sum().square() / (weights_N.numel() * weights_N.square().sum())).clamp(max=1.0)
