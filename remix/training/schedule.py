"""How long each phase of a recipe may last, as far as the recipe alone can tell."""

from __future__ import annotations

import math
from collections.abc import Iterator

from remix.config import KLBudgetTrigger, PhaseConfig, Recipe, RolloutsTrigger, StepsTrigger, Trigger


def step_rollouts(recipe: Recipe, phase: PhaseConfig) -> int:
    """Fresh responses of a usual step of the phase."""
    return recipe.fresh_prompts(phase) * recipe.rollout.group_size


def first_step_rollouts(recipe: Recipe, phase: PhaseConfig, *, first: bool) -> int:
    """Fresh responses of the phase's first step: the whole batch where replay is still empty."""
    if first or recipe.reincarnation.empty_replay:
        return recipe.batch.prompts * recipe.rollout.group_size
    return step_rollouts(recipe, phase)


def phase_bounds(recipe: Recipe, phase: PhaseConfig, *, first: bool) -> tuple[int, int | None]:
    """Fewest and most steps of a phase before one of its triggers fires; most None = perhaps it never does."""
    bounds = [_fires(recipe, phase, trigger, first) for trigger in phase.until]
    if not bounds:
        return recipe.steps, recipe.steps
    latest = [most for _, most in bounds if most is not None]
    return min(least for least, _ in bounds), min(latest, default=None)


def _fires(recipe: Recipe, phase: PhaseConfig, trigger: Trigger, first: bool) -> tuple[int, int | None]:
    if isinstance(trigger, StepsTrigger):
        return trigger.after, trigger.after
    if isinstance(trigger, RolloutsTrigger):
        at_start, then = first_step_rollouts(recipe, phase, first=first), step_rollouts(recipe, phase)
        most = 1 + math.ceil(max(trigger.after - at_start, 0) / then)
        rounds = 1 + recipe.rollout.refill.max_rounds
        return 1 + math.ceil(max(trigger.after - at_start * rounds, 0) / (then * rounds)), most
    # The others compare two windows of steps.
    return (1 if isinstance(trigger, KLBudgetTrigger) else 2 * trigger.window), None


def schedules(recipe: Recipe, index: int = 0, start: int = 0) -> Iterator[tuple[int, ...]]:
    """Every extreme way of sharing the run's steps among the phases: what is linear in them is bounded by these.

    Steps beyond `recipe.last_step` are left out, phases not reached have 0.
    """
    left = recipe.steps - start
    here = max(recipe.last_step - start, 0)
    if index == len(recipe.phases) - 1:
        yield (here,)
        return
    least, most = phase_bounds(recipe, recipe.phases[index], first=index == 0)
    for length in sorted({min(least, left), left if most is None else min(most, left)}):
        for rest in schedules(recipe, index + 1, start + length):
            yield (min(length, here), *rest)
