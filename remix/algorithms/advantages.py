"""Advantage estimators. None of them carries gradient.

G responses per prompt, groups contiguous; B sequences, T tokens. `response_mask` is True where a token is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPS = 1e-6
"""Added to a standard deviation before dividing by it."""


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    """[num_prompts·G] → [num_prompts, G]."""
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a reward is compared within its group, which needs at least 2")
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not split into whole groups of {group_size}")
    return rewards.detach().view(-1, group_size)


def _zero_where_uniform(advantages_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    """The mean of equal floats need not be that float; the advantage of a uniform group is 0 all the same."""
    uniform_P1 = rewards_PG.amax(dim=1, keepdim=True) == rewards_PG.amin(dim=1, keepdim=True)
    return torch.where(uniform_P1, 0.0, advantages_PG).flatten()


def group_relative_advantage(rewards: Tensor, group_size: int, *, normalise_std: bool = True) -> Tensor:
    """A_i = (r_i − mean(r)) / (std(r) + 1e-6) over the group. [num_prompts·G] → the same.

    GRPO (DeepSeekMath, arXiv 2402.03300, §4.1.2). The paper leaves the convention of std open; this is the unbiased
    one (divided by G − 1), as in TRL and verl. Exactly 0 for a group whose rewards are all equal.
    """
    rewards_PG = _grouped(rewards, group_size)
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if normalise_std:
        advantages_PG = advantages_PG / (rewards_PG.std(dim=1, keepdim=True, correction=1) + STD_EPS)
    return _zero_where_uniform(advantages_PG, rewards_PG)


def dr_grpo_advantage(rewards: Tensor, group_size: int) -> Tensor:
    """A_i = r_i − mean(r) over the group. [num_prompts·G] → the same.

    Dr. GRPO (arXiv 2503.20783): dividing by std overweights prompts that are too easy or too hard.
    """
    return group_relative_advantage(rewards, group_size, normalise_std=False)


def rloo_advantage(rewards: Tensor, group_size: int) -> Tensor:
    """A_i = r_i − 1/(G−1) · Σ_{j≠i} r_j = G/(G−1) · (r_i − mean(r)). [num_prompts·G] → the same.

    REINFORCE leave-one-out (arXiv 2402.14740). Exactly 0 for a group whose rewards are all equal.
    """
    rewards_PG = _grouped(rewards, group_size)
    others_PG = (rewards_PG.sum(dim=1, keepdim=True) - rewards_PG) / (group_size - 1)
    return _zero_where_uniform(rewards_PG - others_PG, rewards_PG)


@torch.no_grad()
def vtrace_gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    ratios: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    c_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """GAE of π_k on tokens that π_{k-i} sampled: (advantages, returns), [B, T] each, 0 outside the mask.

        w_t = min(c̄, ρ_t),  ρ = π_k/π_{k-i} = `ratios`
        δ_t = r_t + γ·V_{t+1} − V_t
        A_t = δ_t + γλ·w_{t+1}·A_{t+1}
        R_t = V_t + w_t·A_t

    V-trace (arXiv 1802.01561, eq. 1) in the form of GePPO (arXiv 2111.00072): w_t is absent from A_t, where the
    action is given and the policy gradient's own ratio weighs it; it enters R_t, an expectation over that action.
    Unbiased for π_k at λ = 1 while c̄ does not truncate. With all ratios 1 (and c̄ ≥ 1) this is `gae`.

    t + 1 is the next *masked-in* token of the sequence: holes are no decisions, so they are neither discounted nor
    rewarded (put a reward on a trained token). After the last one V = A = 0: no bootstrap.
    """
    rewards, values = torch.where(response_mask, rewards, 0.0), torch.where(response_mask, values, 0.0)
    weights = torch.where(response_mask, ratios.clamp(max=c_bar), 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_trace = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        trained = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(trained, delta + gamma * gae_lambda * next_trace, 0.0)
        advantages[:, t] = advantage
        next_value = torch.where(trained, values[:, t], next_value)
        next_trace = torch.where(trained, weights[:, t] * advantage, next_trace)
    return advantages, values + weights * advantages


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages, returns), [B, T] each, 0 outside the mask.

        δ_t = r_t + γ·V_{t+1} − V_t,    A_t = δ_t + γλ·A_{t+1},    R_t = A_t + V_t

    GAE (arXiv 1506.02438, eq. 16). t + 1 is the next masked-in token, as in `vtrace_gae`. γ = λ = 1 with a
    zero critic gives the sum of the rewards still to come: the final reward at every token.
    """
    return vtrace_gae(rewards, values, response_mask, torch.ones_like(values), gamma=gamma, gae_lambda=gae_lambda)


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(x − mean) / sqrt(var + 1e-8) over the masked-in entries, 0 elsewhere. Any shape → the same.

    Unbiased variance. The statistics are those of the tensor given: what whitens a step must see the whole step.
    """
    count = mask.sum()
    mean = torch.where(mask, values, 0.0).sum() / count.clamp(min=1)
    centred = torch.where(mask, values - mean, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred * (variance + 1e-8).rsqrt()
