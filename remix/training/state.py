"""Where a run stands: counters and clocks, and how they and the tensors go into a checkpoint and back."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from remix import checkpoint
from remix.checkpoint import Checkpoint
from remix.config import Recipe, parse_recipe
from remix.models.policy import Policy
from remix.replay import ReplayBuffer, read_shard, shard_path
from remix.training.phases import PhaseState
from remix.training.update import Updater


@dataclass
class TrainState:
    """Plain data, saved as it is."""

    step: int = 0
    """Training steps done; the number of the next one."""
    rollouts: int = 0
    """Rollouts generated for training."""
    prompt_position: int = 0
    """Prompts taken from the stream."""
    seconds: float = 0.0
    """Wall clock of all sessions of the run."""
    base_pass_at_1: float | None = None
    pass_at_1: float | None = None
    """Last evaluated."""
    base_merged: bool = False
    """An adapter was folded into the base weights, which are therefore no longer the base model's."""
    phase: PhaseState = field(default_factory=PhaseState)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TrainState:
        return cls(**{**plain, "phase": PhaseState(**plain["phase"])})


def to_checkpoint(state: TrainState, policy: Policy, updater: Updater, replay: ReplayBuffer, recipe: str) -> Checkpoint:
    # What was the policy as this step began is the precedent of the next.
    anchors = {"reference": policy.reference, "precedent": policy.next_precedent}
    tensors = {
        "model": policy.weights(with_base=state.base_merged),
        "optimizer": checkpoint.optimizer_tensors(updater.optimizer),
        "rng": checkpoint.rng_tensors(),
    }
    tensors |= {name: snapshot for name, snapshot in anchors.items() if snapshot is not None}
    plain = {
        "state": asdict(state),
        "replay_versions": replay.versions,
        "recipe": recipe,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    return Checkpoint(plain, tensors)


def from_checkpoint(
    saved: Checkpoint, policy: Policy, updater: Updater, replay: ReplayBuffer, run_dir: Path
) -> TrainState:
    """Puts everything back in its place. Raises ValueError where the checkpoint does not fit the recipe."""
    policy.load_weights(saved.tensors["model"])
    policy.reference = _snapshot(saved, "reference")
    policy.next_precedent = _snapshot(saved, "precedent")
    checkpoint.load_optimizer(updater.optimizer, saved.tensors.get("optimizer", {}))
    checkpoint.load_rng(saved.tensors["rng"])
    for version in saved.state["replay_versions"]:
        replay.add(read_shard(shard_path(run_dir, version)), version)
    return TrainState.from_plain(saved.state["state"])


MAY_CHANGE = {"run_dir", "max_steps", "eval", "checkpoint", "log"}
"""Keys of a recipe that do not change what a run computes: how far it goes, where it lies, what it shows."""


PLACES = {"model.path", *(f"rollout.engine.{key}" for key in ("own_process", "timeout", "restarts"))}
"""Dotted keys that say where something lies or runs, not what: they may change too."""


def check_same_recipe(saved: Checkpoint, recipe: Recipe) -> None:
    """Raises ValueError naming the keys where a resumed run would not be the run that was begun."""
    before = _flat(parse_recipe(yaml.safe_load(saved.state["recipe"]), "the run's recipe").model_dump(mode="json"))
    now = _flat(recipe.model_dump(mode="json"))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise ValueError(f"--resume goes on with the recipe that the run was begun with, but {listed}")


def _flat(block: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys, without those that may change."""
    if not isinstance(block, dict | list):
        return {prefix: block}
    items = block.items() if isinstance(block, dict) else enumerate(block)
    return {
        name: value
        for key, inner in items
        if prefix or key not in MAY_CHANGE
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        if name not in PLACES
    }


def _snapshot(saved: Checkpoint, name: str) -> dict[str, Any] | None:
    return dict(saved.tensors[name]) if name in saved.tensors else None
