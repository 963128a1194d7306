"""What ranks send each other: tensors one after another in one array, and the little that is left as an object.

A pickled tensor costs a third of a millisecond to read, whatever its length, and rollouts are thousands of short ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remix.types import Rollout, RolloutGroup

DTYPES = (torch.int64, torch.float64, torch.float32, torch.bool, torch.uint8)
"""Of the tensors that travel in the array, widest first, so that each begins where its dtype may."""
ALIGNMENT = 8
"""Bytes at whose multiples an array may begin."""
_TENSORS = tuple(field.name for field in fields(Rollout) if "Tensor" in str(field.type))


class Place(NamedTuple):
    """Stands where a tensor stood."""

    number: int


@dataclass(frozen=True, slots=True)
class Parcel:
    """A value without its tensors, and what it takes to put them back."""

    value: Any
    """The same lists, tuples, dicts and rollouts, with a Place for each tensor."""
    dtypes: tuple[int, ...]
    """Of each tensor, by its place in DTYPES."""
    lengths: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return sum(DTYPES[dtype].itemsize * length for dtype, length in zip(self.dtypes, self.lengths, strict=True))


def take_apart(value: Any) -> tuple[Parcel, Tensor]:
    """The parcel and its array, [num_bytes] uint8. What is there several times is sent once; what is no [n] tensor in
    main memory stays in the parcel."""
    tensors: list[Tensor] = []
    numbers = dict[int, int]()

    def taken(tensor: Tensor) -> Any:
        if tensor.ndim != 1 or tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
            return tensor
        if numbers.setdefault(id(tensor), len(tensors)) == len(tensors):
            tensors.append(tensor)
        return Place(numbers[id(tensor)])

    left = _changed(value, Tensor, taken)
    dtypes = tuple(DTYPES.index(tensor.dtype) for tensor in tensors)
    parts = [
        torch.cat([tensor.detach() for tensor in of_dtype]).view(torch.uint8)
        for number in range(len(DTYPES))
        if (of_dtype := [tensor for tensor, dtype in zip(tensors, dtypes, strict=True) if dtype == number])
    ]
    array = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return Parcel(left, dtypes, tuple(map(len, tensors))), array


def put_together(parcel: Parcel, array: Tensor) -> Any:
    """What was taken apart, bit for bit; its tensors lie no longer in the array."""
    tensors: list[Tensor] = [array] * len(parcel.lengths)
    start = 0
    for number, dtype in enumerate(DTYPES):
        own = [index for index, of_tensor in enumerate(parcel.dtypes) if of_tensor == number]
        if own:
            lengths = [parcel.lengths[index] for index in own]
            end = start + sum(lengths) * dtype.itemsize
            for index, tensor in zip(own, array[start:end].view(dtype).split(lengths), strict=True):
                tensors[index] = tensor.clone()
            start = end
    return _changed(parcel.value, Place, lambda place: tensors[place.number])


def _changed(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same lists, tuples, dicts and rollouts, with a change to whatever of `kind` is in them."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Rollout):
        known = {name: tensor for name in _TENSORS if (tensor := getattr(value, name)) is not None}
        return replace(value, **{name: _changed(tensor, kind, change) for name, tensor in known.items()})
    if isinstance(value, RolloutGroup):
        return replace(value, rollouts=_changed(value.rollouts, kind, change))
    if isinstance(value, list):
        return [_changed(part, kind, change) for part in value]
    if isinstance(value, tuple):
        parts = [_changed(part, kind, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, dict):
        return {key: _changed(part, kind, change) for key, part in value.items()}
    return value
