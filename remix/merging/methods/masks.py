"""Which entries belong to which task, and which disagree: TALL masks, consensus, PAM's alignment.

θ_0 is the base, τ_i = θ_i − θ_0 the task vectors, w_i their weights. N task vectors, X entries of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from remix.merging.methods.tensors import (
    applied,
    entrywise,
    kept_count,
    largest,
    require_finite,
    require_parents,
    require_shape,
    working_dtype,
)

Reset = Literal["global", "zero"]
Average = Literal["half", "running_mean"]


def tall_mask(task_vector: Tensor, merged_vector: Tensor, threshold: float) -> Tensor:
    """m_t = |τ_t| ≥ λ·|τ_MTL − τ_t|: where the merged vector serves task t. TALL masks (arXiv 2405.07813)."""
    return task_vector.abs() >= (merged_vector - task_vector).abs_().mul_(threshold)


def tall(
    base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float], *, task: int = 0, threshold: float = 0.4
) -> Tensor:
    """θ_0 + m_t ∘ τ_MTL,  τ_MTL = Σ w_i·τ_i: task t's share of the merged model. TALL masks (arXiv 2405.07813).

    What a store of τ_MTL and one bit per entry and task gives back of task t. The paper picks λ of each task from 0.2
    to 0.6 by validation.
    """
    require_parents(base, tasks, weights)
    if not 0 <= task < len(tasks):
        raise ValueError(f"tall: there is no task {task} among {len(tasks)}; count from 0")
    return entrywise(base, tasks, weights, partial(_of_one_task, task, threshold))


def consensus(
    base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float], *, k: int = 2, threshold: float = 0.4
) -> Tensor:
    """θ_0 + m ∘ τ_MTL,  m = Σ_t m_t ≥ k: without the entries that serve fewer than k tasks (arXiv 2405.07813).

    k = 1 leaves out what serves nobody, k = 2 also what serves one task alone.
    """
    require_parents(base, tasks, weights)
    if not 0 <= k <= len(tasks):
        raise ValueError(f"consensus: no entry can serve k = {k} of {len(tasks)} tasks; lower k")
    return entrywise(base, tasks, weights, partial(_of_several_tasks, k, threshold))


def _of_one_task(task: int, threshold: float, tasks_NX: Tensor, weights_N1: Tensor) -> Tensor:
    merged_X = (tasks_NX * weights_N1).sum(0)
    return merged_X * tall_mask(tasks_NX[task], merged_X, threshold)


def _of_several_tasks(k: int, threshold: float, tasks_NX: Tensor, weights_N1: Tensor) -> Tensor:
    merged_X = (tasks_NX * weights_N1).sum(0)
    return merged_X * (tall_mask(tasks_NX, merged_X, threshold).sum(0) >= k)


@torch.no_grad()
def align(
    task: Tensor,
    global_: Tensor,
    *,
    share: float,
    importance: Tensor | None = None,
    reset: Reset = "global",
) -> tuple[Tensor, Tensor]:
    """w_i ← g_i (or 0) for i ∈ I with sgn w_i ≠ sgn g_i; and where that was. PAM (arXiv 2506.03189), its alignment.

    I: the `share` of largest importance, |g| unless another (|g − g_init|) is given. Where g or the importance is 0
    there is no direction to keep, so such an entry is never in I.
    """
    turned = turned_entries(task, global_, important_entries(global_, share=share, importance=importance))
    return put_back(task, global_, turned, reset=reset), turned


@torch.no_grad()
def misaligned_fraction(task: Tensor, global_: Tensor, *, share: float, importance: Tensor | None = None) -> float:
    """Of the important entries I of `align`, the share whose signs differ; 0 if there are none."""
    important = important_entries(global_, share=share, importance=importance)
    return int(turned_entries(task, global_, important).sum()) / max(1, int(important.sum()))


@torch.no_grad()
def important_entries(global_: Tensor, *, share: float, importance: Tensor | None = None) -> Tensor:
    """I of `align`, which does not change while a task is learnt."""
    require_finite(global_, "the global weights")
    importance = global_.abs() if importance is None else importance
    require_shape(importance, global_.shape, "the importance")
    return largest(importance, kept_count(share, importance.numel())) & (importance > 0) & (global_ != 0)


@torch.no_grad()
def turned_entries(task: Tensor, global_: Tensor, important: Tensor) -> Tensor:
    """Where in I the signs differ."""
    require_shape(task, global_.shape, "the task's weights")
    return important & (task.sign() != global_.sign())


def put_back(task: Tensor, global_: Tensor, turned: Tensor, *, reset: Reset = "global") -> Tensor:
    """w_i ← g_i, or 0, where it has turned."""
    return torch.where(turned, global_.to(task.dtype) if reset == "global" else 0, task)


def pam(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    share: float = 0.5,
    reset: Reset = "global",
    average: Average = "half",
) -> Tensor:
    """g ← w_1·τ_1;  for t = 2, 3, …:  w ← align(w_t·τ_t, g),  g ← (g + w)/2;  θ_0 + g.

    PAM (arXiv 2506.03189) on vectors that are trained already: aligned once, before each is averaged in, in their
    order. `average` "running_mean" has g ← g + (w − g)/t, the mean of all so far.
    """
    require_parents(base, tasks, weights)
    dtype = working_dtype(base, tasks)
    merged = tasks[0].to(dtype) * weights[0]
    for count, (task, weight) in enumerate(zip(tasks[1:], weights[1:], strict=True), start=2):
        aligned, _ = align(task.to(dtype) * weight, merged, share=share, reset=reset)
        merged = merged.lerp_(aligned, 0.5 if average == "half" else 1 / count)
    return applied(base, merged)
