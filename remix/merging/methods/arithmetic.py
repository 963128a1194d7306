"""Sums of task vectors, thinned out and voted on: linear, task arithmetic, TIES, DARE, DELLA, MagMax.

θ_0 is the base, τ_i = θ_i − θ_0 the task vectors, w_i their weights. For LoRA factors θ_0 = 0 and τ_i is the factor.
N task vectors, X entries of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from remix.merging.methods.tensors import (
    CHUNK,
    applied,
    entrywise,
    kept_count,
    largest,
    normalised,
    require_each,
    require_parents,
    slices,
    weighted_sum,
)

Election = Literal["total", "frequency"]
Mean = Literal["count", "weight", "sum"]
Rescale = Literal["density", "l1", "none"]


def linear(base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """Σ w_i·θ_i / Σ w_i = θ_0 + Σ w_i·τ_i / Σ w_i. Without `normalize` nothing is divided: task arithmetic.

    Model soups (arXiv 2203.05482). Only ratios of weights count, so no weights give the base.
    """
    require_parents(base, tasks, weights)
    return applied(base, weighted_sum(base, tasks, normalised(weights) if normalize else weights))


def task_arithmetic(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    keeps: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """θ_0 + Σ w_i·τ_i. Task arithmetic (arXiv 2212.04089).

    `density` < 1 first trims each τ_i as TIES does, which the paper does not: PEFT's `magnitude_prune`. `keeps`: see
    `ties`.
    """
    require_parents(base, tasks, weights)
    if density >= 1:
        return applied(base, weighted_sum(base, tasks, weights))
    return entrywise(base, tasks, weights, _sum, keeps or [trimmed(task, density) for task in tasks])


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
    keeps: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """θ_0 + λ·mean{ w_i·τ̂_i : sgn τ̂_i = γ } entry by entry,  τ̂_i = trim(τ_i),  γ = sgn Σ τ̂_i (+ where that is 0).

    TIES (arXiv 2306.01708): trim to the `density` largest, elect a sign, average what agrees with it. The paper has
    one λ for all: equal weights, or `scale`. The defaults are the paper's and PEFT's: tasks vote before they are
    weighted, and the mean divides by how many agree. mergekit's are `elect_weighted` and `mean` "weight", which
    divides by the weight of those that agree. With `elect` "frequency" each task has one vote. `keeps`: of part of a
    tensor, what trimming the whole has kept of it.
    """
    require_parents(base, tasks, weights)
    keeps = keeps or [trimmed(task, density) for task in tasks]
    return entrywise(base, tasks, weights, partial(disjoint_mean, elect, elect_weighted, mean, scale), keeps)


def dare_linear(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: float = 0.5,
    rescale: Rescale = "density",
) -> Tensor:
    """θ_0 + Σ w_i·τ̂_i,  τ̂_i = m_i ∘ τ_i / density,  m_i ~ Bernoulli(density).

    DARE (arXiv 2311.03099), drop rate p = 1 − density. `rescale` "l1" keeps Σ|τ_i| instead of its expectation,
    as mergekit does; "none" keeps the values.
    """
    require_parents(base, tasks, weights)
    keeps = dropped(tasks, density, seeds)
    return entrywise(base, tasks, weights, _sum, keeps, _gains(tasks, keeps, density, rescale))


def dare_ties(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: float = 0.5,
    rescale: Rescale = "density",
    elect: Election = "total",
    elect_weighted: bool = False,
    mean: Mean = "count",
    scale: float = 1.0,
) -> Tensor:
    """`ties` with DARE's random drop (`dare_linear`) in place of the trimming (arXiv 2311.03099).

    Defaults are PEFT's; mergekit has `elect_weighted`, `mean` "sum" and `rescale` "l1".
    """
    require_parents(base, tasks, weights)
    keeps = dropped(tasks, density, seeds)
    combine = partial(disjoint_mean, elect, elect_weighted, mean, scale)
    return entrywise(base, tasks, weights, combine, keeps, _gains(tasks, keeps, density, rescale))


def della(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: float = 0.5,
    epsilon: float = 0.3,
    rescale: Rescale = "density",
    elect: Election = "total",
    elect_weighted: bool = False,
    mean: Mean = "count",
    scale: float = 1.0,
) -> Tensor:
    """`ties` with MagPrune in place of the trimming: larger entries of a row are kept with higher probability.

        keep_i = density − ε/2 + ε·rank_i/(n − 1),  rank 0 the smallest of n;   τ̂_i = m_i·τ_i / keep_i

    DELLA (arXiv 2406.11617). ε is the width of the window, twice mergekit's `epsilon`; it shrinks where it would leave
    [0, 1], so that `density` is what is kept on average. Of each entry `rescale` "density" divides by its own
    probability, as the paper does; mergekit has "l1", `elect_weighted` and `mean` "weight".
    """
    require_parents(base, tasks, weights)
    require_each(seeds, tasks, "seeds")
    keeps = [
        None if density >= 1 else kept_by_rank(task, density, epsilon, seed, divide=rescale == "density")
        for task, seed in zip(tasks, seeds, strict=True)
    ]
    gains = _gains(tasks, keeps, 1.0, rescale)
    return entrywise(base, tasks, weights, partial(disjoint_mean, elect, elect_weighted, mean, scale), keeps, gains)


def magmax(base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """θ_0 + the w_i·τ_i of largest magnitude, entry by entry; of opposite values of one magnitude the positive.

    MagMax (arXiv 2407.06322), whose λ is equal weights.
    """
    require_parents(base, tasks, weights)
    return entrywise(base, tasks, weights, _largest_magnitude)


def trimmed(task: Tensor, density: float, *, overwrite: bool = False) -> Tensor | None:
    """Where the ⌊density·n⌋ entries of largest magnitude are, at least one; None: everywhere. TIES, step 1."""
    if density >= 1:
        return None
    return largest(task.abs_() if overwrite else task.abs(), kept_count(density, task.numel()))


def dropped(tasks: Sequence[Tensor], density: float, seeds: Sequence[int]) -> list[Tensor | None]:
    """m_i ~ Bernoulli(density) for each task from its own seed, True = kept; None: all are."""
    require_each(seeds, tasks, "seeds")
    if density >= 1:
        return [None] * len(tasks)
    masks: list[Tensor | None] = []
    for task, seed in zip(tasks, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)  # on the CPU: every device has the same mask
        mask = torch.empty(task.numel(), dtype=torch.bool)
        for part in slices(task.numel()):
            mask[part] = torch.rand(mask[part].numel(), generator=generator) < density
        masks.append(mask.view(task.shape).to(task.device))
    return masks


def kept_by_rank(task: Tensor, density: float, epsilon: float, seed: int, *, divide: bool) -> Tensor:
    """DELLA's MagPrune of one task vector: m_i, or m_i / keep_i if `divide`. Ranks within rows; a vector is one row."""
    rows = task.abs().flatten(1) if task.dim() > 1 else task.abs().reshape(1, -1)
    columns = rows.shape[1]
    epsilon = min(epsilon, 2 * density, 2 * (1 - density))
    keep = density + epsilon * ((torch.arange(columns) / (columns - 1) if columns > 1 else torch.full((1,), 0.5)) - 0.5)
    generator = torch.Generator().manual_seed(seed)
    factor = torch.empty(rows.shape, dtype=torch.float32 if divide else torch.bool, device=task.device)
    for start in range(0, len(rows), step := max(1, CHUNK // max(1, columns))):
        order = rows[start : start + step].argsort(dim=1, stable=True)
        kept = torch.rand(order.shape, generator=generator) < keep
        drawn = torch.where(kept, 1 / keep, 0) if divide else kept
        factor[start : start + step].scatter_(1, order, drawn.to(task.device))
    return factor.view(task.shape)


def _gains(tasks: Sequence[Tensor], keeps: Sequence[Tensor | None], density: float, rescale: Rescale) -> list[float]:
    """What each kept task vector is multiplied by."""
    if rescale != "l1":
        return [1 / density if rescale == "density" and density > 0 else 1.0] * len(tasks)
    gains = []
    for task, keep in zip(tasks, keeps, strict=True):
        whole, left = (
            float(values.abs().sum(dtype=torch.float64)) for values in (task, task if keep is None else task * keep)
        )
        gains.append(whole / left if left > 0 else 1.0)
    return gains


def _sum(tasks_NX: Tensor, weights_N1: Tensor) -> Tensor:
    return tasks_NX.mul_(weights_N1).sum(0)


def _largest_magnitude(tasks_NX: Tensor, weights_N1: Tensor) -> Tensor:
    low_X, high_X = tasks_NX.mul_(weights_N1).aminmax(dim=0)
    return torch.where(high_X >= -low_X, high_X, low_X)


def disjoint_mean(
    elect: Election, elect_weighted: bool, mean: Mean, scale: float, tasks_NX: Tensor, weights_N1: Tensor
) -> Tensor:
    """TIES (arXiv 2306.01708), steps 2 and 3. [N, X] → [X]. A task that is 0 at an entry agrees with nobody there."""
    weighted_NX = tasks_NX * weights_N1
    voters_NX = weighted_NX if elect_weighted else tasks_NX
    # In float64, so that votes that cancel add up to 0 in whatever order they are counted.
    votes_X = (voters_NX if elect == "total" else voters_NX.sign()).sum(0, dtype=torch.float64)
    sign_X = (votes_X >= 0).to(tasks_NX.dtype).mul_(2).sub_(1)
    agree_NX = voters_NX * sign_X > 0
    total_X = (weighted_NX * agree_NX).sum(0).mul_(scale)
    if mean == "count":
        total_X /= agree_NX.sum(0).clamp(min=1)
    elif mean == "weight":
        divisor_X = (agree_NX * weights_N1).sum(0)
        total_X /= divisor_X.masked_fill(divisor_X == 0, 1)
    return total_X
