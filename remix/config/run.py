"""Optimiser, evaluation, checkpoints, logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from remix.config.block import Block, Fraction


class OptimizerConfig(Block):
    lr: PositiveFloat = 1e-6
    critic_lr: PositiveFloat = 1e-5
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    """Training steps, not optimiser steps."""


class EvalConfig(Block):
    every: NonNegativeInt = 10
    """Training steps between evaluations on held-out prompts; 0 = before and after only."""
    prompts: PositiveInt = 256
    samples: PositiveInt = 1
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


class CheckpointConfig(Block):
    every: NonNegativeInt = 20
    """Training steps; 0 = at the end only."""
    keep: PositiveInt = 2


class LogConfig(Block):
    completions_every: NonNegativeInt = 10
    completions: PositiveInt = 4
    reflection_patterns: tuple[str, ...] = ("wait", "let me check", "recheck", "double-check", "verify", "mistake")
    """A response that holds one of these (case ignored) counts as self-reflecting."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "swanlab", "trackio"], ...] = ("tensorboard",)
