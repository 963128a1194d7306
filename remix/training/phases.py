"""Which phase a run is in, when it ends, and the clocks that start anew with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from remix.algorithms import lambda_decay
from remix.config import (
    KLBudgetTrigger,
    LambdaSchedule,
    LengthDropTrigger,
    PhaseConfig,
    RewardPlateauTrigger,
    RolloutsTrigger,
    StepsTrigger,
    Trigger,
)

HISTORY = ("reward/mean", "response/length", "kl/reference", "rollouts")
"""The metrics that triggers read."""


@dataclass
class PhaseState:
    """Where a run stands among its phases; part of every checkpoint."""

    index: int = 0
    """Of the phase in force."""
    start_step: int = 0
    """The training step at which it began."""
    start_rollouts: int = 0
    """Rollouts generated before it began."""
    lambda_start: int = 0
    """The training step at which λ's clock started."""
    reincarnations: list[int] = field(default_factory=list)
    """The steps before which the policy reincarnated."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The metrics of the phase's steps that triggers read."""

    def record(self, metrics: Mapping[str, float]) -> None:
        self.history.append({name: metrics[name] for name in HISTORY if name in metrics})

    def advance(self, step: int, rollouts: int, *, restart_lambda: bool) -> None:
        """Enters the next phase: a reincarnation."""
        self.index += 1
        self.start_step, self.start_rollouts = step, rollouts
        self.lambda_start = step if restart_lambda else self.lambda_start
        self.reincarnations.append(step)
        self.history = []

    def lambda_at(self, step: int, schedule: LambdaSchedule | None) -> float:
        """λ of the KL-Convex constraint at a training step."""
        if schedule is None:
            return 1.0
        return lambda_decay(
            step - self.lambda_start,
            start=schedule.start,
            hold=schedule.hold,
            every=schedule.every,
            drop=schedule.drop,
            floor=schedule.floor,
        )


def ends(phase: PhaseConfig, state: PhaseState) -> Trigger | None:
    """The trigger that ends the phase now, after the steps in `state.history`."""
    return next((trigger for trigger in phase.until if _fires(trigger, state.history, state.start_rollouts)), None)


def _fires(trigger: Trigger, history: Sequence[Mapping[str, float]], start_rollouts: int) -> bool:
    if isinstance(trigger, StepsTrigger):
        return len(history) >= trigger.after
    if not history:
        return False
    if isinstance(trigger, RolloutsTrigger):
        return history[-1]["rollouts"] - start_rollouts >= trigger.after
    if isinstance(trigger, KLBudgetTrigger):
        return history[-1].get("kl/reference", 0.0) > trigger.nats  # absent where nothing was trained on
    if len(history) < 2 * trigger.window:
        return False
    name = "reward/mean" if isinstance(trigger, RewardPlateauTrigger) else "response/length"
    series = [metrics[name] for metrics in history]
    recent = fmean(series[-trigger.window :])
    if isinstance(trigger, RewardPlateauTrigger):
        return recent - fmean(series[-2 * trigger.window : -trigger.window]) < trigger.min_gain
    assert isinstance(trigger, LengthDropTrigger)
    return recent < trigger.fraction * fmean(series[: trigger.window])
