"""What is merged: PEFT adapters and whole checkpoints, each as task vectors τ = θ − θ_0, one tensor at a time.

Shapes: O rows (outputs) and I columns (inputs) of a matrix, R the rank of a LoRA, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import regex
import torch
from torch import Tensor

from remix.merging import lora
from remix.merging.base import Base, adapter_hash, merge_record, merged_parents, model_config, weights_hash
from remix.models import files, shards
from remix.models.adapter_files import check_base, kind_of, read_config

KINDS = ("LORA", "IA3", "LN_TUNING")
"""PEFT's types that are a known change of single tensors."""
FOREIGN = ("use_qalora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
           "alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config", "monteclora_config")  # fmt: skip
"""Options of a LoRA that make it more than B·A on a weight."""
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base's own weights, so that the saved factors belong to another base."""

PREFIX = "base_model.model."
_PARTS = {
    "A": re.compile(r"(.+)\.lora_A\.weight"),
    "B": re.compile(r"(.+)\.lora_B\.weight"),
    "embedding_A": re.compile(r"(.+)\.lora_embedding_A"),
    "embedding_B": re.compile(r"(.+)\.lora_embedding_B"),
    "magnitude": re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?"),
    "ia3": re.compile(r"(.+)\.ia3_l"),
}
_COPY = re.compile(r"(.+?)(?:\.base_layer|\.ln_tuning_layers|\.modules_to_save)?\.(weight|bias)")


class Factors(NamedTuple):
    """A LoRA on one tensor: Δ = scaling · B·A."""

    A: Tensor
    """[R, I]."""
    B: Tensor
    """[O, R]."""
    scaling: float


class Parent(Protocol):
    """One of the models that are merged."""

    @property
    def path(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def kind(self) -> str:
        """`model`, or PEFT's name for the adapter."""

    @property
    def sha256(self) -> str: ...
    @property
    def touched(self) -> frozenset[str]:
        """The base's tensors that may differ; τ = 0 for the others."""

    def task_vector(self, tensor: str, base: Tensor, rows: slice | None = None) -> Tensor:
        """τ in float32 of a touched tensor, or of these rows of a whole model's; `base` is θ_0, of as many rows."""


@dataclass(frozen=True)
class ModelParent:
    path: str
    folder: Path
    sha256: str
    weights: shards.Shards
    kind: str = "model"

    @property
    def touched(self) -> frozenset[str]:
        return frozenset(self.weights.specs)

    def task_vector(self, tensor: str, base: Tensor, rows: slice | None = None) -> Tensor:
        stored = self.weights.tensor(tensor)
        return (stored if rows is None else stored[rows]).to(torch.float32, copy=True).sub_(base)


@dataclass(frozen=True)
class AdapterParent:
    path: str
    folder: Path
    sha256: str
    kind: str
    config: Mapping[str, Any]
    weights: shards.Shards
    layers: Mapping[str, Mapping[str, str]] = field(repr=False)
    """By the base's tensor: which of the adapter's tensors is its A, B, magnitude, ia3 or copy."""
    modules: Mapping[str, str] = field(repr=False)
    """By the base's tensor: the module that has it, as the adapter names it."""

    @property
    def touched(self) -> frozenset[str]:
        return frozenset(self.layers)

    @property
    def transposed(self) -> bool:
        """The base keeps its matrices as [I, O]."""
        return bool(self.config.get("fan_in_fan_out"))

    def task_vector(self, tensor: str, base: Tensor, rows: slice | None = None) -> Tensor:
        assert rows is None, "a product of factors is of the whole matrix"
        parts = self.layers[tensor]
        tau = self._read(parts["copy"]) - base if "copy" in parts else None
        if "ia3" in parts:
            l_OI = self._read(parts["ia3"])
            l_OI = l_OI.flatten() if base.dim() == 1 else l_OI.T if self.transposed else l_OI
            return base * (l_OI - 1)
        factors = self.factors(tensor)
        if factors is None:
            assert tau is not None
            return tau
        flipped, flat = self.flipped(tensor), base.flatten(1)
        if "magnitude" in parts:
            start = flat if tau is None else flat + tau.flatten(1)
            delta = lora.dora_delta(start, *factors, self._read(parts["magnitude"]), fan_in_fan_out=flipped)
        else:
            delta = lora.delta(*factors, fan_in_fan_out=flipped)
        delta = delta.reshape(base.shape)
        return delta if tau is None else delta.add_(tau)

    def factors(self, tensor: str) -> Factors | None:
        """Of a LoRA as two matrices, kernels flattened; None where the adapter has no LoRA on the tensor."""
        parts = self.layers[tensor]
        kind = "embedding_" if self.is_embedding(tensor) else ""
        if not self.is_lora(tensor):
            return None
        a, b = self._read(parts[f"{kind}A"]).flatten(1), self._read(parts[f"{kind}B"]).flatten(1)
        return Factors(a, b, self.scaling(tensor))

    def flipped(self, tensor: str) -> bool:
        """The base keeps the matrix as [I, O]."""
        return self.transposed or self.is_embedding(tensor)

    def is_embedding(self, tensor: str) -> bool:
        """Looked up rather than multiplied, so that its A and B stand the other way round."""
        return "embedding_A" in self.layers[tensor]

    def is_lora(self, tensor: str) -> bool:
        return not self.layers[tensor].keys().isdisjoint(("A", "embedding_A"))

    def scaling(self, tensor: str) -> float:
        """What B·A is multiplied by."""
        parts = self.layers[tensor]
        rank = self.weights.specs[parts["embedding_A" if self.is_embedding(tensor) else "A"]].shape[0]
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if regex.fullmatch(rf"(.*\.)?({pattern})", self.modules[tensor], timeout=1.0):  # anyone may have written it
                alpha = value
                break
        return lora.lora_scaling(rank, float(alpha), rslora=bool(self.config.get("use_rslora")))

    @property
    def max_rank(self) -> int:
        ranks = [self.weights.specs[key].shape[0] for parts in self.layers.values()
                 for part, key in parts.items() if part.endswith("A")]  # fmt: skip
        return max(ranks, default=0)

    def _read(self, key: str) -> Tensor:
        return self.weights.tensor(key).float()


def open_parents(base: Base, adapters: Sequence[str], models: Sequence[str]) -> list[Parent]:
    """Raises ValueError where one is no parent for this base, or not of the same kind as the others."""
    opened: list[Parent] = [_open_model(base, path) for path in models]
    opened += [_open_adapter(base, path) for path in adapters]
    _refuse_doubles(opened)
    for parent in opened[1:]:
        if parent.kind != opened[0].kind:
            raise ValueError(
                f"--adapters {parent.path} is of type {parent.kind}, {opened[0].path} of type {opened[0].kind}: "
                "merge adapters of one type"
            )
    return opened


def _open_model(base: Base, path: str) -> ModelParent:
    folder = files.find(path, None, files.MODEL_FILES, "--models")
    if (folder / files.ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"--models {path}: holds an adapter: give it by --adapters")
    theirs, ours = model_config(folder), base.config
    for key in ("architectures", "model_type"):
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"--models {path} is a {_spoken(theirs.get(key))}, the base {base.path} a {_spoken(ours.get(key))}: "
                "merge models that were fine-tuned from one base"
            )
    weights = shards.checkpoint(folder)
    own, others = base.weights.specs, weights.specs
    odd = [*(own.keys() - others.keys()), *(others.keys() - own.keys())]
    if odd:
        where = "only in the base" if odd[0] in own else "not in the base"
        raise ValueError(f"--models {path}: {len(odd)} tensors are on one side only; {min(odd)} is {where}")
    for name, spec in own.items():
        if others[name].shape != spec.shape:
            raise ValueError(
                f"--models {path}: {name} has shape {[*others[name].shape]}, in the base {[*spec.shape]}: "
                "merge models that were fine-tuned from one base"
            )
    sha256 = weights_hash(folder)
    _refuse_contained(base, path, sha256)
    return ModelParent(path, folder, sha256, weights)


def _open_adapter(base: Base, path: str) -> AdapterParent:
    folder, what = files.find(path, None, files.ADAPTER_FILES, "--adapters"), f"--adapters {path}"
    config = read_config(folder, what)
    sha256, kind = adapter_hash(folder), kind_of(config).upper()
    _refuse_contained(base, path, sha256)
    check_base(config, what, "--base", base.path, base.folder)
    try:
        _check_recorded(base, config.get("base_model_name_or_path"), merge_record(folder))
        _refuse_foreign(kind, config)
        weights = shards.adapter(folder)
        layers, modules = _layers(base, weights)
        parent = AdapterParent(path, folder, sha256, kind, config, weights, layers, modules)
        for tensor in layers:
            _check_layer(base, parent, tensor)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return parent


def _refuse_contained(base: Base, path: str, sha256: str) -> None:
    record = merge_record(base.folder)
    for known, digest in merged_parents(record):
        if record is not None and digest == sha256:
            raise ValueError(
                f"{path} is in the base {base.path} already, which is a merge of it (as {known}): "
                f"merge onto {record['base']['path']}"
            )


def _refuse_doubles(parents: Sequence[Parent]) -> None:
    """One parent may hold another."""
    paths = {parent.sha256: parent.path for parent in parents}
    if len(paths) < len(parents):
        twice = next(parent for parent in parents if paths[parent.sha256] != parent.path)
        raise ValueError(f"{twice.path} and {paths[twice.sha256]} are the same: name it once, with their weights added")
    for parent in parents:
        held = next(
            (paths[digest] for _, digest in merged_parents(merge_record(parent.folder)) if digest in paths), None
        )
        if held is not None:
            raise ValueError(f"{parent.path} is a merge that holds {held} already: leave out the one or the other")


def _check_recorded(base: Base, recorded: str | None, own: Mapping[str, Any] | None) -> None:
    """By hashes, where a merge has left them: a name does not tell a model from a merge that bears it."""
    merged = merge_record(base.folder)
    if own is not None:
        if own["base"]["sha256"] != base.sha256:
            raise ValueError(f"it was merged for other weights than those of {base.path}: give --base {recorded}")
    elif merged is not None and not (
        recorded and Path(recorded).is_dir()
    ):  # by name alone it may mean the model before
        raise ValueError(
            f"it was trained on {recorded or 'an unnamed model'}, and {base.path} is already merged: onto it go "
            f"adapters that were trained on it; give --base {merged['base']['path']} and all adapters at once"
        )


def _refuse_foreign(kind: str, config: Mapping[str, Any]) -> None:
    if kind not in KINDS:
        raise ValueError(f"an adapter of type {kind} has no task vectors to merge; these have: {', '.join(KINDS)}")
    foreign = [option for option in FOREIGN if config.get(option)] if kind == "LORA" else []
    if foreign:
        raise ValueError(
            f"its {foreign[0]} makes it more than a product B·A, which is not merged: fold it in with PEFT"
        )
    start = str(config.get("init_lora_weights"))
    if kind == "LORA" and start.startswith(MOVES_BASE):
        raise ValueError(
            f"it was initialised by {start}, which changes the base: convert it where it was trained, by "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _layers(base: Base, weights: shards.Shards) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    layers: dict[str, dict[str, str]] = {}
    modules: dict[str, str] = {}
    for key in weights.specs:
        part, module, leaf = _part(key)
        tensor = _tensor_of(base, f"{module}.{leaf}")
        layers.setdefault(tensor, {})[part] = key
        modules[tensor] = module
        bias = base.naming.tensors.get(f"{module}.bias")
        if part == "ia3" and bias is not None and weights.specs[key].shape[-1] == 1:  # outputs are scaled, bias and all
            layers.setdefault(bias, {})[part] = key
            modules[bias] = module
    if not layers:
        raise ValueError("it holds no weights")
    return layers, modules


def _part(key: str) -> tuple[str, str, str]:
    """What an adapter's tensor is, the module that it changes, and the module's parameter."""
    name = key.removeprefix(PREFIX)
    for part, pattern in _PARTS.items():
        if found := pattern.fullmatch(name):
            return part, found[1], "weight"
    copied = _COPY.fullmatch(name)
    if copied is None:
        raise ValueError(f"its {key} is no change of a weight that is known here")
    return "copy", copied[1], copied[2]


def _tensor_of(base: Base, parameter: str) -> str:
    if parameter in base.naming.tied:
        raise ValueError(
            f"it changes {parameter}, which the base shares with another layer, so that a merge would change both: "
            "give it and the base untied (tie_word_embeddings: false, lm_head.weight in the checkpoint)"
        )
    if parameter not in base.naming.tensors:
        raise ValueError(
            f"it changes {parameter}, and the base {base.path}, a {_spoken(base.config.get('architectures'))}, has no "
            "such tensor: it was trained on another model"
        )
    return base.naming.tensors[parameter]


def _check_layer(base: Base, parent: AdapterParent, tensor: str) -> None:
    _check_shapes(base, parent, tensor)
    if parent.is_lora(tensor):
        try:
            parent.scaling(tensor)
        except (regex.error, TimeoutError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"its lora_alpha or alpha_pattern is not readable ({error})") from None


def _check_shapes(base: Base, parent: AdapterParent, tensor: str) -> None:
    shape, parts = base.weights.specs[tensor].shape, parent.layers[tensor]
    matrix = (shape[0], math.prod(shape[1:]))
    rows, columns = matrix[::-1] if parent.transposed or "embedding_A" in parts else matrix
    rank = {part[-1]: parent.weights.specs[key].shape for part, key in parts.items() if part[-1] in "AB"}
    if len(rank) == 1:
        raise ValueError(f"it holds one half of a LoRA on {tensor}; save it again")
    r = rank["A"][0] if rank else 0
    expected: dict[str, Sequence[tuple[int, ...]]] = {
        "A": [(r, columns)],
        "B": [(rows, r)],
        "embedding_A": [(r, columns)],
        "embedding_B": [(rows, r)],
        "magnitude": [(rows,)],
        "ia3": [(rows, 1), (1, columns)],
        "copy": [shape],
    }
    for part, key in parts.items():
        found = parent.weights.specs[key].shape
        flat = found if part in ("copy", "ia3") or len(found) < 2 else (found[0], math.prod(found[1:]))
        flat = (found[0] * math.prod(found[1:]),) if part == "magnitude" else flat
        if part == "ia3" and len(shape) == 1:
            continue  # a bias: checked with its matrix
        if flat not in expected[part]:
            raise ValueError(
                f"its {key} has shape {[*found]}, and {tensor} of the base {[*shape]}: it was trained on another model"
            )


def _spoken(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
