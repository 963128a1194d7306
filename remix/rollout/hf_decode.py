"""Responses token by token, by the forward of a transformers model alone.

A step of a small model takes little longer than its matrix products: positions, masks and room are there beforehand,
and nothing is decided in between but which responses have ended.
Letters: U different prompts, P tokens of the longest, B responses in work, N responses, R most tokens of one, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remix.rollout.hf_cache import Decoding, attending, prompt_cache, worth_sharing
from remix.types import Request

LEAVE = 8
"""Responses leave the batch when one in so many has ended: that copies the keys and values of the others."""

Draw = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of logits [B, V], the requests that they are of [B], and the number of tokens that those have [B]: the next tokens
and their log-probs, [B] each."""
Further = Callable[[Sequence[Request], int], Mapping[str, Tensor]]
"""Further inputs of the forward for prompts padded on the left to a width, by argument."""


@dataclass(frozen=True, slots=True)
class Working:
    """The responses in work, [B] each."""

    number: Tensor
    """Of the request."""
    length: Tensor
    """Tokens so far, up to the end."""
    position: Tensor
    """Of the token to come."""
    ended: Tensor

    @property
    def _columns(self) -> tuple[Tensor, ...]:
        return self.number, self.length, self.position, self.ended

    def kept(self, rows: Tensor) -> Working:
        return Working(*(column[rows] for column in self._columns))

    def joined_by(self, others: Working) -> Working:
        return Working(*(torch.cat(pair) for pair in zip(self._columns, others._columns, strict=True)))


@torch.no_grad()
def decode(
    lm: Any,
    requests: Sequence[Request],
    draw: Draw,
    *,
    batch_size: int,
    max_tokens: int,
    ends: Tensor,
    pad: int,
    further: Further,
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs [N, R] of one response to each request; what follows an end is meaningless.

    `lm`: the transformers model itself, on the device where all this happens; `ends`: tokens that end a response.
    `batch_size` responses are in work at a time, and others take the places of those that have ended.
    """

    def begin(first: int, room: int) -> tuple[Working, Tensor]:
        """Those that come next, and the logits [B, V] of their first tokens."""
        asked = requests[first : first + room]
        logits_BV, position_B = _read(lm, asked, state, pad, further, ends.device)
        number_B = torch.arange(first, first + len(asked), device=ends.device)
        return Working(number_B, torch.zeros_like(number_B), position_B, number_B < 0), logits_BV

    # One column more than is asked for: a response that has all its tokens may still be in work.
    tokens_NR = torch.zeros(len(requests), max_tokens + 1, dtype=torch.long, device=ends.device)
    logprobs_NR = torch.zeros(len(requests), max_tokens + 1, device=ends.device)
    state = Decoding(shared=worth_sharing(requests))
    work, logits_BV = begin(0, batch_size)
    begun = len(work.number)
    while True:
        at = work.number, work.length
        tokens_B, logprobs_NR[at] = draw(logits_BV, *at)
        tokens_NR[at] = tokens_B
        work.length.add_(~work.ended)
        work.ended.logical_or_(torch.isin(tokens_B, ends) | (work.length == max_tokens))
        count = int(work.ended.sum())
        if count == len(work.ended) and begun == len(requests):
            return tokens_NR[:, :-1], logprobs_NR[:, :-1]
        if count * LEAVE >= len(work.ended):
            kept = (~work.ended).nonzero()[:, 0]
            state.keep(kept)
            work, tokens_B = work.kept(kept), tokens_B[kept]
        logits_BV = _next(lm, state, tokens_B, work.position) if len(tokens_B) else logits_BV[:0]
        work.position.add_(~work.ended)  # a model may have no position beyond
        if begun < len(requests) and len(tokens_B) < batch_size:
            others, theirs_BV = begin(begun, batch_size - len(tokens_B))
            work, logits_BV = work.joined_by(others), torch.cat([logits_BV, theirs_BV])
            begun += len(others.number)


def _read(
    lm: Any, requests: Sequence[Request], state: Decoding, pad: int, further: Further, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts into the state, each once for its requests: logits [B, V] of the first tokens, and their positions."""
    of_request = {(request.prompt_ids, request.images): request for request in requests}
    number = {key: place for place, key in enumerate(of_request)}
    prompt_of_B = torch.tensor([number[request.prompt_ids, request.images] for request in requests], device=device)
    ids_UP, mask_UP = padded_on_the_left([request.prompt_ids for request in of_request.values()], pad)
    seen = {name: tensor.to(device) for name, tensor in further(list(of_request.values()), ids_UP.shape[1]).items()}
    ids_UP, mask_UP = ids_UP.to(device), mask_UP.to(device)
    cache = prompt_cache()
    inputs = {"input_ids": ids_UP, "attention_mask": mask_UP, "position_ids": (mask_UP.cumsum(-1) - 1).clamp(min=0)}
    logits_UV = lm(**inputs, **seen, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    state.join(cache, mask_UP, prompt_of_B)
    return logits_UV[prompt_of_B], mask_UP.sum(-1)[prompt_of_B]


def _next(lm: Any, state: Decoding, tokens_B: Tensor, position_B: Tensor) -> Tensor:
    """Logits [B, V] of the tokens after these."""
    unused = position_B.new_ones(1, 1, 1, 1)  # of this shape it is taken as a mask made already
    at = {"input_ids": tokens_B[:, None], "position_ids": position_B[:, None], "attention_mask": unused}
    with attending(lm, state):
        logits_B1V: Tensor = lm(**at, past_key_values=state, decoding=state, use_cache=True).logits
    return logits_B1V[:, -1]


def padded_on_the_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [U, P] each."""
    width = max(map(len, prompts))
    ids_UP = torch.full((len(prompts), width), pad)
    mask_UP = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_UP[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_UP[row, width - len(prompt) :] = 1
    return ids_UP, mask_UP
