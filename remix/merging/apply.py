"""A merge, tensor by tensor: what is in memory is one tensor of base and parents, and one file of the output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from remix.durable import write_json
from remix.merging import lora
from remix.merging.base import EVALUATION, RECORD, Base, open_base
from remix.merging.methods import METHODS, task_seed
from remix.merging.methods.arithmetic import trimmed
from remix.merging.parents import AdapterParent, Factors, Parent, open_parents
from remix.merging.request import MergeRequest, Setting, complete
from remix.merging.statistics import Statistics
from remix.models import files, shards

NOT_COPIED = (files.INDEX, RECORD, EVALUATION, "adapter_*")
"""Of the small files beside the base's weights: what speaks of those very weights."""
BLOCK = 1 << 20
"""Entries of a whole model's tensor that are merged at a time, where a method looks at each by itself. Temporaries of
four times as many are given back to the system and asked for again, which costs more than the sums."""
Progress = Callable[[int, str], None]
"""So many more tensors are done, the last of this name."""


@dataclass(frozen=True)
class Merge:
    """A request whose base and parents were found to belong together. Nothing is loaded yet."""

    request: MergeRequest
    base: Base
    parents: tuple[Parent, ...]
    """In the request's order."""
    out: Path

    @cached_property
    def touched(self) -> frozenset[str]:
        """Tensors that some parent may change."""
        return frozenset().union(*(parent.touched for parent in self.parents))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Of the parents in sums: by their contents, so that the order of a request changes no bit of the result."""
        indices = range(len(self.parents))
        return tuple(indices if self.request.spec.ordered else sorted(indices, key=lambda i: self.parents[i].sha256))

    def output_dtype(self, tensor: str) -> torch.dtype:
        stored = self.base.weights.specs[tensor].dtype
        asked = self.request.dtype
        return getattr(torch, asked) if asked and stored.is_floating_point else stored  # type: ignore[no-any-return]

    def tensor(self, name: str, statistics: Statistics | None = None) -> Tensor:
        """One tensor of the merged model, in the dtype that it is written in."""
        stored, dtype = self.base.weights.tensor(name), self.output_dtype(name)
        if name not in self.touched or not stored.is_floating_point():
            return stored.to(dtype)
        return self.merged(name, stored if stored.dtype == dtype else stored.float(), statistics).to(dtype)

    def merged(self, name: str, base: Tensor, statistics: Statistics | None = None) -> Tensor:
        """The same from the base's tensor, and in its dtype; computed in float32."""
        setting = self.request.setting(name)
        factors = self.factors(name, setting) if self.request.lora_form == "factors" else None
        if factors is not None:
            product = lora.delta(*factors, fan_in_fan_out=self.like(name).flipped(name)).reshape(base.shape)
            return torch.where(product == 0, base, (base + product).to(base.dtype))
        if self.request.models and base.dim() and entrywise(self.request.method):
            rows, merged = max(1, BLOCK // max(1, base[0].numel())), torch.empty(base.shape, dtype=base.dtype)
            keeps = self._keeps(name, base, setting)
            for start in range(0, len(base), rows):
                block = slice(start, start + rows)
                tasks = self._tasks(name, base[block], block)
                kept = None if keeps is None else [keep if keep is None else keep[block] for keep in keeps]
                merged[block] = self._by_method(name, base[block], tasks, setting, keeps=kept)
            return merged
        return self._by_method(name, base, self._tasks(name, base, None), setting, statistics)

    def _tasks(self, name: str, base: Tensor, rows: slice | None) -> list[Tensor]:
        zero = base.new_zeros((), dtype=torch.float32).expand(base.shape)
        parents = [self.parents[i] for i in self.order]
        return [parent.task_vector(name, base, rows) if name in parent.touched else zero for parent in parents]

    def _keeps(self, name: str, base: Tensor, setting: Setting) -> list[Tensor | None] | None:
        """What trimming keeps of each whole task vector, one after the other; None where the method does not trim."""
        if not self.request.spec.trims:
            return None
        density = float(complete(self.request.method, setting)["density"])
        if density >= 1:
            return [None] * len(self.parents)
        parents = [self.parents[i] for i in self.order]
        return [trimmed(parent.task_vector(name, base), density, overwrite=True) for parent in parents]

    @cached_property
    def scaling(self) -> float:
        """Of merged factors: that of the parents where all have the same, so that one by itself stays as it is."""
        found = {
            parent.scaling(name) for parent in self.parents if isinstance(parent, AdapterParent)
            for name in parent.touched if parent.is_lora(name)
        }  # fmt: skip
        return found.pop() if len(found) == 1 else 1.0

    def factors(self, name: str, setting: Setting) -> Factors | None:
        """A and B merged each by itself, smaller ranks filled up; None for a tensor that no parent has a LoRA on."""
        found = [(i, factors) for i in self.order if (factors := self._factors_of(i, name)) is not None]
        if not found:
            return None
        rank = max(factors.A.shape[0] for _, factors in found)
        scalings = [factors.scaling for _, factors in found]
        shares = self.request.spec.takes_shares(complete(self.request.method, setting))
        merged = []
        sides: tuple[tuple[Literal["A", "B"], list[Tensor]], ...] = (
            ("A", [factors.A for _, factors in found]),
            ("B", [factors.B for _, factors in found]),
        )
        for side, of_parents in sides:
            own = [lora.padded(factor, rank, side) for factor in of_parents]
            weights = [setting.weights[i] for i, _ in found]
            if shares:
                own = lora.rescaled_factors(own, scalings, scaling=self.scaling)
            else:
                weights = lora.factor_weights(weights, scalings, side, scaling=self.scaling)
            base = torch.zeros_like(own[0])
            tasks, by_parent = [base] * len(self.parents), list(setting.weights)
            for (i, _), task, weight in zip(found, own, weights, strict=True):
                tasks[self.order.index(i)], by_parent[i] = task, weight
            merged.append(self._by_method(f"{name}/{side}", base, tasks, replace(setting, weights=tuple(by_parent))))
        return Factors(merged[0], merged[1], self.scaling)

    def _by_method(
        self,
        name: str,
        base: Tensor,
        tasks: Sequence[Tensor],
        setting: Setting,
        statistics: Statistics | None = None,
        keeps: list[Tensor | None] | None = None,
    ) -> Tensor:
        method, parameters = self.request.spec, complete(self.request.method, setting)
        if keeps is not None:
            parameters["keeps"] = keeps
        if "task" in parameters:  # counted in the request's order
            parameters["task"] = self.order.index(parameters["task"])
        if method.random:
            parameters["seeds"] = [task_seed(self.request.seed, self.parents[i].sha256, name) for i in self.order]
        if method.statistics is not None:
            assert statistics is not None
            parameters[f"{method.statistics}s"] = [statistics.tensor(i, name) for i in self.order]
        try:
            return method.function(base, tasks, [setting.weights[i] for i in self.order], **parameters)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _factors_of(self, index: int, name: str) -> Factors | None:
        parent = self.parents[index]
        assert isinstance(parent, AdapterParent)
        return parent.factors(name) if name in parent.touched else None

    def like(self, name: str) -> AdapterParent:
        """A parent that touches the tensor: the others have it in the same form."""
        return next(parent for parent in self.parents if isinstance(parent, AdapterParent) and name in parent.touched)


def entrywise(method: str) -> bool:
    """An entry of the result depends on that entry of base and parents alone, and on what was kept of it before, so a
    tensor can be merged in parts."""
    return METHODS[method].trims or method in ("linear", "magmax", "tall", "consensus")


def prepare(request: MergeRequest) -> Merge:
    """Finds base and parents. Raises ValueError where they do not belong together, or the output has no place."""
    out = Path(request.out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {request.out}: in use; name a new directory, or remove that one")
    base = open_base(request.base)
    merge = Merge(request, base, tuple(open_parents(base, request.adapters, request.models)), out)
    for override in request.overrides:
        if not any(fnmatchcase(name, override.match) for name in merge.touched):
            raise ValueError(
                f"overrides: {override.match!r} matches no tensor that a parent changes; one is {min(merge.touched)}"
            )
    if request.lora_form == "factors":
        _check_factors(merge)
    return merge


def _check_factors(merge: Merge) -> None:
    """Factors can be added where all parents have them on a tensor, or none, and nothing else beside them."""
    plain = ({"A", "B"}, {"embedding_A", "embedding_B"}, {"copy"})
    for name in sorted(merge.touched):
        first = merge.like(name)
        for parent in merge.parents:
            if not isinstance(parent, AdapterParent) or name not in parent.touched:
                continue
            parts = parent.layers[name].keys()
            if parts not in plain or parts != first.layers[name].keys():
                raise ValueError(
                    f"--adapters {parent.path} changes {name} by {', '.join(sorted(parts))}, {first.path} by "
                    f"{', '.join(sorted(first.layers[name]))}; only plain LoRAs have factors to merge: choose "
                    "--lora-form delta"
                )


def write_model(merge: Merge, folder: Path, statistics: Statistics | None, progress: Progress) -> None:
    """The merged checkpoint into an empty folder, with all that came beside the base's weights."""
    specs = {name: replace(spec, dtype=merge.output_dtype(name)) for name, spec in merge.base.weights.specs.items()}

    def tensor(name: str) -> Tensor:
        merged = merge.tensor(name, statistics)
        progress(1, name)
        return merged

    with torch.no_grad():
        shards.write(folder, specs, int(merge.request.shard_size * 1e9), tensor)
    for path in sorted(
        {path for pattern in files.SMALL_FILES for path in merge.base.folder.glob(pattern) if path.is_file()}
    ):
        if not any(path.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    if merge.request.dtype is not None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        write_json(folder / "config.json", _with_dtype(config, merge.request.dtype))


def _with_dtype(config: Any, dtype: str) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") else _with_dtype(value, dtype) for key, value in config.items()
    }
