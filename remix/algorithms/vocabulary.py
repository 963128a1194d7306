"""What a policy says of each token, from hidden states, without logits of all tokens at once.

N tokens, H hidden, V vocabulary, C tokens of a chunk. Only [C, V] numbers exist at a time, in forward and backward;
gradients are closed forms of what the forward found, so the backward needs nothing of autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NEVER = -1e30
"""The logit of a token that the policy has no probability for. Finite, since 0 · ∞ is no number; e^NEVER is 0."""


class Head(NamedTuple):
    """From a hidden state to logits."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None = None
    """[V]."""


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What becomes of logits before they are a distribution."""

    temperature: float = 1.0
    """They are divided by it."""
    softcap: float | None = None
    """c of c·tanh(z/c), which comes before the temperature (Gemma 2, arXiv 2408.00118)."""
    never: tuple[int, ...] = ()
    """Tokens without a probability."""
    chunk: int = 2048
    """C."""


class TokenStatistics(NamedTuple):
    """Of N tokens, each [N] float32."""

    logprobs: Tensor
    entropy: Tensor
    """Nats."""
    divergences: tuple[Tensor, ...]
    """Nats, exact KL(policy ‖ anchor) for each anchor."""


def token_statistics(
    hidden_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    rule: LogitRule,
    anchors: Sequence[tuple[Tensor, Head]] = (),
) -> TokenStatistics:
    """log π(label), H[π] and KL(π ‖ anchor), differentiable in `hidden_NH` and `head`; anchors are constants.

    `anchors`: hidden states [N, H] of the same tokens, with the heads they belong to. Logits are computed in the
    dtype of an enclosing autocast, all else in float32.
    """
    flat = [tensor for hidden, (weight, bias) in anchors for tensor in (hidden, weight, bias)]
    dtype, device = _compute_dtype(hidden_NH), hidden_NH.device.type
    with torch.autocast(device, enabled=False):  # which would sum in bfloat16 too
        found: tuple[Tensor, ...] = _Statistics.apply(  # type: ignore[no-untyped-call]
            hidden_NH, *head, labels_N, rule, dtype, *flat
        )
    return TokenStatistics(found[0], found[1], found[2:])


class _Statistics(torch.autograd.Function):
    """With p = softmax z and per-token cotangents a, b, c of log-prob, entropy and KL (q the anchor's):

    ∂z_v = a·(1[v = label] − p_v) − b·p_v·(log p_v + H) + c·p_v·(log p_v − log q_v − KL)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        rule: LogitRule,
        dtype: torch.dtype,
        *anchors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        heads = _heads(hidden_NH, weight_VH, bias_V, anchors, dtype)
        # The last row: log Σ exp z, by which the backward finds the same distribution again.
        found = hidden_NH.new_empty(3 + len(anchors) // 3, len(labels_N), dtype=torch.float32)
        logits, probs = (_space(hidden_NH, weight_VH, rule) for _ in range(2))
        for part in _parts(len(labels_N), rule.chunk):
            (logits_CV, _), *of_anchors = (
                _logits(hidden[part], head, rule, None if number else logits)
                for number, (hidden, head) in enumerate(heads)
            )
            largest_C1 = logits_CV.amax(-1, keepdim=True)
            probs_CV = torch.exp(logits_CV.sub_(largest_C1), out=probs[: len(logits_CV)])
            total_C = probs_CV.sum(-1)
            found[0, part] = logits_CV.gather(-1, labels_N[part, None]).squeeze(-1) - total_C.log()
            found[1, part] = total_C.log() - torch.linalg.vecdot(probs_CV, logits_CV) / total_C
            found[-1, part] = total_C.log() + largest_C1.squeeze(-1)
            for row, (anchor_CV, _) in enumerate(of_anchors, start=2):
                anchor_CV.sub_(anchor_CV.logsumexp(-1, keepdim=True)).neg_().add_(logits_CV)
                found[row, part] = torch.linalg.vecdot(probs_CV, anchor_CV) / total_C - total_C.log()
        ctx.rule, ctx.dtype = rule, dtype
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, found, *anchors)
        ctx.set_materialize_grads(False)
        return tuple(found[:-1].unbind())

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, labels_N, found, *anchors = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        heads = _heads(hidden_NH, weight_VH, bias_V, anchors, ctx.dtype)
        weight = heads[0][1].weight
        of_hidden = torch.empty_like(hidden_NH) if needs_hidden else None
        of_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        of_bias = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
        space = _space(hidden_NH, weight_VH, ctx.rule)
        for part in _parts(len(labels_N), ctx.rule.chunk):
            of_logits_CV = _of_logits(heads, labels_N, found, cotangents, ctx.rule, part, space).to(ctx.dtype)
            if of_hidden is not None:
                of_hidden[part] = of_logits_CV @ weight
            if of_weight is not None:
                states_CH = hidden_NH[part].to(ctx.dtype)
                if ctx.dtype == torch.float32:
                    of_weight.addmm_(of_logits_CV.T, states_CH)
                else:
                    of_weight += of_logits_CV.T @ states_CH
            if of_bias is not None:
                of_bias += of_logits_CV.sum(0)
        grads = (of_hidden, of_weight, of_bias)
        return (
            *(g if g is None else g.to(t.dtype) for g, t in zip(grads, (hidden_NH, weight_VH, bias_V), strict=True)),
            *[None] * (3 + len(anchors)),
        )


def _of_logits(
    heads: Sequence[tuple[Tensor, Head]],
    labels_N: Tensor,
    found: Tensor,
    cotangents: Sequence[Tensor | None],
    rule: LogitRule,
    part: slice,
    space: Tensor,
) -> Tensor:
    """∂z of a chunk, [C, V], through temperature and softcap."""
    (logits_CV, slope_CV), *of_anchors = (
        _logits(hidden[part], head, rule, None if number else space) for number, (hidden, head) in enumerate(heads)
    )
    logprobs_CV = logits_CV.sub_(found[-1, part, None])
    a, b, *of_divergences = (None if g is None else g[part, None] for g in cotangents)
    # What multiplies p_v, less what is the same for all v.
    weights_CV: Tensor | None = None
    for row, ((anchor_CV, _), c) in enumerate(zip(of_anchors, of_divergences, strict=True), start=2):
        if c is not None:
            anchor_CV.sub_(anchor_CV.logsumexp(-1, keepdim=True)).neg_().add_(logprobs_CV)
            term_CV = anchor_CV.sub_(found[row, part, None]).mul_(c)
            weights_CV = term_CV if weights_CV is None else weights_CV.add_(term_CV)
    if b is not None:
        term_CV = (logprobs_CV + found[1, part, None]).mul_(-b)
        weights_CV = term_CV if weights_CV is None else weights_CV.add_(term_CV)
    if a is not None:
        weights_CV = -a if weights_CV is None else weights_CV.sub_(a)
    assert weights_CV is not None, "autograd asks for no gradient of nothing"
    of_logits_CV = logprobs_CV.exp_().mul_(weights_CV)
    if a is not None:
        of_logits_CV.scatter_add_(-1, labels_N[part, None], a)
    if slope_CV is not None:
        of_logits_CV.mul_(slope_CV)
    return of_logits_CV.div_(rule.temperature) if rule.temperature != 1.0 else of_logits_CV


def _logits(hidden_CH: Tensor, head: Head, rule: LogitRule, space: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[C, V] float32, and the slope of the softcap where there is one. `space`: [at least C, V] to write them to."""
    states_CH, weight_HV = hidden_CH.to(head.weight.dtype), head.weight.T
    if space is None or head.weight.dtype != torch.float32:
        logits_CV = (states_CH @ weight_HV).float()
        if space is not None:
            logits_CV = space[: len(logits_CV)].copy_(logits_CV)
    else:
        logits_CV = torch.mm(states_CH, weight_HV, out=space[: len(states_CH)])
    if head.bias is not None:
        logits_CV.add_(head.bias)
    slope_CV = None
    if rule.softcap is not None:
        logits_CV.div_(rule.softcap).tanh_()
        slope_CV = 1.0 - logits_CV.square()
        logits_CV.mul_(rule.softcap)
    if rule.temperature != 1.0:
        logits_CV.div_(rule.temperature)
    if rule.never:
        logits_CV[:, list(rule.never)] = NEVER
    return logits_CV, slope_CV


def _space(hidden_NH: Tensor, weight_VH: Tensor, rule: LogitRule) -> Tensor:
    """For the numbers of one chunk after the other: memory that is asked for anew costs more than the arithmetic."""
    return hidden_NH.new_empty(min(rule.chunk, len(hidden_NH)), len(weight_VH), dtype=torch.float32)


def _heads(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, anchors: Sequence[Tensor | None], dtype: torch.dtype
) -> list[tuple[Tensor, Head]]:
    """The policy's and each anchor's hidden states and head, whose weights are cast once for all chunks."""
    heads = [(hidden_NH, Head(weight_VH.to(dtype), bias_V))]
    for hidden, weight, bias in zip(*[iter(anchors)] * 3, strict=True):
        assert hidden is not None
        assert weight is not None
        heads.append((hidden, Head(weight.to(dtype), bias)))
    return heads


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _parts(count: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, count, chunk))
