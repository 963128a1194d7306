"""The model, its adapter, the critic."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from remix.config.block import Block, Fraction


class ModelSize(Block):
    """Dimensions of a hub model, so that `remix plan` can count memory without reading its config."""

    parameters: PositiveInt
    """Of the whole model."""
    hidden_size: PositiveInt
    """Width of its blocks."""
    num_layers: PositiveInt
    """Its blocks."""
    vocab_size: PositiveInt
    """Rows of its embedding."""


class ModelConfig(Block):
    """Which model, and how it is computed."""

    path: str
    """Hub id or directory. A path that begins with ./ or ../ is relative to the recipe's file."""
    revision: str | None = None
    """Of a hub id. Only a full commit (40 hex digits) names the same files for ever; null = whatever is newest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward passes. Trained weights are kept in float32 whatever this says."""
    attn_implementation: str = "sdpa"
    """Of padded sequences and of sampling. Under sdpa packed rows are attended to by FlexAttention on a GPU where it
    gives the same log-probs and gradients there, by sdpa block by block elsewhere; under others nothing is packed."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Blocks keep their inputs alone and compute the rest again in the backward: less memory, a third more work, the
    same results. auto: where, by the plan's estimate, activations would not fit into the device's memory."""
    compile: bool = False
    """Compile the transformer's blocks for updates and log-probs, not for sampling: worth its minutes on a GPU. Results
    differ by rounding."""
    trust_remote_code: bool = False
    """True: run the Python files that come with the model. Read them first."""
    logits_chunk: PositiveInt | None = None
    """Tokens whose logits are in memory at a time; the backward pass computes them again.
    Default: as many as take 1 GiB on a GPU, 128 MiB elsewhere."""
    size: ModelSize | None = None
    """For a hub model whose config is not on this machine."""

    @model_validator(mode="after")
    def _no_hidden_code(self) -> Self:
        if "/" in self.attn_implementation and not self.trust_remote_code:
            raise ValueError(
                f"attn_implementation {self.attn_implementation} is a kernel of the hub, so code: set "
                "trust_remote_code to true where you trust it, or choose sdpa or eager"
            )
        return self


class NoAdapter(Block):
    """All weights are trained."""

    type: Literal["none"] = "none"


class AdapterBlock(Block):
    """What is trained instead of the model's own weights."""

    path: str | None = None
    """Folder of a saved PEFT adapter of this very kind to begin from; null = a fresh one. The reference is then the
    policy with this adapter. A resumed run has its weights from its checkpoint: the folder may have moved, and what
    it holds counts no longer, as long as it fits."""


class LoraAdapter(AdapterBlock):
    """Low-rank matrices beside the model's own (arXiv 2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    """Of each matrix pair B·A."""
    alpha: PositiveFloat = 32.0
    """Scale: B·A counts alpha / rank times."""
    dropout: Fraction = 0.0
    """Share of the inputs of A that are set to 0 in updates."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of matrices, or a regular expression that their whole names match."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)."""
    dora: bool = False
    """Train the magnitudes of the matrices' rows apart from their directions (arXiv 2402.09353)."""

    @field_validator("targets")
    @classmethod
    def _regular(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"not a regular expression ({error}); name the matrices in a list") from None
        return targets


class IA3Adapter(AdapterBlock):
    """(IA)³: a factor on every output of some matrices, and on every input of others (arXiv 2205.05638)."""

    type: Literal["ia3"] = "ia3"
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("k_proj", "v_proj", "down_proj")
    """Names of matrices."""
    feedforward: tuple[str, ...] = ("down_proj",)
    """Those of the targets whose inputs are scaled, not their outputs."""

    @model_validator(mode="after")
    def _of_the_targets(self) -> Self:
        stray = [name for name in self.feedforward if name not in self.targets]
        if stray:
            raise ValueError(f"feedforward '{stray[0]}' is none of the targets: add it to targets, or leave it out")
        return self


VirtualTokens = Annotated[int, Field(ge=1, le=4096)]


class PrefixAdapter(AdapterBlock):
    """Trained keys and values before the first token, in every layer (arXiv 2101.00190)."""

    type: Literal["prefix"] = "prefix"
    tokens: VirtualTokens = 4
    """Few: until they are trained, each takes the policy further from the base model."""
    init: Literal["zero", "random"] = "zero"
    """zero: at first they take attention and give nothing."""


class PromptAdapter(AdapterBlock):
    """Trained embeddings before the first token (arXiv 2104.08691)."""

    type: Literal["prompt"] = "prompt"
    tokens: VirtualTokens = 4
    """Few, as of a prefix."""
    init: Literal["random", "vocabulary"] = "random"
    """random: as wide as the model's embeddings, meaning nothing. vocabulary: the embeddings of tokens drawn at random,
    which a model may take as part of its prompt."""


class LayersAdapter(AdapterBlock):
    """Copies of some of the language model's own layers, the others frozen."""

    type: Literal["layers"] = "layers"
    last_blocks: NonNegativeInt = 2
    """The last so many transformer blocks, whole."""
    norms: bool = False
    """Every normalisation."""
    biases: bool = False
    """Every bias (BitFit, arXiv 2106.10199). The matrices that they belong to are saved along, unchanged."""
    head: bool = False
    """The output head, where it is not the embedding too."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.last_blocks or self.norms or self.biases or self.head):
            raise ValueError("nothing is left to train: set last_blocks, norms, biases or head")
        return self


AdapterConfig = Annotated[
    NoAdapter | LoraAdapter | IA3Adapter | PrefixAdapter | PromptAdapter | LayersAdapter, Field(discriminator="type")
]


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
    """Hub id or directory; null: the policy's base model."""
    revision: str | None = None
    """Of a hub id in `path`, as `model.revision`."""

    @model_validator(mode="after")
    def _of_a_path(self) -> Self:
        if self.revision is not None and self.path is None:
            raise ValueError("revision belongs to a path: set `path` too, or leave it to model.revision")
        return self
