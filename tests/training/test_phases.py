"""When a phase ends, and the clocks that start anew with the next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from remix.config import (
    KLBudgetTrigger,
    LambdaSchedule,
    LengthDropTrigger,
    OnPolicyPhase,
    RewardPlateauTrigger,
    RolloutsTrigger,
    StepsTrigger,
    Trigger,
)
from remix.training.phases import PhaseState, ends


def first_firing(trigger: Trigger, steps: Sequence[dict[str, float]], **state: Any) -> int | None:
    """After how many recorded steps the trigger first ends the phase; None = never."""
    phase, at = OnPolicyPhase(until=(trigger,)), PhaseState(**state)
    for done in range(len(steps) + 1):
        if ends(phase, at) is not None:
            return done
        if done < len(steps):
            at.record(steps[done])
    return None


def rewards(*values: float) -> list[dict[str, float]]:
    return [{"reward/mean": value} for value in values]


def lengths(*values: float) -> list[dict[str, float]]:
    return [{"response/length": value} for value in values]


def test_steps() -> None:
    assert first_firing(StepsTrigger(after=3), [{}] * 5) == 3
    assert first_firing(StepsTrigger(after=6), [{}] * 5) is None


def test_rollouts_are_counted_from_the_start_of_the_phase() -> None:
    counts = [{"rollouts": total} for total in (108.0, 116.0, 124.0)]
    # 100 before the phase: 8, 16, 24 of its own.
    assert first_firing(RolloutsTrigger(after=16), counts, start_rollouts=100) == 2
    assert first_firing(RolloutsTrigger(after=17), counts, start_rollouts=100) == 3
    assert first_firing(RolloutsTrigger(after=25), counts, start_rollouts=100) is None


def test_reward_plateau() -> None:
    trigger = RewardPlateauTrigger(window=2, min_gain=0.1)
    # Windows 0, .2 and .2, .4: .3 - .1 = .2
    assert first_firing(trigger, rewards(0, 0.2, 0.2, 0.4)) is None
    assert first_firing(trigger, rewards(0.5, 0.5, 0.5)) is None, "two windows are needed"
    assert first_firing(trigger, rewards(0.5, 0.5, 0.5, 0.5)) == 4
    assert first_firing(trigger, rewards(0, 0, 1, 1, 1, 1.1)) == 6  # 1.05 - 1 = .05
    assert first_firing(trigger, rewards(0, 0, 1, 1, 2, 2, 1, 1)) == 7  # 1.5 - 1.5 = 0


def test_a_falling_reward_is_a_plateau() -> None:
    assert first_firing(RewardPlateauTrigger(window=1, min_gain=0.0), rewards(1.0, 0.9)) == 2
    assert first_firing(RewardPlateauTrigger(window=1, min_gain=0.0), rewards(1.0, 1.0, 1.1)) is None, (
        "0 is not below 0"
    )


def test_length_drop() -> None:
    trigger = LengthDropTrigger(fraction=0.5, window=2)
    # The first window holds 100 and 140: mean 120, half of it 60.
    assert first_firing(trigger, lengths(100, 140, 10)) is None, "two windows are needed"
    assert first_firing(trigger, lengths(100, 140, 60, 60)) is None, "60 is not below 60"
    assert first_firing(trigger, lengths(100, 140, 60, 58)) == 4  # 59
    assert first_firing(trigger, lengths(100, 140, 90, 90, 40, 40)) == 6  # 65 after five, 40 after six


def test_kl_budget() -> None:
    trigger = KLBudgetTrigger(nats=0.2)
    kl = [{"kl/reference": value} for value in (0.1, 0.2, 0.21)]
    assert first_firing(trigger, kl) == 3
    assert first_firing(trigger, [{"reward/mean": 0.0}]) is None, "a step that trained on nothing measured nothing"


@pytest.mark.parametrize(
    "trigger",
    [RolloutsTrigger(after=1), RewardPlateauTrigger(window=1), LengthDropTrigger(window=1), KLBudgetTrigger(nats=1.0)],
)
def test_nothing_fires_before_a_step(trigger: Trigger) -> None:
    assert ends(OnPolicyPhase(until=(trigger,)), PhaseState()) is None


def test_the_first_of_several_that_fires_is_named() -> None:
    phase = OnPolicyPhase(until=(StepsTrigger(after=9), KLBudgetTrigger(nats=0.1), StepsTrigger(after=1)))
    state = PhaseState()
    state.record({"kl/reference": 0.5})
    assert ends(phase, state) == phase.until[1]
    assert ends(OnPolicyPhase(), state) is None, "the last phase has no triggers"


def test_history_holds_what_triggers_read_and_nothing_else() -> None:
    state = PhaseState()
    state.record({"reward/mean": 1.0, "loss/policy": 3.0, "rollouts": 8.0})
    assert state.history == [{"reward/mean": 1.0, "rollouts": 8.0}]


def test_a_reincarnation_starts_the_clocks_anew() -> None:
    state = PhaseState()
    state.record({"rollouts": 64.0})
    state.advance(10, 64, restart_lambda=True)
    assert (state.index, state.start_step, state.start_rollouts, state.lambda_start) == (1, 10, 64, 10)
    assert state.history == []
    state.advance(25, 100, restart_lambda=False)
    assert (state.index, state.start_step, state.start_rollouts, state.lambda_start) == (2, 25, 100, 10)
    assert state.reincarnations == [10, 25]


def test_lambda_runs_by_its_own_clock() -> None:
    schedule = LambdaSchedule(start=1.0, hold=50, every=10, drop=0.1, floor=0.5)
    state = PhaseState()
    # 1 - 0.1 * ceil(max(t - 50, 0) / 10): t = 50 -> 1; 51 -> .9; 60 -> .9; 61 -> .8; 91 and after -> .5
    assert [state.lambda_at(t, schedule) for t in (0, 50, 51, 60, 61, 91, 1000)] == [1.0, 1.0, 0.9, 0.9, 0.8, 0.5, 0.5]
    state.advance(40, 0, restart_lambda=True)
    # t = 91 - 40 = 51
    assert [state.lambda_at(t, schedule) for t in (40, 90, 91)] == [1.0, 1.0, 0.9]
    state.advance(200, 0, restart_lambda=False)
    # t = 200 - 40 = 160
    assert state.lambda_at(200, schedule) == 0.5


def test_a_state_survives_json() -> None:
    state = PhaseState()
    state.record({"reward/mean": 0.1 + 0.2, "rollouts": 8})
    state.advance(3, 8, restart_lambda=True)
    state.record({"reward/mean": 1 / 3})
    assert PhaseState(**json.loads(json.dumps(asdict(state)))) == state
