"""Keys and values while responses are written token by token, and the attention that reads them.

Letters: B rows, one response each; F prompts; M rows of the prompt that has most; P tokens of the longest prompt; R
those that a row keeps itself; h heads of keys, H of queries, G = H / h of them to a head of keys, D their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import sdpa_mask

from remix.models import packing
from remix.types import Request

ROOM = 64
"""Tokens that a row's own part grows by when it is full."""
SHARED = 64
"""Tokens from which on a prompt is kept once for all of its responses. Two parts are slower to attend to than one
where both are short."""
ATTENTION = "remix_decoding"
"""transformers' name for the attention below."""
WITHOUT_CAP = ("sdpa", packing.ATTENTION)
"""Attention of transformers to which a cap on the scores makes no difference."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer with room behind them: transformers' own copies all of them for every new token."""

    keys: Tensor
    values: Tensor
    _room: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        whole = length + key_states.shape[-2]
        if not self._room or whole > self._room[0].shape[-2]:
            held = (self.keys, self.values)
            self._room = tuple(
                new.new_empty(*new.shape[:-2], whole + ROOM, new.shape[-1]) for new in (key_states, value_states)
            )
            for room, old in zip(self._room, held, strict=True):
                if length:
                    room[..., :length, :] = old
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., length:whole, :] = new
        self.keys, self.values = (room[..., :whole, :] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = ()

    def forget(self, tokens: int) -> None:
        """The first ones of every row."""
        self.keys, self.values = self.keys[..., tokens:, :], self.values[..., tokens:, :]
        self._room = ()

    def join(self, keys: Tensor, values: Tensor) -> None:
        """Further rows."""
        if self.is_initialized:
            keys, values = _together(self.keys, keys), _together(self.values, values)
        elif keys.shape[-2]:
            self.lazy_initialization(keys, values)
        else:
            return  # of this width anything goes
        self.keys, self.values, self._room = keys, values, ()


@dataclass(slots=True)
class Shared:
    """Prompts that are kept once for all rows that go on from them."""

    layers: list[tuple[Tensor, Tensor]]
    """[F, h, P, D], keys and values."""
    bias: Tensor
    """[F, 1, 1, P], -inf at padding, else 0."""
    prompt_of: Tensor
    """[B], of each row."""
    rows: Tensor
    """[F, M], of each prompt; row 0 again where it has fewer."""
    places: Tensor
    """[B], where each row is in `rows`, counted through it."""

    @classmethod
    def of(cls, layers: list[tuple[Tensor, Tensor]], bias: Tensor, prompt_of_B: Tensor) -> Shared:
        return cls(layers, bias, prompt_of_B, *_table(prompt_of_B, len(bias)))

    def kept(self, rows: Tensor) -> Shared:
        """What these rows go on from."""
        left, prompt_of_B = self.prompt_of[rows].unique(return_inverse=True)
        layers, bias = self.layers, self.bias
        if len(left) < len(bias):
            layers, bias = [(keys[left], values[left]) for keys, values in layers], bias[left]
        return Shared.of(layers, bias, prompt_of_B)

    def joined_by(self, others: Shared) -> Shared:
        pairs = zip(self.layers, others.layers, strict=True)
        layers = [(_together(keys, new_keys), _together(values, new_values))
                  for (keys, values), (new_keys, new_values) in pairs]  # fmt: skip
        bias = _together(self.bias.mT, others.bias.mT, -torch.inf).mT
        return Shared.of(layers, bias, torch.cat([self.prompt_of, others.prompt_of + len(self.bias)]))


class Decoding(Cache):  # type: ignore[misc]
    """What a batch of responses keeps between tokens."""

    layers: list[RoomyLayer]

    def __init__(self, *, shared: bool) -> None:
        """`shared`: prompts are kept once for all rows that go on from them, not by each row."""
        super().__init__(layer_class_to_replicate=RoomyLayer)
        self._shares = shared
        self.shared: Shared | None = None
        self.bias: Tensor | None = None
        """[B, 1, 1, room], -inf at padding of what a row keeps itself; None = there is none."""
        self.caps = True
        """Whether scores are capped where the model has a cap, which its own attention may pass over."""

    def join(self, prompts: Cache, mask_FP: Tensor, prompt_of_B: Tensor) -> None:
        """Further rows. `prompts`: their keys and values, padded on the left, which are taken over; `prompt_of_B`: of
        each row."""
        kept = [(layer.keys, layer.values) for layer in prompts.layers]
        bias = torch.zeros(mask_FP.shape, device=mask_FP.device).masked_fill_(mask_FP == 0, -torch.inf)[:, None, None]
        if self._shares:
            others = Shared.of(kept, bias, prompt_of_B)
            self.shared = others if self.shared is None else self.shared.joined_by(others)
            kept, bias = [(keys[..., :0, :], values[..., :0, :]) for keys, values in kept], bias[..., :0]
        bias = bias[prompt_of_B]
        if self.layers:
            width = self.get_seq_length()
            rows = len(self.layers[0].keys)
            held = self.padding(width)
            held = bias.new_zeros(rows, 1, 1, width) if held is None else held
            bias = _together(held.mT, bias.mT, -torch.inf).mT
        else:
            self.layers = [RoomyLayer() for _ in kept]
        self.bias = None if (bias == 0).all() else bias
        for layer, (keys, values) in zip(self.layers, kept, strict=True):
            layer.join(keys[prompt_of_B], values[prompt_of_B])

    def keep(self, rows: Tensor) -> None:
        """Of the rows these alone, in this order."""
        if not len(rows):
            self.layers, self.shared, self.bias = [], None, None
            return
        for layer in self.layers:
            layer.batch_select_indices(rows)
        if self.shared is not None:
            self.shared = self.shared.kept(rows)
        if self.bias is not None:
            self.bias = self.bias[rows]
            of_none = int((self.bias == 0).any(0).flatten().int().argmax())
            if of_none:  # columns on the left that are padding of every row
                self.bias = self.bias[..., of_none:]
                for layer in self.layers:
                    layer.forget(of_none)

    def padding(self, width: int) -> Tensor | None:
        """[B, 1, 1, width], to be added to the scores of what the rows keep themselves."""
        if self.bias is None:
            return None
        if self.bias.shape[-1] < width:
            self.bias = pad(self.bias, (0, width + ROOM - self.bias.shape[-1]))
        return self.bias[..., :width]


def _together(one: Tensor, other: Tensor, padding: float = 0.0) -> Tensor:
    """The rows of both, [B, h, T, D], which are filled up on the left to the T of the longer."""
    width = max(one.shape[-2], other.shape[-2])
    return torch.cat([pad(rows, (0, 0, width - rows.shape[-2], 0), value=padding) for rows in (one, other)])


def _table(prompt_of_B: Tensor, prompts: int) -> tuple[Tensor, Tensor]:
    """Rows of each prompt [F, M], and the place of each row in that [B]."""
    counts_F = torch.bincount(prompt_of_B, minlength=prompts)
    order_B = prompt_of_B.argsort(stable=True)
    of_B = prompt_of_B[order_B]
    rank_B = torch.arange(len(order_B), device=order_B.device) - (counts_F.cumsum(0) - counts_F)[of_B]
    rows_FM = order_B.new_zeros(prompts, int(counts_F.max()))
    rows_FM[of_B, rank_B] = order_B
    place_B = torch.empty_like(order_B)
    place_B[order_B] = of_B * rows_FM.shape[1] + rank_B
    return rows_FM, place_B


# --- attention ----------------------------------------------------------------------------------------------------


def decoding_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    decoding: Decoding,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Of one token of each row, [B, H, 1, D], to all before it, in transformers' form. Raises ValueError where the
    model wants more than that."""
    wanted = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if wanted:
        raise ValueError(f"its attention has {wanted[0]}")
    heads, width = key.shape[1], query.shape[-1]
    softcap = softcap if decoding.caps else None
    query_BhGD = query.reshape(len(query), heads, -1, width) * (width**-0.5 if scaling is None else scaling)
    own = _scores(query_BhGD, key, decoding.padding(key.shape[-2]), softcap)
    if decoding.shared is None:
        out_BhGD = own.softmax(-1).to(value.dtype) @ value
    else:
        shared = decoding.shared
        keys, values = shared.layers[module.layer_idx]
        rows_FM = shared.rows
        query_FhND = query_BhGD[rows_FM].transpose(1, 2).flatten(2, 3)  # N = M * G
        scores = _scores(query_FhND, keys, shared.bias, softcap)
        of_prompts = [
            part.unflatten(2, (rows_FM.shape[1], -1)).transpose(1, 2).flatten(0, 1)[shared.places]
            for part in _unnormalised(scores, values)
        ]
        out_BhGD = _joined(_unnormalised(own, value), of_prompts).to(value.dtype)
    return out_BhGD.reshape(len(query), 1, heads * query_BhGD.shape[2], -1), None


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    scores = (query @ key.transpose(-1, -2)).float()
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    return scores if bias is None else scores.add_(bias)


def _unnormalised(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted values, the sum of the weights, and the largest score, by which weights are e^(score - largest)."""
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp_()
    return (weights.to(value.dtype) @ value).float(), weights.sum(-1, keepdim=True), largest


def _joined(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """What attention to both parts at once would give."""
    difference = other[2] - one[2]
    ours, theirs = (-difference).clamp(max=0).exp(), difference.clamp(max=0).exp()
    return (one[0] * ours + other[0] * theirs) / (one[1] * ours + other[1] * theirs)


@contextmanager
def attending(lm: Any, decoding: Decoding) -> Iterator[None]:
    """Meanwhile the model attends as above."""
    AttentionInterface.register(ATTENTION, decoding_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    config = lm.config.get_text_config()
    own = config._attn_implementation
    decoding.caps = own not in WITHOUT_CAP
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = own


def keeps_keys_and_values(lm: Any, longest: int) -> bool:
    """Whether a transformers model keeps whole keys and values of all of `longest` tokens, and nothing else."""
    layers = DynamicCache(config=lm.config).layers
    reach = packing.attention_reach(lm)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return bool(layers) and plain and (reach is None or longest <= reach)


def worth_sharing(requests: Sequence[Request]) -> bool:
    """Whether prompts are kept once for all of their responses."""
    prompts = {(request.prompt_ids, request.images) for request in requests}
    return len(prompts) < len(requests) and max(len(ids) for ids, _ in prompts) >= SHARED


def prompt_cache() -> Cache:
    return Cache(layer_class_to_replicate=DynamicLayer)
