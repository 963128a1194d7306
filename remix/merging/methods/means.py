"""Means of models that are not the plain one: on a sphere, by agreement, by Fisher information, by regression.

θ_0 is the base, τ_i = θ_i − θ_0 the task vectors; of the weights w_i only the ratios count (shares of a mean), so that
no weights give the base. N task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from remix.merging.methods.tensors import (
    applied,
    inner_products,
    normalised,
    require_each,
    require_parents,
    require_shape,
    weighted_sum,
    working_dtype,
)

Origin = Literal["base", "zero"]


def slerp(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    origin: Origin = "base",
    threshold: float = 0.9995,
) -> Tensor:
    """sin((1−t)Ω)/sin Ω · v_1 + sin(tΩ)/sin Ω · v_2,  cos Ω = ⟨v_1, v_2⟩/‖v_1‖‖v_2‖,  t = w_2/(w_1 + w_2).

    Shoemake 1985, of exactly two. v_i is τ_i, around the base, or with `origin` "zero" the weights θ_i themselves, as
    in mergekit. Linear where |cos Ω| > `threshold`, or where a vector is 0 and has no direction.
    """
    require_parents(base, tasks, weights)
    if len(tasks) != 2:
        raise ValueError(f"slerp merges exactly 2 models or adapters, not {len(tasks)}; karcher merges any number")
    first, second = normalised(weights)
    gram_NN = _sphere(base, tasks, origin)
    norms = gram_NN[0, 0] * gram_NN[1, 1]
    cosine = float(gram_NN[0, 1] / norms.sqrt()) if norms > 0 else 1.0
    if abs(cosine) <= threshold:
        angle = math.acos(cosine)
        first, second = math.sin(first * angle) / math.sin(angle), math.sin(second * angle) / math.sin(angle)
    return _combination(base, tasks, [first, second], origin)


def karcher(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    origin: Origin = "base",
    iterations: int = 100,
    tolerance: float = 1e-7,
) -> Tensor:
    """Σ w_i‖v_i‖ · argmin_{‖m‖=1} Σ w_i·angle(m, v_i)²: SLERP of any number, with shares w_i.

        m ← exp_m( Σ w_i·log_m(u_i) ),  log_m(u) = Ω/sin Ω · (u − cos Ω·m),  u_i = v_i/‖v_i‖,  cos Ω = ⟨m, u⟩

    The Riemannian centre of mass (Karcher 1977) on the sphere, v_i as in `slerp`; one iteration is multi-SLERP. m is a
    combination of the u_i, so all happens on N coefficients and the N×N cosines; tensors are read twice. A vector of 0
    has no direction and counts for the length alone. Linear where directions cancel and no mean is unique.
    """
    require_parents(base, tasks, weights)
    shares_N = torch.tensor(normalised(weights), dtype=torch.float64)
    gram_NN = _sphere(base, tasks, origin)
    norms_N = gram_NN.diagonal().sqrt()
    cosines_NN = (gram_NN / torch.outer(norms_N, norms_N)).nan_to_num().fill_diagonal_(1.0)
    direction_N = _spherical_mean(cosines_NN, shares_N * (norms_N > 0), iterations, tolerance)
    if direction_N is not None:
        shares_N = torch.where(norms_N > 0, direction_N * (shares_N @ norms_N) / norms_N, 0)
    return _combination(base, tasks, shares_N.tolist(), origin)


def _spherical_mean(cosines_NN: Tensor, shares_N: Tensor, iterations: int, tolerance: float) -> Tensor | None:
    """`karcher`'s m as coefficients of the unit vectors; None if their weighted sum is 0."""
    mean_N = shares_N / shares_N.sum().clamp(min=1e-300)
    shares_N, length = mean_N, _length(mean_N, cosines_NN)
    if length < 1e-6:
        return None
    mean_N = mean_N / length
    for _ in range(iterations):
        cosine_N = (cosines_NN @ mean_N).clamp(-1, 1)
        angle_N, sine_N = cosine_N.acos(), (1 - cosine_N.square()).sqrt()
        pull_N = shares_N * torch.where(sine_N > 1e-6, angle_N / sine_N, 1)  # at the antipode log_m is not defined
        tangent_N = pull_N - (pull_N @ cosine_N) * mean_N
        step = _length(tangent_N, cosines_NN)
        if step < tolerance:
            break
        mean_N = math.cos(step) * mean_N + math.sin(step) / step * tangent_N
        mean_N = mean_N / _length(mean_N, cosines_NN)
    return mean_N


def _length(coefficients_N: Tensor, cosines_NN: Tensor) -> float:
    return math.sqrt(max(0.0, float(coefficients_N @ cosines_NN @ coefficients_N)))


def _sphere(base: Tensor, tasks: Sequence[Tensor], origin: Origin) -> Tensor:
    """⟨v_i, v_j⟩ of v_i = τ_i or of v_i = θ_0 + τ_i. [N, N] float64."""
    if origin == "base":
        return inner_products(tasks)
    gram_MM = inner_products([base, *tasks])
    return gram_MM[1:, 1:] + gram_MM[1:, :1] + gram_MM[:1, 1:] + gram_MM[0, 0]


def _combination(base: Tensor, tasks: Sequence[Tensor], coefficients: Sequence[float], origin: Origin) -> Tensor:
    """θ_0 + Σ c_i·τ_i, or Σ c_i·(θ_0 + τ_i)."""
    delta = weighted_sum(base, tasks, coefficients)
    if origin == "zero":
        delta.add_(base, alpha=math.fsum(coefficients) - 1)
    return applied(base, delta)


def model_stock(base: Tensor, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """θ_0 + t·Σ w_i·τ_i / Σ w_i,   t = N·c / (1 + (N − 1)·c),  c = the mean cosine of two task vectors, at least 0.

    Model Stock (arXiv 2403.19522), one t for each tensor. The paper's mean is plain: equal weights. Where task
    vectors point apart (c < 0), of which it does not speak, the base stays.
    """
    require_parents(base, tasks, weights)
    count = len(tasks)
    if count < 2:
        raise ValueError("model_stock compares task vectors; give at least 2 models or adapters")
    gram_NN = inner_products(tasks)
    norms_N = gram_NN.diagonal().sqrt()
    cosines_NN = (gram_NN / torch.outer(norms_N, norms_N)).nan_to_num()
    cosine = max(0.0, float(cosines_NN.triu(1).sum()) / (count * (count - 1) / 2))
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return applied(base, weighted_sum(base, tasks, [ratio * share for share in normalised(weights)]))


def fisher(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    fishers: Sequence[Tensor | None],
    floor: float = 1e-6,
) -> Tensor:
    """Σ w_i·F_i·θ_i / Σ w_i·F_i = θ_0 + Σ w_i·F_i ∘ τ_i / Σ w_i·F_i, with F_i the diagonal Fisher information.

    Fisher-weighted averaging (arXiv 2111.09832). F is at least `floor` of its largest entry over all parents, so
    that where no parent is sure the mean is the plain one, as it is where there is none of them (None); the paper's
    floor of 1e-6 is absolute.
    """
    require_parents(base, tasks, weights)
    require_each(fishers, tasks, "Fisher tensors")
    shares = normalised(weights)
    known = [information for information in fishers if information is not None]
    for index, information in enumerate(known):
        require_shape(information, base.shape, f"Fisher tensor {index}")
        if bool((information < 0).any()):
            raise ValueError(f"Fisher tensor {index} has entries below 0; give mean squares of gradients")
    dtype = working_dtype(base, tasks)
    peak = max((float(information.max()) for information in known if information.numel()), default=0.0)
    if peak == 0 or len(known) < len(tasks):
        return applied(base, weighted_sum(base, tasks, shares))
    total = torch.zeros(base.shape, dtype=dtype, device=base.device)
    for information, share in zip(known, shares, strict=True):
        total += _relative(information, peak, floor, dtype) * share
    delta = torch.zeros_like(total)
    for task, information, share in zip(tasks, known, shares, strict=True):
        delta += _relative(information, peak, floor, dtype).mul_(share).div_(total).mul_(task)
    return applied(base, delta)


def _relative(information: Tensor, peak: float, floor: float, dtype: torch.dtype) -> Tensor:
    return (information.to(dtype) / peak).clamp_(min=floor)


def regmean(
    base: Tensor,
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    *,
    grams: Sequence[Tensor | None],
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
) -> Tensor:
    """(Σ w_i·θ_i·G_i)(Σ w_i·G_i)⁻¹ = θ_0 + (Σ w_i·τ_i·G_i)(Σ w_i·G_i)⁻¹,  G = X'X of a linear layer's inputs.

    RegMean (arXiv 2212.09849; θ is [out, in] here, the transpose of the paper's): the weights whose outputs are
    nearest to each parent's on its own inputs. As in the paper off-diagonals are scaled by α = `off_diagonal`, and what
    is no linear weight (not 2-D, or a Gram matrix of None) gets the weighted mean. `ridge` times the mean diagonal is
    added to every G_i, so that an input that no data reaches gets the weighted mean as well.
    """
    require_parents(base, tasks, weights)
    require_each(grams, tasks, "Gram matrices")
    shares = normalised(weights)
    known = [gram for gram in grams if gram is not None]
    if base.dim() != 2 or len(known) < len(tasks) or 1.0 in shares:
        return applied(base, weighted_sum(base, tasks, shares))
    for index, gram in enumerate(known):
        require_shape(gram, (base.shape[1], base.shape[1]), f"Gram matrix {index}")
    scaled = [_scaled_gram(gram, share, off_diagonal) for gram, share in zip(known, shares, strict=True)]
    total = torch.stack(scaled).sum(0)
    prior = ridge * float(total.diagonal().mean())
    if prior <= 0:
        return applied(base, weighted_sum(base, tasks, shares))
    right = weighted_sum(base.double(), tasks, shares).mul_(prior)
    for task, gram in zip(tasks, scaled, strict=True):
        right.addmm_(task.double(), gram)
    total.diagonal().add_(prior)
    delta = torch.linalg.solve(total, right, left=False)
    return applied(base, delta.to(working_dtype(base, tasks)))


def _scaled_gram(gram: Tensor, share: float, off_diagonal: float) -> Tensor:
    scaled = gram.double() * (off_diagonal * share)
    scaled.diagonal().copy_(gram.diagonal() * share)
    return scaled
