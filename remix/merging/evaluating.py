"""What was kept: base, parents and merged model on the same benchmarks, by what `remix eval` runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from remix.durable import write_json, write_text
from remix.evaluation.overrides import Overrides
from remix.evaluation.runner import EvalRequest, check, run
from remix.evaluation.subject import EngineName
from remix.merging.apply import Merge
from remix.merging.base import EVALUATION
from remix.merging.card import card, score_rows
from remix.merging.run import CARD
from remix.terminal import showable

GENERATIONS = "evaluation"
"""In the output: a folder of `remix eval` for each of those compared."""


def check_evaluation(merge: Merge, engine: EngineName) -> None:
    """Raises ValueError where base or parents cannot be evaluated; the merged model has the base's files about it."""
    for subject in _compared(merge)[:-1]:
        check(_asked(merge, engine, *subject))


def evaluate_all(merge: Merge, record: dict[str, Any], engine: EngineName) -> list[dict[str, Any]]:
    """Scores of base, parents and output, also written beside the output, and into its card."""
    request, scores = merge.request, []
    for subject in _compared(merge):
        summary = run(_asked(merge, engine, *subject))
        scores.append({"name": subject[0], **{key: summary[key] for key in ("benchmarks", "macro_average")}})
    write_json(merge.out / EVALUATION, {"scores": scores})
    write_text(merge.out / CARD, card(record, request.spec.paper, scores))
    return scores


def show(scores: Sequence[dict[str, Any]]) -> None:
    """The table, on standard output."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    head, *rows = score_rows(scores)
    for column in head:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(showable, row), style="bold" if row is rows[-1] else None)
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print("avg@k in percent: the share of correct responses", style="dim", highlight=False)


def _asked(merge: Merge, engine: EngineName, name: str, model: str, adapter: str | None) -> EvalRequest:
    request = merge.request
    words = ["remix", "eval", "--model", model, *(["--adapter", adapter] if adapter else [])]
    return EvalRequest(
        model=model,
        adapter=adapter,
        out=merge.out / GENERATIONS / name,
        benchmarks=[request.evaluate or ""],
        overrides=Overrides(limit=request.limit),
        engine=engine,
        data_dir=None if request.data_dir is None else Path(request.data_dir),
        command=shlex.join([*words, "--benchmarks", request.evaluate or "", "--engine", engine]),
    )


def _compared(merge: Merge) -> list[tuple[str, str, str | None]]:
    """Name, model, adapter."""
    base, request = merge.base.path, merge.request
    found: list[tuple[str, str, str | None]] = [("base", base, None)]
    for index, path in enumerate(request.parents):
        folder = Path(path).resolve() if Path(path).is_dir() else Path(path)
        own = folder.parent if folder.name == "final" else folder  # every run calls its model so
        name = f"{index + 1}-{own.name}"
        found.append((name, base, path) if request.adapters else (name, path, None))
    out = str(merge.out)
    return [*found, ("merged", base, out) if request.save_as == "adapter" else ("merged", out, None)]
