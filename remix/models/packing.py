"""Sequences side by side without padding, each prompt once for all of its responses.

The tokens of a micro-batch stand in one row: all that is computed token by token (nearly everything) is computed once
for a prompt, however many responses it has, and never for padding. Attention alone knows who belongs to whom: block by
block with torch's `scaled_dot_product_attention`, or all at once where the row comes with a mask (`remix.models.flex`).
Letters: L places in the row, F prompts of one length P, M responses to them, R tokens of the longest, N trained
tokens, K = P + R keys of a response, h (H in suffixes) heads, d (D) their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from remix.models.flex import flex, tree_mask
from remix.types import Rollout

ATTENTION = "remix_packed"
"""transformers' name for the attention below; without a row of the kind above it is that of "sdpa"."""


class Block(NamedTuple):
    """Prompts of one length and their responses, which stand behind one another in the row."""

    start: int
    """Place of its first token."""
    prompts: tuple[int, int]
    """F, P."""
    prompt_of: Tensor
    """[M], the prompt that each response follows, counted within the block."""
    places: Tensor
    """[M, R], of each response's tokens, from the first response on; beyond its end its last again."""
    inside: Tensor
    """[M, R] bool, whether a place is no repetition."""

    @property
    def first_response(self) -> int:
        return self.start + self.prompts[0] * self.prompts[1]


class Packed(NamedTuple):
    """A micro-batch in one row. The last token of a response is left out: nothing is predicted from it."""

    input_ids: Tensor
    positions: Tensor
    """[1, L]."""
    before: Tensor
    """[N], the place from which each trained token is predicted, response by response."""
    labels: Tensor
    """[N], those tokens."""
    blocks: tuple[Block, ...]
    mask: Any | None = None
    """FlexAttention's, of the whole row."""

    def to(self, device: torch.device, *, masked: bool = False) -> Packed:
        """`masked`: with the mask that FlexAttention takes."""
        input_ids, positions, before, labels = (tensor.to(device) for tensor in self[:4])
        blocks = tuple(
            Block(block.start, block.prompts, *(tensor.to(device) for tensor in block[2:])) for block in self.blocks
        )
        mask = tree_mask(self.blocks, device) if masked else None
        return Packed(input_ids, positions, before, labels, blocks, mask)


def families(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Indices of responses to one and the same prompt, in the order of their first; shorter prompts first."""
    found: dict[tuple[bytes, tuple[str, ...]], list[int]] = {}
    for index, rollout in enumerate(rollouts):
        found.setdefault((rollout.prompt_ids.numpy().tobytes(), rollout.images), []).append(index)
    return sorted(found.values(), key=lambda family: len(rollouts[family[0]].prompt_ids))


def packed_microbatches(rollouts: Sequence[Rollout], max_tokens: int) -> Iterator[list[int]]:
    """Indices of at most `max_tokens` tokens together, each prompt counted once; a longer sequence comes alone."""
    batch, tokens = list[int](), 0
    for family in families(rollouts):
        prompt = len(rollouts[family[0]].prompt_ids)
        new = True
        for index in sorted(family, key=lambda i: -len(rollouts[i].response_ids)):
            response = len(rollouts[index].response_ids) - 1
            if batch and tokens + response + prompt * new > max_tokens:
                yield batch
                batch, tokens, new = [], 0, True
            batch.append(index)
            tokens += response + prompt * new
            new = False
    if batch:
        yield batch


def pack(rollouts: Sequence[Rollout]) -> Packed:
    ids, positions, blocks = list[Tensor](), list[Tensor](), list[Block]()
    before: list[Tensor] = [torch.empty(0)] * len(rollouts)
    start = 0
    for length, alike in groupby(families(rollouts), key=lambda family: len(rollouts[family[0]].prompt_ids)):
        of_block = list(alike)
        ids += [rollouts[family[0]].prompt_ids for family in of_block]
        positions += [torch.arange(length)] * len(of_block)
        place = first = start + length * len(of_block)
        prompt_of, starts, lengths = list[int](), list[int](), list[int]()
        for number, family in enumerate(of_block):
            for index in family:
                rest = rollouts[index].response_ids[:-1]
                last_of_prompt = torch.tensor([start + length * (number + 1) - 1])
                before[index] = torch.cat([last_of_prompt, torch.arange(place, place + len(rest))])
                if len(rest):
                    ids.append(rest)
                    positions.append(torch.arange(length, length + len(rest)))
                    prompt_of.append(number)
                    starts.append(place - first)
                    lengths.append(len(rest))
                    place += len(rest)
        steps_1R = torch.arange(max(lengths, default=0))[None]
        lengths_M1, starts_M1 = (torch.tensor(values, dtype=torch.long)[:, None] for values in (lengths, starts))
        places_MR = starts_M1 + torch.minimum(steps_1R, lengths_M1 - 1)
        of_responses = (torch.tensor(prompt_of, dtype=torch.long), places_MR, steps_1R < lengths_M1)
        blocks.append(Block(start, (len(of_block), length), *of_responses))
        start = place
    labels_N = torch.cat([rollout.response_ids for rollout in rollouts])
    return Packed(torch.cat(ids)[None], torch.cat(positions)[None], torch.cat(before), labels_N, tuple(blocks))


class Row:
    """What attention is told of a packed row. No tuple, since torch.compile looks into those: it would compile a block
    of the model anew for every number of prompts."""

    def __init__(self, packed: Packed) -> None:
        self.blocks, self.mask = packed.blocks, packed.mask


# --- attention ----------------------------------------------------------------------------------------------------


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Row | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of transformers' form, [1, h, L, d] each, to [1, L, h, d]; of prompts among themselves, and of
    responses to their prompt and themselves. Raises ValueError where the model wants more than that."""
    if packed is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **kwargs
        )
        return plain
    at_once = packed.mask is not None and not dropout  # of attention's weights, which FlexAttention does not have
    others = {"softcap": None if at_once else softcap, **kwargs}
    wanted = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if sliding_window is not None and _longest(packed) > sliding_window:
        wanted.append("sliding_window")
    if wanted:
        raise ValueError(f"its attention has {wanted[0]}")
    if at_once:
        attended = flex(query, key, value, packed.mask, scale=scaling, softcap=softcap)
        return attended.transpose(1, 2).contiguous(), None
    times = query.shape[1] // key.shape[1]
    heads_alike = (query, *(t.repeat_interleave(times, 1) for t in (key, value)))
    return block_by_block(*heads_alike, packed, scale=scaling, dropout_p=dropout), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _longest(row: Row) -> int:
    return max(block.prompts[1] + block.places.shape[1] for block in row.blocks)


# Of each micro-batch other blocks: it would be compiled without end.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def block_by_block(query: Tensor, key: Tensor, value: Tensor, row: Row, **options: Any) -> Tensor:
    """Of [1, h, L, d] each, to [1, L, h, d]. `options`: of `scaled_dot_product_attention`."""
    q_LHD, k_LHD, v_LHD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    outputs = list[Tensor]()
    for block in row.blocks:
        (count, length), begin, first = block.prompts, block.start, block.first_response
        of_prompts = [t[begin:first].unflatten(0, (count, length)) for t in (q_LHD, k_LHD, v_LHD)]
        outputs.append(_heads_first(of_prompts, is_causal=True, **options).flatten(0, 1))
        if block.inside.numel():
            places_MR = first + block.places
            keys_MKHD, values_MKHD = (
                torch.cat([prompt[block.prompt_of], own[places_MR]], 1)
                for prompt, own in zip(of_prompts[1:], (k_LHD, v_LHD), strict=True)
            )
            allowed_RK = places_MR.new_ones(places_MR.shape[1], keys_MKHD.shape[1], dtype=torch.bool).tril(length)
            of_responses = [q_LHD[places_MR], keys_MKHD, values_MKHD]
            attended_MRHD = _heads_first(of_responses, attn_mask=allowed_RK, **options)
            outputs.append(attended_MRHD[block.inside])
    return torch.cat(outputs)[None]


def _heads_first(tensors: Sequence[Tensor], **options: Any) -> Tensor:
    """Attention of [batch, tokens, h, d] tensors."""
    q, k, v = (tensor.transpose(1, 2) for tensor in tensors)
    return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def allow_packing(backbone: Any) -> bool:
    """Lets a transformers model take packed rows beside padded ones; False where its attention is another."""
    config = backbone.config.get_text_config()
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, packed_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        config._attn_implementation = ATTENTION
    return bool(config._attn_implementation == ATTENTION)


def attention_reach(backbone: Any) -> int | None:
    """Tokens beyond which its attention does not look back, all of its layers or some; None = it sees everything."""
    config = backbone.config.get_text_config()
    reaches = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((reach for reach in reaches if reach is not None), default=None)


def packed_inputs(packed: Packed) -> dict[str, Any]:
    """What a backbone is called with."""
    mask = packed.positions.new_ones(1, 1, 1, 1)  # of this shape it is taken as made already, and is not used
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.positions,
        "attention_mask": mask,
        "packed": Row(packed),
    }
