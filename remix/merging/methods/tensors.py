"""What the merge methods share: checks of their input, sums, the k largest entries, angles, seeds.

θ_0 is the base, τ_i = θ_i − θ_0 the task vectors, w_i their weights. All arithmetic is in float32 at least.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Entries that are worked on at once where a method needs several temporaries per entry."""


def task_seed(seed: int, adapter_name: str, tensor_name: str) -> int:
    """The seed of one adapter's draw for one tensor: a hash, so the order of adapters, tensors and shards is nothing."""
    digest = hashlib.sha256("\0".join((str(seed), adapter_name, tensor_name)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def require_finite(tensor: Tensor, what: str) -> None:
    # Any infinity or NaN survives a sum, and sums need no memory; a float64 sum of float32 cannot overflow.
    if not math.isfinite(tensor.sum(dtype=torch.float64).item()) and not bool(tensor.isfinite().all()):
        raise ValueError(f"{what} holds values that are not finite; merge a checkpoint from before they appeared")


def require_parents(base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Raises ValueError unless every task vector has a weight and the base's shape, and all numbers are finite."""
    if not tasks or len(tasks) != len(weights):
        raise ValueError(f"{len(tasks)} task vectors and {len(weights)} weights; give one weight per task vector")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {list(weights)} are not finite; give finite weights")
    require_finite(base, "the base")
    for index, task in enumerate(tasks):
        if task.shape != base.shape:
            raise ValueError(
                f"task vector {index} has shape {list(task.shape)}, the base {list(base.shape)}; "
                "merge models of one architecture"
            )
        require_finite(task, f"task vector {index}")


def require_each(name: str, given: Sequence[object], tasks: Sequence[Tensor]) -> None:
    if len(given) != len(tasks):
        raise ValueError(f"{len(given)} {name} for {len(tasks)} task vectors; give one to each")


def normalised(weights: Sequence[float]) -> list[float]:
    """w_i / Σw, the shares of a mean: none is negative, and not all are 0."""
    total = math.fsum(weights)
    if min(weights) < 0 or total == 0:
        raise ValueError(
            f"weights {list(weights)} are shares of a mean here; give none below 0 and one above, "
            "or choose task_arithmetic, which adds and subtracts"
        )
    return [weight / total for weight in weights]


def working_dtype(base: Tensor, tasks: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 where an input is."""
    return torch.float64 if torch.float64 in {base.dtype, *(task.dtype for task in tasks)} else torch.float32


def weighted_sum(base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i·τ_i in the working dtype."""
    total = torch.zeros(base.shape, dtype=working_dtype(base, tasks), device=base.device)
    for task, weight in zip(tasks, weights, strict=True):
        total.add_(task, alpha=weight)
    return total


def applied(base: Tensor, delta: Tensor) -> Tensor:
    """θ_0 + Δ in the base's dtype; to the bit θ_0 where Δ is 0. Overwrites `delta`."""
    untouched = delta == 0
    merged = delta.add_(base).to(base.dtype)
    if not bool(torch.isfinite(merged.sum(dtype=torch.float64))) and not bool(merged.isfinite().all()):
        raise ValueError(f"the merged tensor overflows {base.dtype}; lower the weights or merge in a wider dtype")
    return torch.where(untouched, base, merged)  # −0 + 0 would be +0


def slices(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def kept_count(density: float, count: int) -> int:
    """⌊density · count⌋, but at least 1 of a density above 0."""
    return min(count, max(1, int(density * count))) if density > 0 else 0


def largest(magnitude: Tensor, k: int) -> Tensor:
    """True at the k largest entries, exactly k; among equals the earlier go first. Same shape, bool."""
    flat = magnitude.reshape(-1)
    if k <= 0 or k >= flat.numel():
        return torch.full_like(magnitude, k > 0, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    mask = flat > threshold
    missing = k - int(mask.sum())
    mask[(flat == threshold).nonzero()[:missing, 0]] = True
    return mask.view(magnitude.shape)
