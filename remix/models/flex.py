"""Attention of packed rows by FlexAttention: one kernel for the whole row that skips what nobody sees.

The same attention as `remix.models.packing` has block by block, without copies of a prompt's keys for each of its
responses. FlashAttention's variable-length kernels know sequences that stand apart, not ones that share a prompt.
Letters: L places in the row, N = ⌈L / SIZE⌉ tiles of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if TYPE_CHECKING:
    from remix.models.packing import Block

SIZE = 128
"""Places of a tile: FlexAttention's own default."""


class Spans(NamedTuple):
    """What each place sees: the prompt that it follows, and its own sequence up to itself. [L] each."""

    first: Tensor
    """Where its prompt begins."""
    end: Tensor
    """Where that ends, exclusive; `first` for the places of prompts, which see nothing but their own sequence."""
    own: Tensor
    """Where its own sequence begins."""


def spans(blocks: Sequence[Block]) -> Spans:
    found: list[Spans] = []
    for block in blocks:
        count, length = block.prompts
        of_prompts = (block.start + length * torch.arange(count)).repeat_interleave(length)
        found.append(Spans(of_prompts, of_prompts, of_prompts))
        if block.inside.numel():
            lengths_M = block.inside.sum(1)
            first = (block.start + length * block.prompt_of).repeat_interleave(lengths_M)
            own = (block.first_response + block.places[:, 0]).repeat_interleave(lengths_M)
            found.append(Spans(first, first + length, own))
    return Spans(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def tree_mask(blocks: Sequence[Block], device: torch.device) -> BlockMask:
    """Who sees whom in a row, by tiles: found from the spans' ends, so that nothing of size [L, L] is ever made.

    `blocks`: in main memory.
    """
    first, end, own = spans(blocks)
    places = torch.arange(len(own))
    tiles = -(-len(own) // SIZE)
    touched, covered = (torch.zeros(tiles, tiles + 1, dtype=torch.int32) for _ in range(2))
    for begin, stop in ((first, end), (own, places + 1)):
        # A tile that all places of a tile see whole needs no look at its single places.
        for counts, low, high in (
            (touched, begin // SIZE, torch.where(stop > begin, (stop - 1) // SIZE + 1, begin // SIZE)),
            (covered, -(-begin // SIZE), torch.maximum(stop // SIZE, -(-begin // SIZE))),
        ):
            one = torch.ones_like(places, dtype=torch.int32)
            counts.index_put_((places // SIZE, low.clamp(max=tiles)), one, accumulate=True)
            counts.index_put_((places // SIZE, high.clamp(max=tiles)), -one, accumulate=True)
    some, whole = touched.cumsum(1)[:, :-1] > 0, covered.cumsum(1)[:, :-1] == SIZE
    first, end, own = (tensor.to(device) for tensor in (first, end, own))

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_prompt = (key >= first[query]) & (key < end[query])
        return of_prompt | ((key >= own[query]) & (key <= query))

    partly, wholly = ([t.to(device) for t in _listed(chosen)] for chosen in (some & ~whole, whole))
    length = len(places)
    return BlockMask.from_kv_blocks(
        partly[0], partly[1], wholly[0], wholly[1], BLOCK_SIZE=SIZE, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(chosen_NN: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are chosen, and which: these first."""
    order_NN = chosen_NN.int().argsort(dim=1, descending=True, stable=True)
    return chosen_NN.sum(1, dtype=torch.int32)[None, None], order_NN.int()[None, None]


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scale: float | None, softcap: float | None) -> Tensor:
    """Of [1, h, L, d] each, keys and values with as many heads or fewer, to [1, h, L, d]."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # which FlexAttention is left out of, unlike all other attention
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))

    options: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if softcap is not None:
        cap = softcap
        options["score_mod"] = lambda score, *_: cap * torch.tanh(score / cap)
    inside = torch.compiler.is_compiling()
    attend: Any = flex_attention if inside or kind == "cpu" else _compiled()
    attended: Tensor = attend(query, key, value, **options)
    return attended


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
