"""From text to scores. Everything is imported on first use, since grader processes need `equivalence` alone.

RewardSuite    all rewards of a recipe: responses -> scores
GraderPool     the math grader by itself, for evaluation: responses -> verdicts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remix.rewards.base import Part, Reward
    from remix.rewards.equivalence import Grade
    from remix.rewards.pool import GraderPool
    from remix.rewards.suite import REWARDS, RewardSuite

__all__ = ["REWARDS", "Grade", "GraderPool", "Part", "Reward", "RewardSuite"]

_MODULES = {
    "REWARDS": "suite",
    "Grade": "equivalence",
    "GraderPool": "pool",
    "Part": "base",
    "Reward": "base",
    "RewardSuite": "suite",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
