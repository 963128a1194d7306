"""Continual merging: what is done to adapters while one task after the other is learnt.

Adapters are snapshots: trained parameters by name. g is the global adapter, w that of the task in hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from remix.config import AlignmentConfig
from remix.merging.lora import refactor
from remix.merging.methods import (
    find_method,
    important_entries,
    misaligned_fraction,
    put_back,
    tall_mask,
    turned_entries,
)
from remix.models.adapters import load_adapter
from remix.models.policy import Policy, Snapshot

if TYPE_CHECKING:
    from remix.training.update import Updater

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW."""
ALIGNMENTS = 20
"""Of a run, where their distance is not given."""


class Alignment:
    """PAM's sign alignment (arXiv 2506.03189) of the policy in training with what it was as the run began.

    It edits weights alone, between updates and the next sampling, so it goes with every objective.
    """

    def __init__(
        self, config: AlignmentConfig, policy: Policy, updater: Updater, *, updates: int, initial: Snapshot | None
    ) -> None:
        """`policy`: as the run begins, also where it is resumed. `updates`: optimiser steps of the whole run, of which
        the distance is a share if not given. `initial`: the adapter before any training, for `importance: change`."""
        self.config = config
        self.every = config.every or max(1, updates // ALIGNMENTS)
        self._policy, self._updater = policy, updater
        self._global = {name: g for name, g in policy.snapshot().items() if takes_part(name, config)}
        changed = initial if config.importance == "change" else None
        self._important = {
            name: important_entries(
                g, share=config.share, importance=None if changed is None else (g - changed[name]).abs()
            )
            for name, g in self._global.items()
        }

    def after(self, total: int, taken: int, *, steps_left: int) -> dict[str, float]:
        """After a training step whose `taken` optimiser steps made them `total`: aligns, if one of them was a K-th and
        not among the last K of the run. Returns what was misaligned before, as metrics; {} where nothing was done."""
        due = total // self.every > (total - taken) // self.every
        return self.align() if due and steps_left * taken >= self.every else {}

    @torch.no_grad()
    def align(self) -> dict[str, float]:
        """Returns the misaligned fraction of every tensor before, and their mean."""
        fractions = dict[str, float]()
        for name, w in self._policy.module.named_parameters():
            if name not in self._global:
                continue
            g, important = self._global[name].to(w.device), self._important[name].to(w.device)
            turned = turned_entries(w, g, important)
            fractions[name] = int(turned.sum()) / max(1, int(important.sum()))
            w.copy_(put_back(w, g, turned, reset=self.config.reset))
            moments = self._updater.optimizer.state.get(w, {})
            for moment in MOMENTS:
                if moment in moments:
                    moments[moment].masked_fill_(turned, 0.0)
        by_tensor = {f"misaligned_fraction/{name.removeprefix('lm.')}": value for name, value in fractions.items()}
        return {"misaligned_fraction": _mean(fractions)} | by_tensor


def saved_snapshot(policy: Policy, folder: Path) -> Snapshot:
    """A saved adapter as a snapshot; the policy stays as it is. Raises ValueError where it is not of its kind."""
    now = policy.snapshot()
    load_adapter(policy.module.lm, folder)
    found = policy.snapshot()
    policy.load(now)
    return found


def takes_part(name: str, config: AlignmentConfig) -> bool:
    """Whether a trained parameter is aligned."""
    return "lora_" not in name or any(f"lora_{factor}" in name for factor in config.factors)


def sign_conflict(w: Snapshot, g: Snapshot, share: float) -> float:
    """The misaligned fraction of two adapters, mean over tensors."""
    return _mean({name: misaligned_fraction(w[name], g[name], share=share) for name in g})


def average_into(g: Snapshot, w: Snapshot, weight: float) -> Snapshot:
    """(1 - weight)·g + weight·w. PAM's g ← (g + w)/2 at weight 1/2; the running mean of t adapters at 1/t."""
    return {name: torch.lerp(g[name], w[name], weight) for name in g}


def merge_adapters(
    method: str,
    initial: Snapshot,
    tasks: Sequence[Snapshot],
    weights: Sequence[float],
    *,
    products: bool = False,
    **parameters: Any,
) -> Snapshot:
    """Every tensor by itself, as its change from the untrained adapter.

    `products`: of LoRAs the products B·A instead, made a LoRA of the same rank again.
    """
    function = find_method(method).function
    merged = {
        name: function(start, [task[name] - start for task in tasks], weights, **parameters)
        for name, start in initial.items()
    }
    for name_A, name_B in _factors(initial) if products else ():
        start = initial[name_B] @ initial[name_A]
        deltas = [task[name_B] @ task[name_A] - start for task in tasks]
        delta = function(start, deltas, weights, **parameters)
        merged[name_A], merged[name_B], _ = refactor(delta, initial[name_A].shape[0])
    return merged


def masked_for_task(g: Snapshot, initial: Snapshot, task: Snapshot, threshold: float) -> Snapshot:
    """What of the global adapter a task uses: initial + mask ∘ (g - initial), TALL masks (arXiv 2405.07813)."""
    return {
        name: start + tall_mask(task[name] - start, g[name] - start, threshold) * (g[name] - start)
        for name, start in initial.items()
    }


def _factors(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    for name in snapshot:
        if "lora_A" in name:
            yield name, name.replace("lora_A", "lora_B")


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
