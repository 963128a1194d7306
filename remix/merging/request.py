"""What is to be merged and how: the same keys on the command line and in a recipe of YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from remix.config import Block, RecipeError
from remix.config.recipe import check_block, read_recipe
from remix.merging.methods import METHODS, Method, check_request, find_method

Plain = bool | int | float | str
PATHS = ("base", "adapters", "models", "rollouts", "data_dir")
"""Keys whose paths, where they begin with ./ or ../, are relative to the recipe's file. `out` is the caller's."""


class Override(Block):
    """Other weights and parameters for some tensors."""

    match: str
    """Names of the base's tensors, as a glob: `*.mlp.*`, `*.layers.1?.*`, `lm_head.weight`."""
    weights: tuple[float, ...] | None = None
    density: float | None = None
    params: dict[str, Plain] = Field(default_factory=dict)
    """Only those that differ."""


class MergeRequest(Block):
    base: str
    """Hub id or directory of the model that the parents were trained from."""
    adapters: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    """The parents: PEFT adapters for the base, or whole checkpoints fine-tuned from it; one kind of the two."""
    method: str
    """A name of `remix merge --list`."""
    weights: tuple[float, ...] | None = None
    """One to each parent; null = 1 for all."""
    density: float | None = None
    """Short for the method's parameter of that name."""
    params: dict[str, Plain] = Field(default_factory=dict)
    """The method's own parameters."""
    overrides: tuple[Override, ...] = ()
    """By tensor. Where several match, the last one that sets a key decides it."""
    lora_form: Literal["delta", "factors"] = "delta"
    """What of a LoRA is merged: the products B·A, or A and B each by itself, of the same rank again."""
    save_as: Literal["model", "adapter"] = "model"
    rank: PositiveInt | None = None
    """Of the adapter that the delta form is factorised to; null = the largest of the parents."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of what is written; null = as the base has each tensor. Computed is in float32."""
    shard_size: PositiveFloat = 2.0
    """GB of a file of the merged model, and so of memory for what is about to be written."""
    out: str
    rollouts: tuple[str, ...] = ()
    """For `fisher` and `regmean`: the run directory of each parent, whose rollouts it sampled itself."""
    samples: PositiveInt = 64
    """Most rollouts of each that the statistics are taken from."""
    evaluate: str | None = None
    """Suites and benchmarks, comma-separated, on which base, parents and merged model are compared."""
    data_dir: str | None = None
    """Local copies of the benchmarks; null = the hub."""
    limit: PositiveInt | None = None
    """Only the first problems of each benchmark."""

    @property
    def parents(self) -> tuple[str, ...]:
        return self.adapters or self.models

    @property
    def spec(self) -> Method:
        return METHODS[self.method]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.adapters) == bool(self.models):
            raise ValueError("name either adapters or models to merge, the one or the other")
        if len(set(self.parents)) < len(self.parents):
            raise ValueError("a parent is named twice; name it once, with the sum of its weights")
        method = find_method(self.method)
        if self.weights is not None and len(self.weights) != len(self.parents):
            raise ValueError(f"{len(self.weights)} weights for {len(self.parents)} parents; give one to each, in order")
        for overrides in ((), *((override,) for override in self.overrides)):
            setting = self._setting(overrides)
            if len(setting.weights) != len(self.parents):
                raise ValueError(
                    f"overrides: {len(setting.weights)} weights for {len(self.parents)} parents; one to each"
                )
            complete(self.method, setting)
        if (method.statistics is not None) != bool(self.rollouts):
            raise ValueError(
                f"{self.method} weighs parents by their own rollouts: give rollouts, one run directory each"
                if method.statistics
                else "rollouts are for methods with statistics of their own, fisher and regmean: leave them out"
            )
        if self.rollouts and len(self.rollouts) != len(self.parents):
            raise ValueError(f"{len(self.rollouts)} run directories in rollouts for {len(self.parents)} parents")
        if self.models and (self.lora_form == "factors" or self.save_as == "adapter"):
            raise ValueError("whole models have no factors and merge to a whole model: leave out lora_form and save_as")
        if self.lora_form == "factors" and method.statistics is not None:
            raise ValueError(f"{self.method} has statistics of whole matrices: set lora_form to delta")
        if self.rank is not None and (self.save_as, self.lora_form) != ("adapter", "delta"):
            raise ValueError(
                "rank belongs to save_as adapter with lora_form delta; otherwise it is that of the parents"
            )
        if self.evaluate is None and (self.limit or self.data_dir):
            raise ValueError("limit and data_dir belong to evaluate: name the benchmarks")
        return self

    def setting(self, tensor: str) -> Setting:
        """What holds for one tensor."""
        return self._setting([override for override in self.overrides if fnmatchcase(tensor, override.match)])

    def _setting(self, overrides: Sequence[Override]) -> Setting:
        weights = self.weights if self.weights is not None else (1.0,) * len(self.parents)
        parameters: dict[str, Any] = dict(self.params)
        if self.density is not None:
            parameters["density"] = self.density
        for override in overrides:
            weights = weights if override.weights is None else override.weights
            parameters |= override.params | ({} if override.density is None else {"density": override.density})
        return Setting(weights, parameters)


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds for one tensor."""

    weights: tuple[float, ...]
    """One to each parent, in their order."""
    parameters: Mapping[str, Any]
    """Of the method, as given; what is left out has its default."""


def complete(method: str, setting: Setting) -> dict[str, Any]:
    """The parameters with defaults filled in. Raises ValueError where weights or parameters are not the method's."""
    return check_request(method, parents=len(setting.weights), weights=setting.weights, parameters=setting.parameters)


def load_request(recipe: str | None, options: Mapping[str, Any]) -> MergeRequest:
    """A recipe's keys with the command line's over them. Raises RecipeError."""
    if recipe is None:
        return check_block(MergeRequest, dict(options), "remix merge")
    data = read_recipe(Path(recipe))
    folder = Path(recipe).parent
    for key in PATHS:
        data[key] = _anchored(data[key], folder) if key in data else None
    data = {key: value for key, value in data.items() if value is not None}
    if "adapters" in options or "models" in options:
        data = {key: value for key, value in data.items() if key not in ("adapters", "models")}
    if "out" not in data and "out" not in options:
        raise RecipeError(f"{recipe}: out is required: name the output directory there or by --out")
    return check_block(MergeRequest, {**data, **options}, recipe)


def _anchored(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_anchored(item, folder) for item in value]
    relative = isinstance(value, str) and value.startswith(("./", "../"))
    return str((folder / value).resolve()) if relative else value
