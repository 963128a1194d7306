"""Whether two recipes make the same run."""

from __future__ import annotations

from typing import Any

from remix.config.recipe import Recipe

MAY_CHANGE = {"run_dir", "max_steps", "eval", "checkpoint", "faults", "log"}
"""Keys of a recipe that do not change what a run computes: how far it goes, where it lies, what it shows."""
PLACES = {
    "model.path",
    "alignment.initial",
    "adapter.path",
    *(f"rollout.engine.{key}" for key in ("own_process", "timeout", "restarts")),
    *(f"rollout.engine.{key}" for key in ("urls", "replicas", "devices", "port", "tensor_parallel")),
    *(f"rollout.engine.{key}" for key in ("transfer", "retries")),
}
"""Dotted keys that say where something lies or runs, not what: they may change too."""


def changed_keys(before: Recipe, now: Recipe) -> list[str]:
    """What makes a resumed run another one than was begun, "seed was 0, is 7"; empty where nothing does."""
    old, new = (_flat(recipe.model_dump(mode="json")) for recipe in (before, now))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed]


def _flat(block: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys, without those that may change."""
    if not isinstance(block, dict | list):
        return {prefix: block}
    items = block.items() if isinstance(block, dict) else enumerate(block)
    return {
        name: value
        for key, inner in items
        for path in [f"{prefix}.{key}" if prefix else str(key)]
        if path not in PLACES and (prefix or key not in MAY_CHANGE)
        for name, value in _flat(inner, path).items()
    }
