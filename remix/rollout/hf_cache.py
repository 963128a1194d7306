"""Attention caches of transformers for groups of responses: filled once for a prompt, grown in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that a cache grows by when it is full."""


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


def roomy_cache(config: Any) -> DynamicCache | None:
    """A cache of nothing but whole keys and values; None for models that keep other things between tokens."""
    cache = DynamicCache(config=config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache


@torch.no_grad()
def fill(backbone: Any, cache: DynamicCache, ids_BS: Tensor, mask_BS: Tensor) -> None:
    """Computes all but the last token of sequences that are padded on the left, each different one once."""
    if ids_BS.shape[1] == 1:
        return
    # A prompt may begin with the token that pads: what is padding is part of what makes rows different.
    different_US, which_B = torch.unique(ids_BS.masked_fill(mask_BS == 0, -1)[:, :-1], dim=0, return_inverse=True)
    first_U = torch.zeros(len(different_US), dtype=torch.long, device=ids_BS.device)
    first_U.scatter_(0, which_B, torch.arange(len(ids_BS), device=ids_BS.device))
    ids_US, mask_US = ids_BS[first_U, :-1], mask_BS[first_U, :-1]
    positions_US = (mask_US.cumsum(-1) - 1).clamp(min=0)
    backbone(input_ids=ids_US, attention_mask=mask_US, position_ids=positions_US, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(which_B)
