"""Optimiser, evaluation, checkpoints, logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from remix.config.block import Block, Fraction
from remix.config.data import TaskConfig


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
    """Training steps between evaluations; 0 = before and after only."""
    before: bool = True
    """Whether there is one before the first step, which every gain is measured from."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks and suites by name, judged by their own graders; none: held-out prompts of the tasks, judged by the
    rewards."""
    tasks: tuple[TaskConfig, ...] = ()
    """Held-out prompts of these tasks, each an exam by itself; none: those of the run's own tasks, as one exam."""
    data_dir: str | None = None
    """Folder of local copies of the benchmarks; null: they come from the hub."""
    limit: PositiveInt | None = None
    """Only the first so many problems of each benchmark."""
    prompts: PositiveInt = 256
    """Held-out prompts of an exam; benchmarks are taken whole."""
    samples: PositiveInt | None = None
    """Responses to a problem. null: as the benchmark is defined; 1 for held-out prompts."""
    temperature: NonNegativeFloat | None = None
    """0 = greedy. null: as the benchmark is defined; 1 for held-out prompts."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """null: as the benchmark is defined; 1 for held-out prompts."""
    max_tokens: PositiveInt | None = None
    """Of a response; null: rollout.max_tokens."""


class CheckpointConfig(Block):
    every: NonNegativeInt = 20
    """Training steps; 0 = at the end only."""
    keep: PositiveInt = 2
    """The newest so many stay, and the best."""
    best: str | None = "eval/pass@1"
    """The metric by which one is the best; a step that improves on it is saved. null: none is kept for being best."""
    best_is: Literal["highest", "lowest"] = "highest"


class FaultConfig(Block):
    """What a run puts up with before it stops."""

    skipped_updates: NonNegativeInt = 3
    """Optimiser steps in a row that are skipped because loss or gradient is not finite; one more ends the run."""
    unscored: Fraction = 0.5
    """Share of a step's responses that the rewards may fail to score; a larger one ends the run."""
    rank_timeout: PositiveFloat = 900.0
    """Seconds that processes wait for one that does not come. What the slowest does alone has to fit in, the saving
    of a checkpoint by the first included."""
    grace: PositiveFloat = 25.0
    """Seconds from SIGTERM or Ctrl-C to the exit. What is not saved by then is sampled again when the run goes on.
    torchrun kills its processes after 30."""


class LogConfig(Block):
    completions_every: NonNegativeInt = 10
    completions: PositiveInt = 4
    reflection_patterns: tuple[str, ...] = ("wait", "let me check", "recheck", "double-check", "verify", "mistake")
    """A response that holds one of these (case ignored) counts as self-reflecting."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "swanlab", "trackio"], ...] = ("tensorboard",)
