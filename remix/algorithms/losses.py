"""Policy and value losses per token, and the one place where they are reduced.

B sequences, T tokens. Losses are minimised. Log-probs: π_θ `logprobs`, π_k `proximal`, π_{k-i} `behaviour`; only π_θ
carries gradient. The losses know no mask (but for `gspo`, whose ratio spans the sequence): `aggregate` selects.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remix.algorithms.ratios import importance_ratio, sequence_log_ratio


def _pessimistic(ratio: Tensor, centre: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """min( r·A, clip(r, c − ε_low, c + ε_high)·A ). At a tie inside the range the two halves of the gradient add up."""
    return torch.minimum(ratio * advantages, ratio.clamp(centre - clip_low, centre + clip_high) * advantages)


def clipped_surrogate(
    logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """−min( r·A, clip(r, 1 − ε_low, 1 + ε_high)·A ),  r = π_θ/π_{k-i}. [B, T] → [B, T].

    PPO (arXiv 1707.06347, eq. 7); ε_low ≠ ε_high is DAPO's clip-higher (arXiv 2503.14476, eq. 10).
    """
    ratio = importance_ratio(logprobs, behaviour_logprobs)
    # A tensor of ones, not the float 1: the bounds round as in `mix_ppg`, which must agree to the bit at ρ = 1.
    return -_pessimistic(ratio, torch.ones_like(ratio), advantages, clip_low, clip_high)


def negative_log_likelihood(logprobs: Tensor) -> Tensor:
    """−log π_θ of a demonstration's tokens: supervised fine-tuning. [B, T] → [B, T]."""
    return -logprobs


def mix_ppg(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """−min( r·A, clip(r, ρ − ε_low, ρ + ε_high)·A ),  r = π_θ/π_{k-i},  ρ = π_k/π_{k-i}. [B, T] → [B, T].

    Mix-PPG, ReMix (arXiv 2507.06892), after GePPO (arXiv 2111.00072). What is bounded is how far this update moves,
    not how old the sample is: at θ = π_k nothing is clipped, whatever the lag, and the gradient is −ρ·A·∇log π_θ.
    At lag 0, ρ = 1 and this is `clipped_surrogate`.
    """
    ratio = importance_ratio(logprobs, behaviour_logprobs)
    rho = importance_ratio(proximal_logprobs, behaviour_logprobs).detach()
    return -_pessimistic(ratio, rho, advantages, clip_low, clip_high)


@torch.no_grad()
def is_clipped(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Where `mix_ppg` takes the clipped branch, so that its gradient is 0. [B, T] → [B, T] bool.

    (A > 0 and r > ρ + ε_high)  or  (A < 0 and r < ρ − ε_low)
    """
    ratio = importance_ratio(logprobs, behaviour_logprobs)
    rho = importance_ratio(proximal_logprobs, behaviour_logprobs)
    above, below = ratio > rho + clip_high, ratio < rho - clip_low
    return ((advantages > 0) & above) | ((advantages < 0) & below)


def gspo(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """−min( s·A, clip(s, ρ − ε_low, ρ + ε_high)·A ) at every token of a sequence, 0 outside the mask. [B, T] → [B, T].

        s   = (π_θ(y)/π_{k-i}(y))^{1/|y|},   ρ = (π_k(y)/π_{k-i}(y))^{1/|y|}
        s_t = sg[s] · π_θ(y_t)/sg[π_θ(y_t)]        the value of s, the gradient of one token

    GSPO (arXiv 2507.18071, eq. 5 and 7) in its token form (GSPO-token, §4.3): averaged over the sequence, the gradient
    is GSPO's, −s·A·1/|y|·Σ_t ∇log π_θ(y_t), and the advantage may differ between tokens. The clip range is centred on
    the sequence's ρ as in `mix_ppg`; at lag 0 it is the paper's.
    """
    advantages = torch.where(response_mask, advantages, 0.0)
    s_B1 = sequence_log_ratio(logprobs, behaviour_logprobs, response_mask).exp().detach().unsqueeze(1)
    rho_B1 = sequence_log_ratio(proximal_logprobs, behaviour_logprobs, response_mask).exp().detach().unsqueeze(1)
    ratio = s_B1 * torch.where(response_mask, logprobs - logprobs.detach(), 0.0).exp()
    return -_pessimistic(ratio, rho_B1, advantages, clip_low, clip_high)


def cispo(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """−sg[ clip(r, ρ − ε_low, ρ + ε_high) ] · A · log π_θ. [B, T] → [B, T].

    CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): the weight is clipped, not the update, so no token loses its
    gradient. The paper sets no lower bound (a large ε_low). Centred on ρ as in `mix_ppg`; at lag 0 it is the paper's.
    """
    ratio = importance_ratio(logprobs, behaviour_logprobs)
    rho = importance_ratio(proximal_logprobs, behaviour_logprobs)
    return -ratio.clamp(rho - clip_low, rho + clip_high).detach() * advantages * logprobs


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """½·max( (V − R)², (clip(V, V_old ± ε) − R)² ); without clip ½·(V − R)². [B, T] → [B, T].

    The value clipping of PPO's reference implementation (openai/baselines, ppo2); the paper has none.
    """
    error = (values - returns).square()
    if clip is not None:
        clipped = values.clamp(old_values - clip, old_values + clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error


def aggregate(per_token: Tensor, response_mask: Tensor, *, mode: str, denominator: float) -> Tensor:
    """Reduce [B, T] to the scalar that is differentiated. `denominator` counts the whole optimiser step, all ranks.

        token     Σ_{masked-in} x / denominator                denominator = tokens           (DAPO, 2503.14476)
        sequence  Σ_i mean_{masked-in}(x_i) / denominator      denominator = sequences        (GRPO, 2402.03300)
        constant  Σ_{masked-in} x / denominator                denominator = a fixed budget   (Dr. GRPO, 2503.20783)

    Any split of a step into micro-batches and ranks sums to the same loss and gradient, given one denominator.
    Masked-out entries are selected away, not multiplied by 0: NaN there reaches neither the value nor the gradient
    of `per_token`. (What computed a NaN may still turn that zero gradient into NaN; its inputs are to be finite.)
    An empty sequence contributes 0.
    """
    if not denominator > 0:
        raise ValueError(f"the denominator is a positive count over the whole optimiser step, not {denominator}")
    selected = torch.where(response_mask, per_token, 0.0)
    if mode in ("token", "constant"):
        return selected.sum() / denominator
    if mode == "sequence":
        return (selected.sum(dim=1) / response_mask.sum(dim=1).clamp(min=1)).sum() / denominator
    raise ValueError(f"unknown aggregation mode {mode!r}: choose token, sequence or constant")
