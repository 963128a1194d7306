"""What the merge methods share: checks of their input, sums, the k largest entries, inner products, seeds.

θ_0 is the base, τ_i = θ_i − θ_0 the task vectors, w_i their weights. All arithmetic is in float32 at least.
N task vectors, X entries of a tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Entries worked on at once where a method needs several temporaries per entry: they stay in the cache."""


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def task_seed(seed: int, adapter_name: str, tensor_name: str) -> int:
    """The seed of one adapter's draw for one tensor: a hash, so that no order of adapters or shards matters."""
    digest = hashlib.sha256("\0".join((str(seed), adapter_name, tensor_name)).encode()).digest()
    return int.from_bytes(digest[:4], "big")  # the generator uses 32 bits


def require_finite(tensor: Tensor, what: str) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{what} is of {tensor.dtype}; merge 16, 32 and 64-bit floats, and copy or convert the rest")
    if not _is_finite(tensor):
        raise ValueError(f"{what} holds values that are not finite; take a checkpoint from before they appeared")


def _is_finite(tensor: Tensor) -> bool:
    # An infinity or a NaN survives any sum, which needs no memory; but a sum may overflow of itself.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(tensor.isfinite().all())


def require_parents(base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Raises ValueError unless every task vector has a weight and the base's shape, and all numbers are finite."""
    if not tasks or len(tasks) != len(weights):
        raise ValueError(f"{len(tasks)} task vectors and {len(weights)} weights; give one weight per task vector")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {list(weights)} are not finite; give finite weights")
    require_finite(base, "the base")
    for index, task in enumerate(tasks):
        require_shape(task, base.shape, f"task vector {index}")


def require_shape(tensor: Tensor, shape: Sequence[int], what: str) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{what} has shape {list(tensor.shape)}, not {list(shape)}; merge models of one architecture")
    require_finite(tensor, what)


def require_each(given: Sequence[object], tasks: Sequence[Tensor], what: str) -> None:
    if len(given) != len(tasks):
        raise ValueError(f"{len(given)} {what} for {len(tasks)} task vectors; give one to each")


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


def entrywise(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    combine: Callable[[Tensor, Tensor], Tensor],
    keeps: Sequence[Tensor | None] | None = None,
    gains: Sequence[float] | None = None,
) -> Tensor:
    """θ_0 + combine(τ̂_NX, w_N1),  τ̂_i = gain_i·keep_i ∘ τ_i,  a chunk of entries at a time."""
    delta = torch.empty(base.shape, dtype=working_dtype(base, tasks), device=base.device)
    out_X, flat = delta.view(-1), [task.reshape(-1) for task in tasks]
    kept = [None if keep is None else keep.reshape(-1) for keep in keeps or [None] * len(tasks)]
    gains = gains or [1.0] * len(tasks)
    weights_N1 = torch.tensor(weights, dtype=delta.dtype, device=delta.device).unsqueeze(1)
    for part in slices(out_X.numel()):
        tasks_NX = torch.stack([task[part].to(delta.dtype) for task in flat])
        for row_X, keep, gain in zip(tasks_NX, kept, gains, strict=True):
            if keep is not None:
                row_X.mul_(keep[part]).mul_(gain)
        out_X[part] = combine(tasks_NX, weights_N1)
    return applied(base, delta)


def applied(base: Tensor, delta: Tensor) -> Tensor:
    """θ_0 + Δ in the base's dtype, to the bit θ_0 where Δ is 0. Overwrites `delta`."""
    untouched = delta == 0
    merged = delta.add_(base).to(base.dtype)
    if not _is_finite(merged):
        raise ValueError(f"the merged tensor overflows {base.dtype}; lower the weights or merge in a wider dtype")
    return torch.where(untouched, base, merged)  # −0 + 0 would be +0


def slices(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def kept_count(density: float, count: int) -> int:
    """⌊density·count⌋, but at least 1 of a density above 0."""
    return min(count, max(1, int(density * count))) if density > 0 else 0


def largest(magnitude: Tensor, k: int) -> Tensor:
    """True at exactly k of the largest entries of a non-negative tensor; among equals the earlier go first."""
    flat = magnitude.reshape(-1)
    if k <= 0 or k >= flat.numel():
        return torch.full(magnitude.shape, k > 0, device=magnitude.device)
    threshold = _kth_largest(flat, k)
    mask = flat > threshold
    missing = k - int(mask.sum())
    mask[(flat == threshold).nonzero()[:missing, 0]] = True
    return mask.view(magnitude.shape)


def _kth_largest(magnitude: Tensor, k: int) -> Tensor:
    """The k-th largest value, by counting 16 bits at a time: the bits of non-negative floats are in their order.

    In time linear in the entries whatever their order; `kthvalue` is quadratic on descending ones.
    """
    width = 8 * magnitude.element_size()
    bits, found = magnitude.view({16: torch.int16, 32: torch.int32, 64: torch.int64}[width]), 0
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros((1 << 16) + 1, dtype=torch.int64, device=bits.device)
        for part in slices(bits.numel()):
            counts += torch.bincount((bits[part] >> shift) & 0xFFFF, minlength=len(counts))
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= k).nonzero()[-1])
        k -= int(at_least[digit + 1])
        bits = torch.cat([bits[part][(bits[part] >> shift) & 0xFFFF == digit] for part in slices(bits.numel())])
        found = found << 16 | digit
    return torch.tensor(found, dtype=bits.dtype, device=bits.device).view(magnitude.dtype)


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """⟨v_i, v_j⟩ in float64, on the CPU. [N, N]."""
    flat = [vector.reshape(-1) for vector in vectors]
    gram_NN = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for part in slices(flat[0].numel()):
        chunk_NX = torch.stack([vector[part].double() for vector in flat])
        gram_NN += (chunk_NX @ chunk_NX.T).cpu()
    return gram_NN
