"""Several processes as one: the only module that knows accelerate."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store as default_store

from remix.training.backends import Backend, asked_for, check_launch, prepare_zero
from remix.training.parcels import ALIGNMENT, Parcel, put_together, take_apart
from remix.training.stepper import Stepper, ZeroStepper
from remix.training.watchdog import Watchdog

A = TypeVar("A")
B = TypeVar("B")
TRACKED_AS = "remix"
"""The project's name at trackers."""

_KEPT: list[Any] = []
"""Process groups past their use. gloo's destructor waits for its threads and holds the interpreter's lock meanwhile,
which a thread that is just letting go of the last barrier's tensors waits for: they are left to the process's end."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def stay_on_this_machine() -> None:
    """Ranks on one machine speak over loopback alone: by themselves gloo and NCCL would choose the interface that the
    host's name leads to, which other machines may reach. To be called before the process group is made."""
    if os.environ.get("MASTER_ADDR") in LOOPBACK and Path("/sys/class/net/lo").exists():
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")


def balanced(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Indices in `parts` parts of about equal cost: the costliest first, each to the part that has least so far."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = totals.index(min(totals))
        dealt[least].append(index)
        totals[least] += costs[index]
    return [sorted(part) for part in dealt]


def _make_cpus_look_like_gpus(group: InitProcessGroupKwargs) -> None:
    """accelerate turns FSDP on for accelerators alone, and trains on each process by itself otherwise."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState(cpu=False, **group.to_kwargs())
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}


class Cluster:
    """The processes of a run. Every rank holds the same samples, prompts and decisions; work is dealt out by rank."""

    def __init__(
        self, trackers: Sequence[str] = (), project_dir: Path | None = None, *, rank_timeout: float = 1800.0
    ) -> None:
        """`project_dir`: where trackers write that write files. `rank_timeout`: seconds that ranks wait for one that
        does not come."""
        stay_on_this_machine()
        self.backend = asked_for(os.environ)
        check_launch(self.backend, os.environ)
        on_cpus = not torch.accelerator.is_available()
        # The watchdog comes first, since it knows the name of the rank that is missing.
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=2 * rank_timeout + 60))
        if on_cpus and self.backend is not Backend.DDP:
            group.backend = "gloo"
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if on_cpus and self.backend is Backend.FSDP2:
            _make_cpus_look_like_gpus(group)
        # Accumulation is ours, by token count; left to accelerate, an environment variable would divide gradients.
        self.accelerator = Accelerator(
            cpu=on_cpus and self.backend is Backend.DDP,
            log_with=list(trackers) or None,
            project_dir=project_dir,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            # Nobody changes buffers, and sending them is a wait that the watchdog does not see.
            kwargs_handlers=[group, DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        missing = set(trackers) - {str(tracker) for tracker in self.accelerator.log_with}
        if missing:
            raise ValueError(f"log.trackers: install {', '.join(sorted(missing))}, or take it out")
        self._check_what_came()
        if self.backend.is_zero:
            prepare_zero(self.accelerator.state.deepspeed_plugin, self.backend)

        self._watchdog = (
            Watchdog(self.rank, self.world_size, default_store(), rank_timeout) if self.world_size > 1 else None
        )

    def _check_what_came(self) -> None:
        """accelerate falls back to other backends without a word."""
        kinds: dict[Backend, set[Any]] = {
            Backend.DDP: {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU},
            Backend.FSDP2: {DistributedType.FSDP},
            Backend.ZERO2: {DistributedType.DEEPSPEED},
            Backend.ZERO3: {DistributedType.DEEPSPEED},
        }
        came, asked = self.accelerator.distributed_type, int(os.environ.get("WORLD_SIZE", "1"))
        if came not in kinds[self.backend] or asked != self.world_size:
            raise ValueError(
                f"launched as {self.backend.value} with {asked} processes, but accelerate made of it {came.value} with "
                f"{self.world_size}: check `distributed_type` and `use_cpu` in the accelerate configuration, or take "
                "a file of recipes/accelerate/"
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

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Stepper]:
        """The module as this backend calls it, and its optimiser; under FSDP2 and ZeRO-3 its parameters are shared out
        in place."""
        groups = [list(group["params"]) for group in optimizer.param_groups]
        with self.waiting("the hand-over of the model"):
            module, prepared = self.accelerator.prepare(module, optimizer)
        return module, ZeroStepper(module, prepared, groups) if self.backend.is_zero else Stepper(prepared)

    def waiting(self, stage: str) -> AbstractContextManager[None]:
        """What needs the other ranks; raises TrainingError that names the one that is gone."""
        return nullcontext() if self._watchdog is None else self._watchdog.waiting(stage)

    def gone(self) -> str | None:
        """Which rank has died or is stopped, where this one waits for it."""
        return None if self._watchdog is None else self._watchdog.gone()

    def forget(self) -> None:
        """Lets go of what was prepared before, so that a new optimiser does not find the old one beside it."""
        self.accelerator.free_memory()

    def share(self, items: Sequence[A], costs: Sequence[int] | None = None) -> Sequence[A]:
        """This rank's part of what all ranks hold: of about as much cost as the others', which is 1 each by default."""
        return [items[index] for index in balanced(costs or [1] * len(items), self.world_size)[self.rank]]

    def map(
        self,
        work: Callable[[Sequence[A]], Sequence[B]],
        items: Sequence[A],
        stage: str,
        costs: Sequence[int] | None = None,
    ) -> list[B]:
        """`work` over all items, each rank doing its share; every rank gets every result, in the items' order.

        `stage` says what it is, for messages. `costs`: of the items, in any unit.
        """
        shares: list[list[B]] = self.gather(list(work(self.share(items, costs))), stage)
        results: list[Any] = [None] * len(items)
        for indices, share in zip(balanced(costs or [1] * len(items), self.world_size), shares, strict=True):
            for index, result in zip(indices, share, strict=True):
                results[index] = result
        return results

    def gather(self, value: A, stage: str) -> list[A]:
        """One value of every rank."""
        if self.world_size == 1:
            return [value]
        parcel, array = take_apart(value)
        with self.waiting(stage):
            parcels: list[Parcel] = gather_object([parcel])
            longest = -(-max(parcel.num_bytes for parcel in parcels) // ALIGNMENT) * ALIGNMENT
            if longest:
                array = torch.nn.functional.pad(array, (0, longest - len(array))).to(self.device)
                array = gather(array).cpu()
        of_ranks = array.view(self.world_size, longest)
        return [
            value if rank == self.rank else put_together(parcel, of_rank)
            for rank, (parcel, of_rank) in enumerate(zip(parcels, of_ranks, strict=True))
        ]

    def any(self, value: bool, stage: str) -> bool:
        """Whether it is true on any rank."""
        return any(self.gather(value, stage))

    def check_alike(self, what: str, value: Any) -> None:
        """Raises ValueError where ranks hold different values of what has to be the same on all."""
        values = self.gather(value, what)
        odd = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        if odd is not None:
            raise ValueError(
                f"{what} of rank {odd} is not that of rank 0 ({str(values[odd])[:200]!r}, {str(values[0])[:200]!r}): "
                "start every machine with the same command, and let all see the same run directory"
            )

    def most(self, count: int, stage: str) -> int:
        """How many forwards each rank has to make where this one has `count` to make: as many as any, where they gather
        parameters or share out gradients."""
        return max(self.gather(count, stage)) if self.backend.in_step else count

    def backward(self, loss: Tensor) -> None:
        """Gradients are averaged over ranks; the loss is divided by the count of all, so it is scaled back here."""
        loss = loss * self.world_size
        if self.backend.is_zero:  # accelerate's would take the optimiser's step too
            self.accelerator.deepspeed_engine_wrapped.engine.backward(loss)
        else:
            self.accelerator.backward(loss)

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients in the last micro-batch of an optimiser step alone; under FSDP2 and ZeRO in each,
        since none of them has room for the gradients of whole parameters."""
        if self.backend.is_zero:
            module.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        if last or self.backend.in_step:
            return self.waiting("the exchange of gradients")
        return self.accelerator.no_sync(module)  # type: ignore[no-any-return]

    def start_trackers(self, run_dir: Path, recipe: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """`rows`: the metrics of a resumed run so far, which are shown again, so that no step is missing or double."""
        if self.is_main:
            shutil.rmtree(run_dir / TRACKED_AS, ignore_errors=True)  # TensorBoard's files
        self.accelerator.project_configuration.set_directories(str(run_dir))
        flat = {key: value for key, value in recipe.items() if isinstance(value, str | int | float)}
        self.accelerator.init_trackers(TRACKED_AS, config=flat)
        for row in rows:
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
            self.track(numbers, row["step"])

    def track(self, metrics: dict[str, float], step: int) -> None:
        """To every tracker by step. TensorBoard has no choice of x-axis, so there all is drawn over rollouts too."""
        self.accelerator.log(metrics, step=step)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log({f"over_rollouts/{name}": value for name, value in metrics.items()}, metrics["rollouts"])

    def barrier(self, stage: str) -> None:
        with self.waiting(stage):
            self.accelerator.wait_for_everyone()

    def stop_trackers(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.world_size > 1:  # of one process, a process group that is there is somebody else's
            _KEPT.append(torch.distributed.group.WORLD)
            self.accelerator.end_training()
