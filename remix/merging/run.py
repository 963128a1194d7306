"""A merge from its request to a folder that is there whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from remix.durable import folder_written_whole, write_json, write_text
from remix.merging.adapter_output import check_adapter_output, write_adapter
from remix.merging.apply import Merge, prepare, write_model
from remix.merging.base import RECORD
from remix.merging.card import card, record
from remix.merging.request import MergeRequest
from remix.merging.statistics import Statistics, compute, own_rollouts
from remix.merging.statistics import check as check_statistics
from remix.tracking.countdown import Countdown
from remix.types import Rollout

CARD = "README.md"


def merge(request: MergeRequest, console: Console | None = None) -> dict[str, Any]:
    """Merges, and returns the record of it. Raises ValueError before anything is written."""
    return write(*check(request), console)


def check(request: MergeRequest) -> tuple[Merge, list[list[Rollout]]]:
    """All that is needed, found; and the rollouts that statistics are taken from. Raises ValueError."""
    merge = prepare(request)
    if request.save_as == "adapter":
        check_adapter_output(merge)
    rollouts = [own_rollouts(run_dir, request.samples) for run_dir in request.rollouts]
    if request.spec.statistics is not None:
        check_statistics(request.spec.statistics, merge.base, merge.parents, rollouts)
    return merge, rollouts


def write(merge: Merge, rollouts: list[list[Rollout]], console: Console | None = None) -> dict[str, Any]:
    as_adapter = merge.request.save_as == "adapter"
    tensors = len(merge.touched) if as_adapter else len(merge.base.weights.specs)
    energy: Mapping[str, float] = {}
    with ExitStack() as stack:
        total = tensors + sum(map(len, rollouts))
        countdown = stack.enter_context(Countdown(total, console=console or Console(stderr=True)))
        statistics: Statistics | None = None
        if merge.request.spec.statistics is not None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remix-merge-")))
            statistics = compute(
                merge.request.spec.statistics,
                merge.base,
                merge.parents,
                rollouts,
                merge.touched,
                scratch,
                countdown.advance,
            )
        with folder_written_whole(merge.out) as folder:
            if as_adapter:
                energy = write_adapter(merge, folder, statistics, countdown.advance)
            else:
                write_model(merge, folder, statistics, countdown.advance)
            found = record(merge, energy)
            write_json(folder / RECORD, found)
            write_text(folder / CARD, card(found, merge.request.spec.paper))
    return found
