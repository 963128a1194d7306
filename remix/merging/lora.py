"""The two readings of LoRA adapters that are merged: their factors A and B apart, or their products B·A.

Shapes as in PEFT: A [r, in], B [out, r], a linear weight [out, in]; with `fan_in_fan_out` (GPT-2's Conv1D, embeddings)
the weight is [in, out] and so is what is added to it.

`factors` merges the A's and, apart from them, the B's: small, the result has rank r again, but a product of sums is not
the sum of the products. `delta` merges the products, exactly, and needs `refactor` to be an adapter again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def lora_scaling(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """α/r, or with rsLoRA (arXiv 2312.03732) α/√r."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def delta(A: Tensor, B: Tensor, scaling: float, *, fan_in_fan_out: bool = False) -> Tensor:
    """s·B·A, what the adapter adds to the weight, in float32 at least. LoRA (arXiv 2106.09685)."""
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"factors of shapes {list(A.shape)} and {list(B.shape)} are no pair [r, in], [out, r]; "
            "give A and B of one adapter of a linear layer or an embedding"
        )
    product = (B.to(dtype) @ A.to(dtype)) * scaling
    return product.T.contiguous() if fan_in_fan_out else product


def dora_delta(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor, *, fan_in_fan_out: bool = False
) -> Tensor:
    """m · V/‖V‖ − W,  V = W + s·B·A,  ‖V‖ over each output's inputs. DoRA (arXiv 2402.09353).

    What the adapter adds depends on the weight it was trained on. `magnitude` is [out].
    """
    change = delta(A, B, scaling, fan_in_fan_out=fan_in_fan_out)
    inputs = 0 if fan_in_fan_out else 1
    if change.shape != weight.shape or magnitude.numel() != weight.shape[1 - inputs]:
        raise ValueError(
            f"a DoRA change of shape {list(change.shape)} with {magnitude.numel()} magnitudes does not fit a weight "
            f"{list(weight.shape)}; give the weight of the layer that it was trained on"
        )
    directed = weight.to(change.dtype) + change
    gain = magnitude.to(change.dtype).reshape(-1) / torch.linalg.vector_norm(directed, dim=inputs)
    return directed.mul_(gain.unsqueeze(inputs)).sub_(weight)


def padded(factor: Tensor, rank: int, side: Literal["A", "B"]) -> Tensor:
    """The factor with zeros up to `rank`: the same product, exactly, so that different ranks can be merged.

    The zeros count as entries: a density keeps its share of the padded tensor.
    """
    missing = rank - factor.shape[0 if side == "A" else 1]
    if missing < 0:
        raise ValueError(f"a factor of rank {rank - missing} does not fit into rank {rank}; give the largest rank")
    return torch.nn.functional.pad(factor, (0, 0, 0, missing) if side == "A" else (0, missing))


def factor_weights(
    weights: Sequence[float], scalings: Sequence[float], side: Literal["A", "B"], *, scaling: float = 1.0
) -> list[float]:
    """√|w_i·s_i/s| for B, and with the sign of w_i for A: of a product of both each task has w_i·s_i/s.

    PEFT's `add_weighted_adapter`, where the merged adapter's own `scaling` s is 1. With the s that all have, an adapter
    alone at weight 1 stays what it is. For methods that multiply task vectors by their weights.
    """
    ratios = [weight * own / scaling for weight, own in zip(weights, scalings, strict=True)]
    return [math.copysign(math.sqrt(abs(ratio)), ratio if side == "A" else 1.0) for ratio in ratios]


def rescaled_factors(factors: Sequence[Tensor], scalings: Sequence[float], *, scaling: float = 1.0) -> list[Tensor]:
    """√(s_i/s)·A_i, or of B_i: factors of adapters of one `scaling` s. For methods whose weights are shares of a mean,
    which then are the same for A and B."""
    return [factor * math.sqrt(own / scaling) for factor, own in zip(factors, scalings, strict=True)]


def concatenated(
    As: Sequence[Tensor], Bs: Sequence[Tensor], weights: Sequence[float], scalings: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """A = [w_1·s_1·A_1; …], B = [B_1, …]: B·A = Σ w_i·s_i·B_i·A_i exactly, rank Σ r_i, scaling 1. PEFT's `cat`."""
    scaled = [A * (weight * own) for A, weight, own in zip(As, weights, scalings, strict=True)]
    return torch.cat(scaled, dim=0), torch.cat(tuple(Bs), dim=1)


def refactor(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A and B of scaling 1 whose product is the nearest of that rank to `delta` [out, in], and the energy it keeps.

        U·S·V' = delta,   B = U_r·√S_r,  A = √S_r·V_r',   energy = Σ_{i≤r} σ_i² / Σ σ_i²   (1 of a delta of 0)

    Balanced: A and B have one scale. (Eckart and Young 1936; PEFT's `svd` leaves S to B.)
    """
    left, values, right = torch.linalg.svd(
        delta.to(torch.promote_types(delta.dtype, torch.float32)), full_matrices=False
    )
    return _split(left, values, right, rank)


def refactor_product(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """`refactor(B·A, rank)` without forming the product: of a few ranks in place of a whole weight."""
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    left_basis, left = torch.linalg.qr(B.to(dtype))
    right_basis, right = torch.linalg.qr(A.to(dtype).T)
    inner_left, values, inner_right = torch.linalg.svd(left @ right.T, full_matrices=False)
    return _split(left_basis @ inner_left, values, inner_right @ right_basis.T, rank)


def _split(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    if rank < 1:
        raise ValueError(f"an adapter of rank {rank} cannot be; give a rank of at least 1")
    energies = values.double().square()
    kept = float(energies[:rank].sum() / energies.sum()) if bool(energies.sum() > 0) else 1.0
    roots = values[:rank].sqrt()
    return padded(roots.unsqueeze(1) * right[:rank], rank, "A"), padded(left[:, :rank] * roots, rank, "B"), kept
