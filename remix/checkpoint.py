"""The whole training state, atomically: safetensors and JSON, nothing of pickle.

    checkpoints/step=000040/          40 training steps are done
      state.json                      counters, phase and lineage, clocks, replay index, versions
      tensors.safetensors             model.*, reference.*, precedent.*, optimizer.*, rng.*

Everything else that is random is named by (seed, step) and so needs no state: prompt order, draws from replay,
minibatches, sampling seeds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from remix.formats import NOT_READ, first_pickled


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training state as it lies on disk."""

    state: Mapping[str, Any]
    """Plain data."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By section (model, reference, optimizer, ...), then by name."""


def save(run_dir: Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes beside, then renames: a checkpoint is there whole or not at all. Keeps the newest `keep`."""
    folder = run_dir / "checkpoints" / f"step={step:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_flat(checkpoint.tensors), temporary / "tensors.safetensors")
    except SafetensorError as error:
        raise OSError(f"{temporary}: {error}") from error
    (temporary / "state.json").write_text(json.dumps(checkpoint.state, indent=2) + "\n", encoding="utf-8")
    for file in temporary.iterdir():
        _sync(file)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)
    _sync(folder.parent)
    for old in saved(run_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def saved(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path.parent for path in (run_dir / "checkpoints").glob("step=*/state.json"))


def load_latest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none yet. Raises ValueError where another program's lie there."""
    pickled = first_pickled(run_dir / "checkpoints", ["*", "*/*"])
    if pickled is not None:
        raise ValueError(f"{pickled}: {NOT_READ}; checkpoints of this project are safetensors and JSON: move it away")
    folders = saved(run_dir)
    if not folders:
        return None
    state = json.loads((folders[-1] / "state.json").read_text(encoding="utf-8"))
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folders[-1] / "tensors.safetensors").items():
        section, _, rest = name.partition(".")
        tensors.setdefault(section, {})[rest] = tensor
    return Checkpoint(state, tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and counters by position of their parameter, "0.exp_avg"."""
    return {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse; the groups' settings stay those of the recipe."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def rng_tensors() -> dict[str, Tensor]:
    """torch's generators: what dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def load_rng(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _flat(sections: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """In main memory, by one name each; copied only where safetensors would refuse two on the same memory."""
    flat: dict[str, Tensor] = {}
    taken = set[int]()
    for section, tensors in sections.items():
        for name, tensor in tensors.items():
            plain = tensor.detach().cpu().contiguous()
            memory = plain.untyped_storage().data_ptr()
            flat[f"{section}.{name}"] = plain.clone() if memory in taken else plain
            taken.add(memory)
    return flat


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
