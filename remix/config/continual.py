"""Tasks one after the other, and what keeps the earlier ones from being forgotten."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from remix.config.block import Block, Fraction


class AlignmentConfig(Block):
    """Sign alignment of PAM (arXiv 2506.03189): now and then, entries of the adapter whose sign has turned against that
    of the largest entries of the adapter that the run began from go back."""

    share: Fraction = 0.5
    """p: of the entries of a tensor, those that count as important."""
    every: PositiveInt | None = None
    """K: optimiser steps between alignments; null: 1/20 of the run's. None comes within K of the end."""
    reset: Literal["global", "zero"] = "global"
    """What a turned entry becomes: what it was as the run began, or 0."""
    importance: Literal["magnitude", "change"] = "magnitude"
    """Of an entry g: |g|, or |g - initial|, which of a LoRA's A leaves out what is still its random start."""
    factors: Annotated[tuple[Literal["A", "B"], ...], Field(min_length=1)] = ("A", "B")
    """The factors of a LoRA that are aligned; other adapters are aligned whole."""
    initial: str | None = None
    """The adapter before any training, which `importance: change` compares with."""


class SequentialMethod(Block):
    """One adapter, trained on one task after the other."""

    type: Literal["sequential"] = "sequential"


class IndependentMethod(Block):
    """An adapter for every task, each used for its own alone: what forgetting is measured against."""

    type: Literal["independent"] = "independent"


class ReplayMethod(Block):
    """One adapter; beside the prompts of the task in hand, stored ones of the earlier tasks."""

    type: Literal["replay"] = "replay"
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """Of the prompts of a step, those of earlier tasks."""
    stored: PositiveInt = 64
    """Prompts kept of each earlier task."""


class MergingBlock(Block):
    start: Literal["initial", "previous"] = "initial"
    """What every task's adapter begins as: the untrained one, or the one of the task before."""
    form: Literal["factors", "delta"] = "factors"
    """What of LoRAs is merged: A and B separately, or their products, made a LoRA of the same rank again by SVD."""
    weight: PositiveFloat | None = None
    """Of each task's change; null: the method's own, 1/t for an average and 1 for the others."""


class AverageMethod(MergingBlock):
    """The mean of the adapters of all tasks so far."""

    type: Literal["average"] = "average"


class TiesMethod(MergingBlock):
    """TIES (arXiv 2306.01708) of the adapters of all tasks so far."""

    type: Literal["ties"] = "ties"
    density: Fraction = 0.2
    """Share of a task's change that is kept, its largest entries."""


class MagMaxMethod(MergingBlock):
    """MagMax (arXiv 2407.06322): of the adapters of all tasks so far, trained in sequence, the largest change wins."""

    type: Literal["magmax"] = "magmax"
    start: Literal["initial", "previous"] = "previous"


class PAMMethod(Block):
    """PAM (arXiv 2506.03189): each task's adapter begins as a copy of the global one, is aligned with it while it
    trains, and is then averaged into it."""

    type: Literal["pam"] = "pam"
    average: Literal["half", "running_mean"] = "half"
    """g ← (g + w)/2, or the mean of all w so far."""
    alignment: AlignmentConfig | None = AlignmentConfig()
    """null: averaging alone."""


class PAMTallMethod(PAMMethod):
    """PAM with a TALL mask (arXiv 2405.07813) for every task, which has to be named when the model is used."""

    type: Literal["pam+tall"] = "pam+tall"  # type: ignore[assignment]
    threshold: PositiveFloat = 0.4
    """λ: an entry belongs to a task where |τ_task| ≥ λ·|τ_global − τ_task|."""


ContinualMethod = Annotated[
    SequentialMethod
    | IndependentMethod
    | ReplayMethod
    | AverageMethod
    | TiesMethod
    | MagMaxMethod
    | PAMMethod
    | PAMTallMethod,
    Field(discriminator="type"),
]


class ContinualConfig(Block):
    """The recipe's tasks one after the other, each by `steps` training steps and with an adapter of its own."""

    order: tuple[str, ...] = ()
    """Tasks by name; none: as the recipe lists them."""
    method: ContinualMethod = PAMMethod()
    """What keeps the earlier tasks from being forgotten."""
