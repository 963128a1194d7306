"""Transformer blocks compiled for updates and log-probs, and left as they are for sampling."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn


def compile_blocks(backbone: Any) -> None:
    """Each block by itself, since all of a model are one graph. Lengths are symbols in it: no two rows are alike.

    Sampling alone gives a block a cache, and keeps the block as it was: its shapes change with every token. Parameters
    keep names and places.
    """
    decoder = backbone.get_decoder()
    for block in next(module for module in decoder.modules() if isinstance(module, nn.ModuleList)):
        _compile(block)


def _compile(block: Any) -> None:
    plain: Any = block.forward
    compiled: Any = torch.compile(plain, dynamic=True)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        samples = kwargs.get("past_key_values") is not None
        return plain(*args, **kwargs) if samples else compiled(*args, **kwargs)

    block.forward = forward
