"""The names that a model's weights have on disk, where they differ from those of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from remix.errors import first_line


def as_saved(lm: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A transformers model's weights as `save_pretrained` names them, which is as its own checkpoint does; lazily."""
    for name, tensor in weights:
        yield from revert_weight_conversion(lm, {name: tensor}).items()


@dataclass(frozen=True, slots=True)
class Naming:
    """How the tensors of a checkpoint relate to the parameters of the module that transformers makes of it."""

    tensors: Mapping[str, str]
    """Parameter, as an adapter names it, to tensor of the checkpoint. Parameters that are made of several tensors,
    or of another arrangement of one, are not among them."""
    fused: Mapping[str, str]
    """Tensor of the checkpoint to the parameter that it is made into, rearranged, or together with others."""
    tied: frozenset[str]
    """Parameters that are one tensor under several names, such as an output head that is the embedding."""


def naming(folder: Path, tensors: Iterable[str]) -> Naming:
    """Builds the module without memory for its weights. Raises ValueError where transformers knows no such model."""
    try:
        config = AutoConfig.from_pretrained(folder)
        named: Any = getattr(transformers, (config.architectures or [""])[0], None)
        is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
        with torch.device("meta"):
            lm = named(config) if is_model else AutoModelForCausalLM.from_config(config)
        lm.tie_weights()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {folder}: its config.json names no model that transformers knows ({first_line(error)})"
        ) from error
    changes = get_model_conversion_mapping(lm)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    known = lm.state_dict()
    found: dict[str, str] = {}
    fused: dict[str, str] = {}
    for tensor in tensors:
        parameter, converted = rename_source_key(tensor, renamings, converters, lm.base_model_prefix, known)
        if converted is None and parameter in known:
            found[parameter] = tensor
        elif converted is not None:
            fused[tensor] = parameter
    names: dict[int, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = frozenset(name for shared in names.values() if len(shared) > 1 for name in shared)
    return Naming(found, fused, tied)
