"""The model, its adapter, the critic."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator

from remix.config.block import Block, Fraction


class ModelSize(Block):
    """Dimensions of a hub model, so that `remix plan` can count memory without reading its config."""

    parameters: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    vocab_size: PositiveInt


class ModelConfig(Block):
    path: str
    """Hub id or directory. A path that begins with ./ or ../ is relative to the recipe's file."""
    revision: str | None = None
    """Of a hub id. Only a full commit (40 hex digits) names the same files for ever; null = whatever is newest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward passes. Trained weights are kept in float32 whatever this says."""
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    """True: run the Python files that come with the model. Read them first."""
    logits_chunk: PositiveInt = 2048
    """Tokens whose logits are in memory at a time; the backward pass computes them again."""
    size: ModelSize | None = None

    @model_validator(mode="after")
    def _no_hidden_code(self) -> Self:
        if "/" in self.attn_implementation and not self.trust_remote_code:
            raise ValueError(
                f"attn_implementation {self.attn_implementation} is a kernel of the hub, so code: set "
                "trust_remote_code to true where you trust it, or choose sdpa or eager"
            )
        return self


class NoAdapter(Block):
    type: Literal["none"] = "none"


class LoraAdapter(Block):
    type: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    """Names of matrices, or a regular expression that their whole names match."""
    rslora: bool = False
    dora: bool = False

    @field_validator("targets")
    @classmethod
    def _regular(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"not a regular expression ({error}); name the matrices in a list") from None
        return targets


class SharedCritic(Block):
    """A linear value head on the policy's own backbone."""

    type: Literal["shared"] = "shared"
    detach: bool = False
    """True: the value loss does not reach the backbone."""


class SeparateCritic(Block):
    """A backbone of its own with a value head, loaded from `path`, or from the policy's base model.

    Code that comes with a critic of its own is never run.
    """

    type: Literal["separate"] = "separate"
    path: str | None = None
    revision: str | None = None
    """Of a hub id in `path`, as `model.revision`."""

    @model_validator(mode="after")
    def _of_a_path(self) -> Self:
        if self.revision is not None and self.path is None:
            raise ValueError("revision belongs to a path: set `path` too, or leave it to model.revision")
        return self
