"""A merge as a PEFT adapter: the merged factors themselves, or merged deltas factorised again.

Shapes: O rows and I columns of a matrix, R the rank of the adapter, the same on every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from remix.durable import write_json
from remix.merging import lora
from remix.merging.apply import Merge, Progress
from remix.merging.parents import PREFIX, AdapterParent
from remix.merging.statistics import Statistics
from remix.models import files, shards


def check_adapter_output(merge: Merge) -> None:
    """Raises ValueError where an adapter cannot hold what is merged."""
    kinds = {parent.kind for parent in merge.parents}
    if kinds != {"LORA"}:
        raise ValueError(f"adapters of type {', '.join(kinds)} are merged into a model: choose --as model")
    loras = {merge.like(name).modules[name] for name in merge.touched if not _is_copy(merge, name)}
    if not loras:
        raise ValueError("the adapters hold copies of layers alone, and a LoRA needs one of its own: choose --as model")
    for name in sorted(merge.touched):
        if _is_copy(merge, name) and merge.like(name).modules[name] in loras:
            raise ValueError(
                f"{name} was trained beside a LoRA on its layer, which no adapter holds: choose --as model"
            )


def write_adapter(merge: Merge, folder: Path, statistics: Statistics | None, progress: Progress) -> Mapping[str, float]:
    """Writes the adapter into an empty folder. The share of each delta's energy, Σ s², that its rank keeps, by tensor;
    nothing is lost of merged factors."""
    rank = merge.request.rank or max(parent.max_rank for parent in _adapters(merge))
    dtype = getattr(torch, merge.request.dtype or "float32")
    tensors: dict[str, Tensor] = {}
    energy: dict[str, float] = {}
    saved: set[str] = set()
    with torch.no_grad():
        for name in sorted(merge.touched):
            module = merge.like(name).modules[name]
            if _is_copy(merge, name):
                saved.add(module)
            else:
                pair = _pair(merge, name, rank, statistics, energy)
                tensors |= {f"{PREFIX}{module}.{part}": tensor for part, tensor in pair.items()}
            progress(1, name)
        for module in saved:  # whole, as PEFT loads it
            for parameter, name in merge.base.naming.tensors.items():
                if parameter.rpartition(".")[0] == module:
                    tensors[f"{PREFIX}{parameter}"] = merge.tensor(name, statistics)
    shards.save(folder / files.ADAPTER_WEIGHTS, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    write_json(folder / files.ADAPTER_CONFIG, _config(merge, rank, saved))
    return energy


def _pair(
    merge: Merge, name: str, rank: int, statistics: Statistics | None, energy: dict[str, float]
) -> dict[str, Tensor]:
    """A and B of one tensor, as PEFT names and shapes them, filled up with zeros to the rank."""
    like = merge.like(name)
    if merge.request.lora_form == "factors":
        factors = merge.factors(name, merge.request.setting(name))
        assert factors is not None
        a_RI, b_OR = lora.padded(factors.A, rank, "A"), lora.padded(factors.B, rank, "B")
    else:
        base = merge.base.weights.tensor(name).float()
        delta = (merge.merged(name, base, statistics) - base).flatten(1)
        a_RI, b_OR, energy[name] = lora.refactor(delta.T if like.flipped(name) else delta, rank)
    shape = merge.base.weights.specs[name].shape
    if like.is_embedding(name):
        return {"lora_embedding_A": a_RI, "lora_embedding_B": b_OR}
    if len(shape) > 2:  # a convolution's kernels are A's
        a_RI, b_OR = a_RI.reshape(rank, *shape[1:]), b_OR.reshape(*b_OR.shape, *[1] * (len(shape) - 2))
    return {"lora_A.weight": a_RI, "lora_B.weight": b_OR}


def _config(merge: Merge, rank: int, saved: set[str]) -> dict[str, object]:
    """One rank and scaling everywhere; layers by their whole names."""
    modules = {merge.like(name).modules[name] for name in merge.touched if not _is_copy(merge, name)}
    base = merge.base
    return {
        "peft_type": "LORA",
        "task_type": _adapters(merge)[0].config.get("task_type"),
        "base_model_name_or_path": str(base.folder) if Path(base.path).is_dir() else base.path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank * (merge.scaling if merge.request.lora_form == "factors" else 1.0),
        "lora_dropout": 0.0,
        "fan_in_fan_out": _adapters(merge)[0].transposed,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": sorted(modules),
        "modules_to_save": sorted(saved) or None,
    }


def _adapters(merge: Merge) -> list[AdapterParent]:
    return [parent for parent in merge.parents if isinstance(parent, AdapterParent)]


def _is_copy(merge: Merge, name: str) -> bool:
    """No parent has a LoRA on the tensor."""
    return all(parent.layers[name].keys() == {"copy"} for parent in _adapters(merge) if name in parent.touched)
