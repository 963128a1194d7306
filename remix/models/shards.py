"""The tensors of a checkpoint or an adapter on disk, one at a time: nothing here holds more than is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from remix.durable import write_json
from remix.errors import first_line
from remix.models import files

WEIGHTS = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor, short of its values."""

    file: str
    """Name of the file that holds it."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Shards:
    """Safetensors files of one folder, as one mapping of names to tensors."""

    folder: Path
    files: tuple[str, ...]

    @cached_property
    def specs(self) -> Mapping[str, Spec]:
        """By name, in the order of the files. Raises ValueError where a file is damaged."""
        found: dict[str, Spec] = {}
        for file in self.files:
            try:
                with safe_open(self.folder / file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - no mapping
                        header = opened.get_slice(name)
                        dtype = _DTYPES.get(header.get_dtype())
                        if dtype is None:
                            raise ValueError(
                                f"{self.folder / file}: {name} is of type {header.get_dtype()}, which is not merged: "
                                "use the model before it was quantised"
                            )
                        found[name] = Spec(file, tuple(header.get_shape()), dtype)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / file}: not readable ({first_line(error)}); save it again") from None
        return found

    def tensor(self, name: str) -> Tensor:
        """Mapped from the disk, and given back with the last reference to it."""
        with safe_open(self.folder / self.specs[name].file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


def checkpoint(folder: Path) -> Shards:
    """A model's weights. Raises ValueError where they are not all there in safetensors."""
    files.check_weights(folder)
    if (folder / files.INDEX).is_file():
        shards = json.loads((folder / files.INDEX).read_text("utf-8"))["weight_map"].values()
        return Shards(folder, tuple(sorted(set(shards))))
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: neither {WEIGHTS} nor {files.INDEX} there, as save_pretrained writes them")
    return Shards(folder, (WEIGHTS,))


def adapter(folder: Path) -> Shards:
    """A PEFT adapter's weights. Raises ValueError where they are not there in safetensors."""
    files.check_adapter(folder)
    return Shards(folder, (files.ADAPTER_WEIGHTS,))


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """All of them in one file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write(folder: Path, specs: Mapping[str, Spec], limit: int, tensor: Callable[[str], Tensor]) -> None:
    """Asks for the tensors one after the other and writes them to files of at most `limit` bytes (one tensor may be
    larger); holds one file's worth of them at a time. With more than one file there is an index."""
    groups = _groups(specs, limit)
    count = len(groups)
    names = [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file, group in zip(names, groups, strict=True):
        save(folder / file, {name: tensor(name) for name in group})
    if count > 1:
        weight_map = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        size = sum(_bytes(spec) for spec in specs.values())
        write_json(folder / files.INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _bytes(spec: Spec) -> int:
    return spec.count * spec.dtype.itemsize


def _groups(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + _bytes(spec) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(spec)
    return groups
