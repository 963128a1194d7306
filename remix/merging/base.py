"""The base: the model that all parents were trained from, on disk; and the record that a merge leaves of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from remix.models import files, shards
from remix.models.tensor_names import Naming, naming

RECORD = "merge.json"
"""In a merged output: what was merged, by hashes."""
EVALUATION = "evaluation.json"
"""In a merged output: scores of base, parents and output."""


@dataclass(frozen=True)
class Base:
    path: str
    folder: Path
    weights: shards.Shards

    @cached_property
    def naming(self) -> Naming:
        """Of its tensors, as adapters name them."""
        return naming(self.folder, self.weights.specs)

    @cached_property
    def sha256(self) -> str:
        return weights_hash(self.folder)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return model_config(self.folder)


def open_base(path: str) -> Base:
    """Raises ValueError where it is no model whose weights can be merged."""
    folder = files.find(path, None, files.MODEL_FILES, "--base")
    if (folder / files.ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"--base {path}: holds an adapter, not a model: give the model that it was trained on")
    config = model_config(folder)
    if config.get("quantization_config"):
        raise ValueError(f"--base {path}: its weights are quantised, which cannot be merged: give the model before it")
    base = Base(path, folder, shards.checkpoint(folder))
    _ = base.weights.specs  # damaged files are found now
    return base


def model_config(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: no config.json, so this is no model: name the directory that holds it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: config.json is not readable: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: config.json is not readable: it holds no mapping of keys")
    return config


def weights_hash(folder: Path) -> str:
    return str(files.fingerprint(folder, ["*.safetensors"])["sha256"])


def adapter_hash(folder: Path) -> str:
    return str(files.fingerprint(folder, files.ADAPTER_FILES)["sha256"])


def merge_record(folder: Path) -> Mapping[str, Any] | None:
    """What a merge says of its output; None where the folder is none."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        _ = list(merged_parents(record))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / RECORD}: not the record of a merge ({error}); restore it, or merge again"
        ) from None
    return record  # type: ignore[no-any-return]


def merged_parents(record: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Path and hash of everything that was merged, into the output itself or into its base before."""
    while record is not None:
        yield from ((str(parent["path"]), str(parent["sha256"])) for parent in record["parents"])
        _ = str(record["base"]["path"]), str(record["base"]["sha256"])
        record = record["base"].get("merge")
