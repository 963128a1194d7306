"""Sums of task vectors, thinned out or not: linear, task arithmetic, TIES.

θ_0 is the base, τ_i = θ_i − θ_0 the task vectors, w_i their weights. For LoRA factors θ_0 = 0 and τ_i is the factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from remix.merging.methods.tensors import (
    applied,
    kept_count,
    largest,
    normalised,
    require_parents,
    slices,
    weighted_sum,
    working_dtype,
)

Election = Literal["total", "frequency"]
Mean = Literal["count", "weight", "sum"]


def linear(base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """Σ w_i·θ_i / Σ w_i = θ_0 + Σ w_i·τ_i / Σ w_i. Without `normalize` nothing is divided: task arithmetic.

    Model soups (arXiv 2203.05482). Only ratios of weights count, so there is no weight 0 that gives the base.
    """
    require_parents(base, tasks, weights)
    return applied(base, weighted_sum(base, tasks, normalised(weights) if normalize else weights))


def task_arithmetic(base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float], *, density: float = 1.0) -> Tensor:
    """θ_0 + Σ w_i·trim(τ_i). Task arithmetic (arXiv 2212.04089), which does not trim: density 1.

    `density` < 1 keeps the largest entries of each τ_i, as PEFT's `magnitude_prune` does.
    """
    require_parents(base, tasks, weights)
    if density < 1:
        tasks = [trim(task, density) for task in tasks]
    return applied(base, weighted_sum(base, tasks, weights))


def trim(task: Tensor, density: float) -> Tensor:
    """The ⌊density·n⌋ entries of largest magnitude, at least one; 0 elsewhere. TIES (arXiv 2306.01708), step 1."""
    if density >= 1:
        return task
    return torch.where(largest(task.abs(), kept_count(density, task.numel())), task, 0)


def ties(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    elect: Election = "total",
    elect_weighted: bool = False,
    mean: Mean = "count",
    scale: float = 1.0,
) -> Tensor:
    """θ_0 + λ·mean{ w_i·τ̂_i : sgn τ̂_i = γ } entry by entry,  τ̂_i = trim(τ_i),  γ = sgn Σ τ̂_i (+ where that is 0).

    TIES (arXiv 2306.01708): trim to the `density` largest, elect a sign, average what agrees with it. The paper has
    one λ for all: equal weights, or `scale`. The defaults are the paper's and PEFT's: tasks vote before they are
    weighted, and the mean divides by how many agree. mergekit's: `elect_weighted`, mean "weight". `elect` "frequency"
    gives each task one vote whatever its magnitude.
    """
    require_parents(base, tasks, weights)
    keeps = [largest(task.abs(), kept_count(density, task.numel())) if density < 1 else None for task in tasks]
    return _elected_sum(base, tasks, weights, keeps, [1.0] * len(tasks), (elect, elect_weighted, mean, scale))


def _elected_sum(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    keeps: Sequence[Tensor | None],
    gains: Sequence[float],
    how: tuple[Election, bool, Mean, float],
) -> Tensor:
    """θ_0 + λ·mean of w_i·τ̂_i over the tasks of the elected sign;  τ̂_i = gain_i · keep_i ∘ τ_i."""
    elect, elect_weighted, mean, scale = how
    delta = torch.empty(base.shape, dtype=working_dtype(base, tasks), device=base.device)
    out, flat = delta.view(-1), [task.reshape(-1) for task in tasks]
    kept = [keep if keep is None else keep.reshape(-1) for keep in keeps]
    weights_N1 = torch.tensor(weights, dtype=delta.dtype, device=delta.device).unsqueeze(1)
    for part in slices(out.numel()):
        thinned_NX = torch.empty(len(tasks), out[part].numel(), dtype=delta.dtype, device=delta.device)
        for row, task, keep, gain in zip(thinned_NX, flat, kept, gains, strict=True):
            torch.mul(task[part], gain if keep is None else keep[part] * gain, out=row)
        out[part] = _disjoint_mean(thinned_NX, weights_N1, elect, elect_weighted, mean)
    return applied(base, delta.mul_(scale))


def _disjoint_mean(thinned_NX: Tensor, weights_N1: Tensor, elect: Election, elect_weighted: bool, mean: Mean) -> Tensor:
    """TIES (arXiv 2306.01708), steps 2 and 3. [N, X] → [X]. A task that is 0 at an entry agrees with nobody."""
    weighted_NX = thinned_NX * weights_N1
    voters_NX = weighted_NX if elect_weighted else thinned_NX
    # In float64, so that opposite votes of equal mass cancel to 0 in whatever order they are counted.
    votes_X = (voters_NX if elect == "total" else voters_NX.sign()).sum(0, dtype=torch.float64)
    agree_NX = torch.where(votes_X >= 0, voters_NX > 0, voters_NX < 0)
    total_X = torch.where(agree_NX, weighted_NX, 0).sum(0)
    if mean == "count":
        return total_X / agree_NX.sum(0).clamp(min=1)
    if mean == "weight":
        divisor_X = torch.where(agree_NX, weights_N1, 0).sum(0)
        return total_X / divisor_X.masked_fill(divisor_X == 0, 1)
    return total_X
