"""`python -m tests.faults.plant FAULT ... -- RECIPE key=value ...`: `remix.train` with something planted in it.

For faults that nothing outside the process can cause. What is planted goes through the run's real call path.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from remix import train
from remix.training.interruption import leave


def nan_gradients(updates: str) -> None:
    """The loss of these updates (counted over the run, "1,2") is NaN, as a kernel's overflow would make it."""
    from remix.training.update import Updater

    chosen, accumulate, count = {int(number) for number in updates.split(",")}, Updater.accumulate, [0]

    def planted(self: Updater, *args: Any, **keys: Any) -> dict[str, float]:
        terms = accumulate(self, *args, **keys)
        count[0] += 1
        if count[0] in chosen:
            next(p for p in self.policy.module.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan
        return terms

    Updater.accumulate = planted  # type: ignore[method-assign]


def nan_losses(updates: str) -> None:
    """The same of the loss itself, before its backward, under whatever backend."""
    from remix.training.distributed import Cluster
    from remix.training.update import Updater

    chosen, count = {int(number) for number in updates.split(",")}, [0]
    accumulate, backward = Updater.accumulate, Cluster.backward

    def counted(self: Updater, *args: Any, **keys: Any) -> dict[str, float]:
        count[0] += 1
        return accumulate(self, *args, **keys)

    def planted(self: Cluster, loss: Any) -> None:
        backward(self, loss * math.nan if count[0] in chosen else loss)

    Updater.accumulate, Cluster.backward = counted, planted  # type: ignore[method-assign]


def jumping_clock(_: str) -> None:
    """The wall clock jumps an hour ahead and back from call to call, as after a correction by the network."""
    real, calls = time.time, [0]

    def planted() -> float:
        calls[0] += 1
        return real() + (3600.0 if calls[0] % 2 else -3600.0)

    time.time = planted


def deaf_engine(_: str) -> None:
    """Weights that are sent to the engine reach it not."""
    from remix.rollout.vllm import VLLMEngine

    VLLMEngine.sync = lambda self, weights: None  # type: ignore[method-assign]


FAULTS = {
    "nan_gradients": nan_gradients,
    "nan_losses": nan_losses,
    "jumping_clock": jumping_clock,
    "deaf_engine": deaf_engine,
}

if __name__ == "__main__":
    faults, arguments = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    for fault in faults:
        name, _, options = fault.partition("=")
        FAULTS[name](options)
    leave(train.main(arguments))
