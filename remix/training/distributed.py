"""Several processes as one: the only module that knows accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import Tensor, nn

A = TypeVar("A")
B = TypeVar("B")

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def stay_on_this_machine() -> None:
    """Ranks on one machine speak over loopback alone: by themselves gloo and NCCL would choose the interface that the
    host's name leads to, which other machines may reach. To be called before the process group is made."""
    if os.environ.get("MASTER_ADDR") in LOOPBACK and Path("/sys/class/net/lo").exists():
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")


class Cluster:
    """The processes of a run. Every rank holds the same samples, prompts and decisions; work is dealt out by rank."""

    def __init__(self, trackers: Sequence[str] = (), project_dir: Path | None = None) -> None:
        stay_on_this_machine()
        # Accumulation is ours, by token count; left to accelerate, an environment variable would divide gradients.
        self.accelerator = Accelerator(
            log_with=list(trackers) or None,
            project_dir=project_dir,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        missing = set(trackers) - {str(tracker) for tracker in self.accelerator.log_with}
        if missing:
            raise ValueError(f"log.trackers: install {', '.join(sorted(missing))}, or take it out")
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError(
                "launched with mixed_precision fp16, which needs loss scaling: set it to 'no'; the "
                "recipe's model.dtype decides, bfloat16 among them"
            )
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                f"launched under {self.accelerator.distributed_type.value}: anchors need whole parameters on every "
                "process; choose recipes/accelerate/single_gpu.yaml, cpu.yaml, or a MULTI_GPU configuration"
            )
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.world_size:
            raise ValueError(
                f"launched with {asked} processes but this one sees {self.world_size}: check `distributed_type` and "
                "`use_cpu` in the accelerate configuration"
            )

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device  # type: ignore[no-any-return]

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.accelerator.prepare(module, optimizer)  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Lets go of what was prepared before, so that a new optimiser does not find the old one beside it."""
        self.accelerator.free_memory()

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
        """The gradient norm before clipping."""
        return float(self.accelerator.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm))

    def share(self, items: Sequence[A]) -> Sequence[A]:
        """This rank's part of what all ranks hold."""
        return items[self.rank :: self.world_size]

    def map(self, work: Callable[[Sequence[A]], Sequence[B]], items: Sequence[A]) -> list[B]:
        """`work` over all items, each rank doing its share; every rank gets every result, in the items' order."""
        mine = list(work(self.share(items)))
        if self.world_size == 1:
            return mine
        shares: list[list[B]] = gather_object([mine])
        results: list[Any] = [None] * len(items)
        for rank, share in enumerate(shares):
            results[rank :: self.world_size] = share
        return results

    def gather(self, value: A) -> list[A]:
        """One value of every rank."""
        return [value] if self.world_size == 1 else gather_object([value])

    def backward(self, loss: Tensor) -> None:
        """Gradients are averaged over ranks; the loss is divided by the count of all, so it is scaled back here."""
        self.accelerator.backward(loss * self.world_size)

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients in the last micro-batch of an optimiser step alone."""
        return nullcontext() if last else self.accelerator.no_sync(module)  # type: ignore[no-any-return]

    def start_trackers(self, recipe: dict[str, Any]) -> None:
        flat = {key: value for key, value in recipe.items() if isinstance(value, str | int | float)}
        self.accelerator.init_trackers("remix", config=flat)

    def track(self, metrics: dict[str, float], step: int) -> None:
        """To every tracker by step. TensorBoard has no choice of x-axis, so there all is drawn over rollouts too."""
        self.accelerator.log(metrics, step=step)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log({f"over_rollouts/{name}": value for name, value in metrics.items()}, metrics["rollouts"])

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.accelerator.end_training()
