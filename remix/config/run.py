"""Optimiser, evaluation, checkpoints, logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from remix.config.block import Block, Fraction
from remix.config.data import TaskConfig


class OptimizerConfig(Block):
    """AdamW, with a learning rate for the policy and one for the critic."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate of the policy."""
    critic_lr: PositiveFloat = 1e-5
    """Peak learning rate of the critic's own weights."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of the running means of gradient and squared gradient."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of a step."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled; of every trained weight."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Longest gradient, of policy and critic each by itself; a longer one is scaled down. null: any."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after warm-up: as it is, or down to 0 at `steps`, in a line or along a cosine."""
    warmup_steps: NonNegativeInt = 0
    """Over which the learning rate rises to its peak, in a line. Training steps, not optimiser steps."""


class EvalConfig(Block):
    """What the policy is evaluated on, when, and how it is sampled then."""

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
    """When training states are saved, and which are kept."""

    every: NonNegativeInt = 20
    """Training steps between two; 0 = at the end only."""
    keep: PositiveInt = 2
    """The newest so many stay, and the best."""
    best: str | None = "eval/pass@1"
    """The metric by which one is the best; a step that improves on it is saved. null: none is kept for being best."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Whether a higher or a lower value of it is better."""


class FaultConfig(Block):
    """What a run puts up with before it stops."""

    skipped_updates: NonNegativeInt = 3
    """Optimiser steps in a row that are skipped because loss or gradient is not finite; one more ends the run."""
    unscored: Fraction = 0.5
    """Share of a step's responses that the rewards may fail to score; a larger one ends the run."""
    rank_timeout: PositiveFloat = 1800.0
    """Seconds that processes wait for one that does not come. What the slowest does alone has to fit in, the saving
    of a checkpoint by the first included."""
    grace: PositiveFloat = 25.0
    """Seconds from SIGTERM or Ctrl-C to the exit. What is not saved by then is sampled again when the run goes on.
    torchrun kills its processes after 30."""


class LogConfig(Block):
    """What a run writes down for people."""

    completions_every: NonNegativeInt = 10
    """Training steps between those whose completions are written to completions.jsonl; 0 = none."""
    completions: PositiveInt = 4
    """How many prompts, each with its first response."""
    reflection_patterns: tuple[str, ...] = ("wait", "let me check", "recheck", "double-check", "verify", "mistake")
    """A response that holds one of these (case ignored) counts as self-reflecting."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "swanlab", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl. Each but tensorboard needs its own package."""
