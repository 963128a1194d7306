"""The plan as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remix.terminal import showable
from remix.training.cluster_plan import ClusterPlan
from remix.training.plan import PhasePlan, Plan, Span


def render(plan: Plan) -> RenderableType:
    return Group(
        *(Padding(part, (0, 0, 1, 1)) for part in (_header(plan), _phases(plan), _run(plan), _memory(plan))),
        *(Padding(Text(f"· {showable(note)}", style="dim"), (0, 0, 0, 1)) for note in plan.notes),
    )


def render_cluster(plan: ClusterPlan) -> RenderableType:
    """What `remix plan --cluster` adds."""
    on = plan.machines
    beside = f", and {on.samplers:,} GPUs that sample" if on.samplers else ""
    head = Text(f"On {on.nodes:,} x {on.gpus:,} GPUs{beside}", style="bold")
    parts = [head, *([_backends(plan)] if plan.backends else []), _traffic(plan)]
    notes = [
        "Bytes and tokens are upper bounds: every prompt and response as long as the recipe allows. Each formula "
        "stands with its function in remix/training/cluster_plan.py; docs/scale.md says what goes where.",
        f"A GPU is taken to achieve {on.tflops:g} TFLOP/s in forward and backward passes (tflops=).",
    ]
    return Group(
        *(Padding(part, (0, 0, 1, 1)) for part in parts),
        *(Padding(Text(f"· {note}", style="dim"), (0, 0, 0, 1)) for note in notes),
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


def _memory(plan: Plan) -> RenderableType:
    memory = plan.memory
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
    if plan.activations is None:
        return table
    kept, less = (human_bytes(count) for count in (plan.activations.kept, plan.activations.checkpointed))
    table.add_row("activations, at most", kept)
    table.add_row("if checkpointed", less)
    rows = Table.grid(padding=(0, 3, 0, 0))
    on = "on" if plan.checkpointing.on else "off"
    rows.add_row(Text("gradient checkpointing", style="dim"), f"{on}: {plan.checkpointing.why}")
    return Group(table, rows)


def _backends(plan: ClusterPlan) -> RenderableType:
    table = _table("backend", *(Text(name, style="bold") for name in plan.backends))
    found = plan.backends.values()
    for name in dict.fromkeys(item.name for backend in found for item in backend.items):
        sizes = [sum(item.bytes for item in backend.items if item.name == name) for backend in found]
        table.add_row(name, *(human_bytes(size) if size else Text("–", style="dim") for size in sizes))
    totals = {
        "on a GPU": [backend.device_bytes for backend in found],
        "in a process's host memory": [backend.host_bytes for backend in found],
        "sent in an optimiser step": [backend.exchange for backend in found],
    }
    for name, sizes in totals.items():
        table.add_row(Text(name, style="bold"), *(Text(human_bytes(size), style="bold") for size in sizes))
    return table


def _traffic(plan: ClusterPlan) -> RenderableType:
    phases, machines = plan.phases, plan.machines
    table = _table("a training step", *(Text(f"{i + 1} {phase.type}", style="bold") for i, phase in enumerate(phases)))
    table.add_row("prompts sent", *("none: all draw the same" for _ in phases))
    table.add_row("rollouts received", *(human_bytes(phase.rollouts) for phase in phases))
    table.add_row("log-probs received", *(human_bytes(phase.scores) for phase in phases))
    table.add_row("replay in host memory", *(human_bytes(phase.replay) if phase.replay else "–" for phase in phases))
    table.add_row(
        "weights to each engine", *("unknown" if plan.sync is None else human_bytes(plan.sync) for _ in phases)
    )
    table.add_row("response tokens", *(human_count(phase.tokens) for phase in phases))
    if plan.sync is None:
        return table
    samplers = machines.samplers or machines.world_size

    def rates(found: Sequence[float | None]) -> list[str]:
        return ["no rate is enough" if rate is None else f"{rate:,.0f} tokens/s, {rate / samplers:,.0f} a GPU"
                for rate in found]  # fmt: skip

    table.add_row("the trainer's part", *(f"{phase.trainer_seconds:,.3g} s" for phase in phases))
    table.add_row("samplers as fast as that", *rates([phase.rate for phase in phases]))
    if machines.seconds is not None:
        table.add_row(f"for steps of {machines.seconds:g} s", *rates([phase.rate_for_step for phase in phases]))
    return table


def _table(*headers: str | Text) -> Table:
    table = Table(box=None, show_header=bool(headers), pad_edge=False, padding=(0, 3, 0, 0), header_style="")
    for header in headers or ("", ""):
        table.add_column(header, overflow="fold")
    table.columns[0].style = "dim"
    table.columns[0].min_width = 24
    table.columns[0].no_wrap = True
    return table
