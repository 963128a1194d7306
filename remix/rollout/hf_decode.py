"""Responses token by token, by the forward of a transformers model alone.

A step of a small model takes little longer than its matrix products: positions, masks and room are there beforehand,
and nothing is decided in between but which responses have ended.
Letters: U different prompts, P tokens of the longest, B responses in work, N responses, R most tokens of one, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remix.rollout.hf_cache import Decoding, attending, prompt_cache
from remix.types import Request

LEAVE = 8
"""Responses leave the batch when one in so many has ended: that copies the keys and values of the others."""

Draw = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Of logits [B, V], the responses that they are of [B], and the number of tokens that those have: the next tokens and
their log-probs, [B] each."""
Further = Callable[[Sequence[Request], int], Mapping[str, Tensor]]
"""Further inputs of the forward for prompts padded on the left to a width, by argument."""


def decode(
    lm: Any, requests: Sequence[Request], draw: Draw, *, max_tokens: int, ends: Tensor, pad: int, further: Further
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs [N, R] of one response to each request; what follows an end is meaningless.

    `lm`: the transformers model itself, on the device where all this happens; `ends`: tokens that end a response.
    """
    device = ends.device
    of_request = {(request.prompt_ids, request.images): request for request in requests}
    number = {key: place for place, key in enumerate(of_request)}
    prompt_of_B = torch.tensor([number[request.prompt_ids, request.images] for request in requests], device=device)
    ids_UP, mask_UP = padded_on_the_left([request.prompt_ids for request in of_request.values()], pad)
    seen = {name: tensor.to(device) for name, tensor in further(list(of_request.values()), ids_UP.shape[1]).items()}
    ids_UP, mask_UP = ids_UP.to(device), mask_UP.to(device)
    cache = prompt_cache()
    inputs = {"input_ids": ids_UP, "attention_mask": mask_UP, "position_ids": (mask_UP.cumsum(-1) - 1).clamp(min=0)}
    logits_BV = lm(**inputs, **seen, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[prompt_of_B, -1]
    state = Decoding(cache, mask_UP, prompt_of_B)
    del cache  # its tensors go as the state takes them over

    positions_B1 = mask_UP.sum(-1, keepdim=True)[prompt_of_B]
    rows_B = torch.arange(len(requests), device=device)
    tokens_NR = torch.zeros(len(requests), max_tokens, dtype=torch.long, device=device)
    logprobs_NR = torch.zeros(len(requests), max_tokens, device=device)
    ended_B = torch.zeros(len(requests), dtype=torch.bool, device=device)
    # Of this shape it is taken as a mask made already, and is not used.
    step_inputs = {"attention_mask": positions_B1.new_ones(1, 1, 1, 1), "past_key_values": state, "decoding": state}
    with attending(lm, state), torch.inference_mode():
        for step in range(max_tokens):
            tokens_B, logprobs_NR[rows_B, step] = draw(logits_BV, rows_B, step)
            tokens_NR[rows_B, step] = tokens_B
            ended_B |= torch.isin(tokens_B, ends)
            count = int(ended_B.sum())
            if count == len(rows_B) or step + 1 == max_tokens:
                break
            if count * LEAVE >= len(rows_B):
                kept = (~ended_B).nonzero()[:, 0]
                state.keep(kept)
                rows_B, tokens_B, positions_B1, ended_B = (t[kept] for t in (rows_B, tokens_B, positions_B1, ended_B))
            at = {"input_ids": tokens_B[:, None], "position_ids": positions_B1}
            logits_BV = lm(**at, **step_inputs, use_cache=True).logits[:, -1]
            positions_B1 += 1
    return tokens_NR, logprobs_NR


def padded_on_the_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [U, P] each."""
    width = max(map(len, prompts))
    ids_UP = torch.full((len(prompts), width), pad)
    mask_UP = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_UP[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_UP[row, width - len(prompt) :] = 1
    return ids_UP, mask_UP
