"""Which layers of a model an adapter of type `layers` trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from remix.config import LayersAdapter


def trained_layers(lm: Any, config: LayersAdapter) -> dict[str, bool]:
    """The language model's layers that are trained, by name. True: whole; False: the bias alone. Raises ValueError."""
    decoder, head = lm.get_decoder(), lm.get_output_embeddings()
    blocks = next(module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    if config.last_blocks > len(blocks):
        raise ValueError(f"adapter.last_blocks {config.last_blocks}: the model has {len(blocks)} blocks; lower it")
    if config.head and head.weight is lm.get_input_embeddings().weight:
        raise ValueError(
            "adapter.head: this model's output head is its embedding (tie_word_embeddings), which is not trained "
            "apart: set adapter.head to false, or adapter.type to none"
        )
    last = {module for block in list(blocks)[len(blocks) - config.last_blocks :] for module in block.modules()}
    within = set(decoder.modules())
    chosen: dict[str, bool] = {}
    for name, module in lm.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        norm = config.norms and module in within and "norm" in type(module).__name__.lower()
        if module in last or norm or (config.head and module is head):
            chosen[name] = True
        elif config.biases and module in within and getattr(module, "bias", None) is not None:
            chosen[name] = False
    if not chosen:
        raise ValueError("adapter: the model has no such layers (biases, norms): choose others")
    return chosen
