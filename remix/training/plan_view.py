"""The plan as a person reads it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remix.terminal import showable
from remix.training.memory import Memory
from remix.training.plan import PhasePlan, Plan, Span


def render(plan: Plan) -> RenderableType:
    return Group(
        *(Padding(part, (0, 0, 1, 1)) for part in (_header(plan), _phases(plan), _run(plan), _memory(plan.memory))),
        *(Padding(Text(f"· {showable(note)}", style="dim"), (0, 0, 0, 1)) for note in plan.notes),
    )


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.1f} {unit}"


def human_count(count: float) -> str:
    """Three digits are enough to judge by: 1.78 B, 2.29 M, 640."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if count >= size:
            return f"{count / (size if unit != ' k' else 1e3):.3g}{unit}"
    return f"{count:,}"


def between(span: Span) -> str:
    return f"{span.low:,}" if span.low == span.high else f"{span.low:,} to {span.high:,}"


def _header(plan: Plan) -> RenderableType:
    table = _table()
    table.add_row("model", Text(showable(plan.model), style="bold"))
    table.add_row("trains", f"{plan.adapter}, with {plan.advantage} advantages")
    memory = plan.memory
    if memory.parameters is not None:
        trained = f", {human_count(memory.trained)} trained" if memory.trained is not None else ""
        share = f" ({memory.share:.3%} of the policy)" if memory.share not in (None, 1.0) else ""
        table.add_row(
            "parameters", f"{human_count(memory.parameters)}{trained}{', critic included' * plan.critic}{share}"
        )
    processes = "1 process" if plan.world_size == 1 else f"{plan.world_size} processes"
    table.add_row("on", f"{processes}, sampling with {plan.engine}")
    table.add_row("which has", plan.engine_way)
    table.add_row("into", showable(plan.run_dir))
    return table


def _phases(plan: Plan) -> RenderableType:
    table = _table("phase", *(Text(f"{i + 1} {phase.type}", style="bold") for i, phase in enumerate(plan.phases)))

    def row(name: str, *cells: str, style: str = "") -> None:
        table.add_row(name, *(Text(cell, style="" if cell not in ("0", "–") else "dim") for cell in cells), style=style)

    def section(name: str) -> None:
        table.add_row("")
        table.add_row(Text(name, style="bold"))

    phases = plan.phases
    row("training steps", *map(_when, phases))
    row("ends", *("\nor ".join(phase.until) or "with the run" for phase in phases))
    section("A step's batch")
    row("prompts x responses", *(f"{phase.prompts:,} x {phase.group_size}" for phase in phases))
    row("fresh rollouts", *(f"{phase.fresh_rollouts:,}" for phase in phases), style="green")
    row("replayed rollouts", *(f"{phase.replayed_rollouts:,}" for phase in phases), style="cyan")
    if any(phase.refill_rollouts for phase in phases):
        row("refill, at most", *(f"{phase.refill_rollouts:,}" for phase in phases))
    row("tokens, at most", *(human_count(phase.tokens) for phase in phases))
    section("Scored without gradient")
    anchors = {"proximal": "by the policy", "reference": "by the reference", "precedent": "by the precedent"}
    for anchor, name in {**anchors, "critic": "by the critic"}.items():
        counts = [getattr(phase.anchor_forwards, anchor) for phase in phases]
        if any(counts):
            row(name, *(f"{count:,}" for count in counts))
    section("Its updates")
    row("passes x minibatches", *(f"{phase.utd_ratio} x {phase.minibatches}" for phase in phases))
    row("optimiser steps", *(f"{phase.optimizer_steps:,}" for phase in phases))
    row("rollouts a minibatch", *(_minibatch(phase, plan.world_size) for phase in phases))
    return table


def _when(phase: PhasePlan) -> str:
    if not phase.steps.high:
        return "not in this run"
    last = phase.start.high + phase.steps.high
    if phase.start.low == phase.start.high and phase.steps.low == phase.steps.high:
        return f"{phase.steps.high:,} ({phase.start.low:,} to {last - 1:,})"
    return between(phase.steps)


def _minibatch(phase: PhasePlan, world_size: int) -> str:
    each = f", {phase.rollouts_per_process:,} a process" if world_size > 1 else ""
    return f"{phase.rollouts_per_minibatch:,}{each}"


def _run(plan: Plan) -> RenderableType:
    table = _table(Text("The whole run", style="bold"), "")
    of_steps = f" of {plan.of_steps:,} (max_steps)" if plan.steps < plan.of_steps else ""
    table.add_row("training steps", f"{plan.steps:,}{of_steps}")
    table.add_row("optimiser steps", between(plan.optimizer_steps))
    table.add_row("rollouts", Text(between(plan.rollouts), style="bold green"))
    if plan.refill_rollouts:
        table.add_row("refill, at most", f"{plan.refill_rollouts:,}")
    table.add_row("evaluation", f"{plan.evaluations} times, {plan.evaluation_rollouts:,} rollouts")
    return table


def _memory(memory: Memory) -> RenderableType:
    table = _table(Text("Memory of a process", style="bold"), "")
    if memory.unknown:
        table.add_row("unknown", Text(showable(memory.unknown), style="yellow"))
        return table
    table.columns[1].justify = "right"
    for host in (False, True):
        items = [item for item in memory.items if item.host == host]
        for item in items:
            table.add_row(item.name, human_bytes(item.bytes))
        if items:
            total = memory.host_bytes if host else memory.device_bytes
            where = "in host memory" if host else "on its device"
            table.add_row(Text(where, style="bold"), Text(human_bytes(total), style="bold"))
    return table


def _table(*headers: str | Text) -> Table:
    table = Table(box=None, show_header=bool(headers), pad_edge=False, padding=(0, 3, 0, 0), header_style="")
    for header in headers or ("", ""):
        table.add_column(header, overflow="fold")
    table.columns[0].style = "dim"
    table.columns[0].min_width = 24
    table.columns[0].no_wrap = True
    return table
