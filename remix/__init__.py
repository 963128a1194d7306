"""ReMix: reinforcement fine-tuning that replays its rollouts.

    recipe = remix.load_recipe("recipes/embedded/remix_grpo.yaml", ["seed=1"])
    remix.run(recipe)

Names are loaded on first use: importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remix.config import Recipe, RecipeError, load_recipe
    from remix.train import run
    from remix.types import Prompt, Rollout, RolloutGroup, Sampling, Score

__version__ = "0.1.0"

__all__ = [
    "Prompt",
    "Recipe",
    "RecipeError",
    "Rollout",
    "RolloutGroup",
    "Sampling",
    "Score",
    "load_recipe",
    "run",
]

_HOMES = {
    "Prompt": "remix.types",
    "Recipe": "remix.config",
    "RecipeError": "remix.config",
    "Rollout": "remix.types",
    "RolloutGroup": "remix.types",
    "Sampling": "remix.types",
    "Score": "remix.types",
    "load_recipe": "remix.config",
    "run": "remix.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'remix' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
