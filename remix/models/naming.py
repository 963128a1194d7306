"""The names that a model's weights have on disk, where they differ from those of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion


def as_saved(lm: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A transformers model's weights as `save_pretrained` names them, which is as its own checkpoint does; lazily."""
    for name, tensor in weights:
        yield from revert_weight_conversion(lm, {name: tensor}).items()
