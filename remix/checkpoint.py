"""The whole training state, atomically: safetensors and JSON, nothing of pickle.

    checkpoints/step=000040/          40 training steps are done
      state.json                      counters, phase and lineage, clocks, replay index, recipe, versions
      tensors.safetensors             model.*, reference.*, precedent.*, optimizer.*, rng.*
      manifest.json                   size and SHA-256 of both
    checkpoints/latest, best          links

Everything else that is random is named by (seed, step) and so needs no state: prompt order, draws from replay,
minibatches, sampling seeds.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from remix.durable import DamagedError, check_file, check_manifest, folder_written_whole, link
from remix.formats import NOT_READ, first_pickled

FILES = "files"
"""Of the state: files of the run directory that the checkpoint counts on, with their SHA-256."""
NAME = re.compile(r"step=\d+")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training state as it lies on disk."""

    state: Mapping[str, Any]
    """Plain data."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By section (model, reference, optimizer, ...), then by name."""


def save(run_dir: Path, step: int, checkpoint: Checkpoint, *, keep: int, best_step: int | None = None) -> Path:
    """Writes beside, then renames: a checkpoint is there whole or not at all. What stays is as `settle` has it."""
    folder = _folder(run_dir, step)
    with folder_written_whole(folder, manifest=True) as temporary:
        save_tensors(temporary / "tensors.safetensors", checkpoint.tensors)
        (temporary / "state.json").write_text(json.dumps(checkpoint.state, indent=2) + "\n", encoding="utf-8")
    settle(run_dir, keep=keep, best_step=best_step)
    return folder


def settle(run_dir: Path, *, keep: int, best_step: int | None) -> None:
    """Points `latest` and `best` at their checkpoints, and removes all but the newest `keep` and the best."""
    folders = saved(run_dir)
    best = None if best_step is None else _folder(run_dir, best_step)
    if folders:
        link(folders[-1].with_name("latest"), folders[-1].name)
    if best in folders:
        link(best.with_name("best"), best.name)
    for old in folders[:-keep]:
        if old != best:
            shutil.rmtree(old)


def saved(run_dir: Path) -> list[Path]:
    """Checkpoints, oldest first. Whether they are whole is seen when they are loaded."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step=*") if NAME.fullmatch(path.name))


def recover(run_dir: Path) -> None:
    """What a kill in the middle of saving has left: the older of two of one step is put back, half ones are removed."""
    for left_over in sorted((run_dir / "checkpoints").glob(".step=*")):
        folder = left_over.with_name(left_over.name.removeprefix(".").rpartition(".")[0])
        if left_over.suffix == ".old" and not folder.exists():
            left_over.replace(folder)
        else:
            shutil.rmtree(left_over)


def load_newest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, None where there is none at all.

    Damaged ones are passed over with a warning that names them. Raises ValueError where all are, or where another
    program's lie there.
    """
    pickled = first_pickled(run_dir / "checkpoints", ["*", "*/*"])
    if pickled is not None:
        raise ValueError(f"{pickled}: {NOT_READ}; checkpoints of this project are safetensors and JSON: move it away")
    folders = saved(run_dir)
    for folder in reversed(folders):
        try:
            return load(folder)
        except DamagedError as error:
            warn(f"checkpoint {folder} is passed over: {error}")
    if folders:
        raise ValueError(
            f"no checkpoint of {run_dir} is whole, see the warnings: put one back from a copy, or remove "
            f"{run_dir / 'checkpoints'} to begin again from step 0"
        )
    return None


def set_aside(run_dir: Path, beyond: int) -> None:
    """Renames damaged checkpoints of later steps than a run goes on from, so that they count as none of the newest."""
    for folder in saved(run_dir):
        if folder > _folder(run_dir, beyond):
            damaged = folder.with_name(f"damaged.{folder.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            folder.replace(damaged)


def load(folder: Path) -> Checkpoint:
    """Raises DamagedError where the folder, or a file that it counts on, is not what was written."""
    check_manifest(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name, digest in state.get(FILES, {}).items():
            check_file(folder.parent.parent / name, digest)
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / "tensors.safetensors").items():
            section, _, rest = name.partition(".")
            tensors.setdefault(section, {})[rest] = tensor
    except DamagedError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedError(f"it is not readable ({error})") from error
    return Checkpoint(state, tensors)


def save_tensors(path: Path, sections: Mapping[str, Mapping[str, Tensor]]) -> None:
    """One safetensors file, names `section.name`. Raises OSError."""
    try:
        save_file(_flat(sections), path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


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


def seed_generators(seed: int) -> None:
    """All of this process's random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_tensors() -> dict[str, Tensor]:
    """This process's random generators: torch's, which dropout draws from, numpy's and Python's."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    states = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"]]),
        "numpy_gauss": torch.tensor([legacy["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def load_rng(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, *words = tensors["python"].tolist()
    random.setstate((version, tuple(words), next(iter(tensors["python_gauss"].tolist()), None)))
    *key, position, has_gauss = tensors["numpy"].tolist()
    numpy_state: tuple[Any, ...] = ("MT19937", key, position, has_gauss, tensors["numpy_gauss"].item())
    np.random.set_state(numpy_state)


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step={step:06d}"


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
