"""The page: one HTML file with everything in it, which opens from disk without a network.

Whatever a model, a data set or a recipe says is text: Jinja escapes it, and the page's content security policy lets no
script run but the two that it came with, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from remix.reporting import vega
from remix.reporting.charts import Chart, of_lines, of_run
from remix.reporting.findings import findings
from remix.reporting.lines import TARGETS, Line, Reached, accuracy, algorithm, band, differing, flat, group, targets
from remix.reporting.runs import PASS_AT_1, Evaluation, Interval, Run, interval
from remix.terminal import showable
from remix.tracking.progress import clock

MOST_SAMPLED_STEPS = 6
LONGEST_TEXT = 4000
"""Characters of a sample's prompt or response."""
MOST_DIFFERENCES = 40
SIGNS = {"correct": ("good", "✓"), "wrong": ("bad", "✗")}
"""By verdict; others are neither."""


class Score(NamedTuple):
    value: float
    steps: int
    interval: Interval | None


def run_page(run: Run) -> tuple[str, list[Chart]]:
    """The page of one run, and its charts."""
    charts = of_run(run)
    scores = [_score(at) for at in run.evaluations if at.metrics.get(PASS_AT_1) is not None]
    first = scores[0] if scores and scores[0].steps == 0 else None
    page = _render(
        "run.html.jinja",
        charts,
        [run],
        title=title(run),
        story=story(run),
        run=run,
        exams=run.exams(),
        first=first,
        last=scores[-1] if scores and scores[-1].steps else None,
        found=findings(run),
        shaded=any(chart.replay for chart in charts),
        reincarnated=any(chart.reincarnations for chart in charts),
        evaluations=_evaluations(run),
        unknown_intervals=any(score.interval is None for score in scores),
        samples=_samples(run),
    )
    return page, charts


def runs_page(runs: Sequence[Run]) -> tuple[str, list[Chart]]:
    """The page of several, and its charts."""
    lines = group(runs)
    charts = of_lines(lines)
    goals = targets(lines)
    table = [_line(line, number, goals.reached[number] if goals else []) for number, line in enumerate(lines)]
    for row in table if goals else []:
        for cell, (first, own) in zip(row["goals"], zip(table[0]["goals"], row["goals"], strict=True), strict=True):
            known = first["exact"] and own["exact"] and row is not table[0]
            cell["ratio"] = f"{own['exact'] / first['exact']:.2f}×" if known else ""
    page = _render(
        "runs.html.jinja",
        charts,
        runs,
        title=f"{len(runs)} runs, {len(lines)} {'line' if len(lines) == 1 else 'lines'}",
        table=table,
        goals=goals,
        shares=TARGETS,
        differences=_differences(lines),
    )
    return page, charts


def title(run: Run) -> str:
    return " · ".join(filter(None, (algorithm(run.recipe), run.name)))


def story(run: Run) -> str:
    """One sentence for each phase."""
    model = run.recipe.get("model")
    path = model.get("path") if isinstance(model, Mapping) else None
    seed = run.recipe.get("seed")
    trained = f"Trains {'/'.join(path.split('/')[-2:])}" if isinstance(path, str) else "A run"
    parts = [f"{trained}{f' with seed {seed}' if isinstance(seed, int) else ''}."]
    kinds = {"mix_policy": "with replay", "on_policy": "on-policy"}
    for number, phase in enumerate(run.phases):
        joint = "Then the policy reincarnates: step" if number else "Step"
        which = f"s {phase.start + 1} to {phase.end}" if phase.end > phase.start + 1 else f" {phase.end}"
        rollouts = phase.rollouts_end - phase.rollouts_start
        kind = kinds.get(phase.type, phase.type)
        parts.append(f"{joint}{which} {kind}, {rollouts:,.0f} rollouts.")
    return " ".join(parts)


def percent(share: float) -> str:
    return f"{share:.1%}"


def number(value: float) -> str:
    """Three digits that count, and no exponent where none is needed."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _score(evaluation: Evaluation) -> Score:
    return Score(evaluation.metrics[PASS_AT_1] or 0.0, evaluation.steps, interval(evaluation))


def _evaluations(run: Run) -> dict[str, Any] | None:
    """The table, with the columns that some evaluation has."""
    if not run.evaluations:
        return None
    columns: list[tuple[str, str, Callable[[float], str]]] = [(PASS_AT_1, "pass@1", percent)]
    exams = run.exams()
    names = {name for at in run.evaluations for name in at.metrics}
    further = sorted(name for name in names if name.startswith(("eval/pass@", "eval/maj@")) and name != PASS_AT_1)
    columns += [(name, name.removeprefix("eval/"), percent) for name in further]
    columns += [(f"eval/{exam}/pass@1", exam, percent) for exam in exams if len(exams) > 1]
    columns += [
        ("eval/response_length", "tokens", number),
        ("eval/truncated", "cut off", percent),
        ("eval/no_answer", "no answer", percent),
        ("eval/grader_failed", "grader failed", percent),
        ("eval/self_reflection", "self-reflecting", percent),
    ]
    columns = [column for column in columns if column[0] in names]
    known = any(interval(at) for at in run.evaluations)
    best = max(run.evaluations, key=lambda at: at.metrics.get(PASS_AT_1) or 0.0)
    rows = []
    for at in run.evaluations:
        values = ((at.metrics.get(key), shown) for key, _, shown in columns)
        cells = [f"{at.steps:,}", f"{at.rollouts:,.0f}", *("–" if v is None else shown(v) for v, shown in values)]
        if known:
            bounds = interval(at)
            cells.insert(3, f"{percent(bounds.low)} to {percent(bounds.high)}" if bounds else "–")
        rows.append({"cells": cells, "best": at is best})
    head = ["after step", "rollouts", *(name for _, name, _ in columns)]
    if known:
        head.insert(3, "95% interval")
    return {"head": head, "rows": rows}


def _samples(run: Run) -> dict[int, list[dict[str, Any]]]:
    """By training steps done before they were sampled: the first, the last, and others in even distances."""
    steps = sorted({sample["step"] for sample in run.completions})
    if len(steps) > MOST_SAMPLED_STEPS:
        last = MOST_SAMPLED_STEPS - 1
        steps = [steps[round(place * (len(steps) - 1) / last)] for place in range(MOST_SAMPLED_STEPS)]
    return {step: [_sample(one) for one in run.completions if one["step"] == step] for step in steps}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    verdict, reward = str(sample.get("verdict") or "not graded"), sample.get("reward")
    colour, sign = SIGNS.get(verdict, ("", "–"))
    return {
        "verdict": verdict.replace("_", " "),
        "colour": colour,
        "class": f"{colour}-answer" if colour else "",
        "sign": sign,
        "reward": float(reward) if isinstance(reward, int | float) else None,
        "prompt": _cut(_text(sample.get("prompt"))),
        "response": _cut(_text(sample.get("response"))),
        "answer": _cut(_text(sample.get("answer"))),
    }


def _text(content: Any) -> str:
    """A prompt is a text, or messages whose contents are texts or parts."""
    if isinstance(content, list):
        return "\n".join(_text(part) for part in content)
    if isinstance(content, Mapping):
        inner = content.get("text", content.get("content"))
        said = f"[{content.get('type', 'something')}]" if inner is None else _text(inner)
        return f"{content['role']}: {said}" if "role" in content else said
    return "" if content is None else str(content)


def _cut(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    return f"{text[:LONGEST_TEXT]}… ({more:,} more characters)" if more > 0 else text


def _line(line: Line, place: int, reached: Sequence[Reached]) -> dict[str, Any]:
    mean = [point.value for point in band(line, accuracy)]
    return {
        "label": line.label,
        "key": f"line-{place % len(vega.SERIES)}",
        "rows": [_row(run) for run in line.runs],
        "recipe_text": line.runs[0].recipe_text,
        "goals": [_goal(one) for one in reached],
        "highest": percent(max(mean)) if mean else "–",
    }


def _row(run: Run) -> dict[str, Any]:
    curve = accuracy(run)
    before = curve[0].value if curve and curve[0].steps == 0 else None
    after = curve[-1].value if curve and curve[-1].steps else None
    found = findings(run)
    return {
        "cells": [
            str(run.recipe.get("seed", "–")),
            "–" if before is None else percent(before),
            "–" if after is None else percent(after),
            "–" if before is None or after is None else points(after - before),
            f"{run.rollouts:,.0f}",
            f"{run.steps:,}",
            clock(run.seconds),
        ],
        "path": str(run.path),
        "note": "" if run.result else "not finished",
        "found": found,
        "serious": sum(finding.weight == "serious" for finding in found),
    }


def _goal(reached: Reached) -> dict[str, Any]:
    """`exact` is the median, for comparisons."""
    middle, some = reached.median, reached.rollouts
    spread = f"{some[0]:,.0f} to {some[-1]:,.0f}" if len(some) > 1 else ""
    missing = f"{len(some)} of {reached.of} reached it" if len(some) < reached.of else ""
    return {
        "exact": middle,
        "median": "not reached" if middle is None else f"{middle:,.0f}",
        "range": f"({'; '.join(filter(None, (spread, missing)))})" if spread or (missing and reached.of > 1) else "",
    }


def _differences(lines: Sequence[Line]) -> list[dict[str, Any]]:
    recipes = [flat(line.runs[0].recipe) for line in lines]
    return [
        {"key": key, "values": [str(recipe.get(key, "–")) for recipe in recipes]}
        for key in differing(recipes)[:MOST_DIFFERENCES]
    ]


def points(share: float) -> str:
    return f"{100 * share:+.1f} points"


def _render(template: str, charts: Sequence[Chart], runs: Sequence[Run], **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("remix.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # All text is made safe to show, and free of credentials, on its way out.
        finalize=lambda value: showable(value) if type(value) is str else value,
    )
    shown = {"percent": percent, "number": number, "points": points, "clock": clock}
    environment.filters |= shown | {"count": lambda value: f"{value:,.0f}", "whole_percent": lambda v: f"{v:.0%}"}
    ends = vega.furthest(charts)
    library, script = vega.library(), _own("page.js")
    page: str = environment.get_template(template).render(
        charts=charts,
        drawn=[
            {
                "name": chart.name,
                "rows": vega.rows(chart),
                "against": {axis: vega.specification(chart, axis, furthest=ends) for axis in vega.AXES},
            }
            for chart in charts
        ],
        axes=vega.AXES,
        style=Markup("\n".join([*_colours(), _own("page.css")])),
        library=Markup(library),
        script=Markup(script),
        script_hashes=Markup(" ".join(_hash(text) for text in (library, script))),
        sources=[str(run.path) for run in runs],
        version=version("remix-rl"),
        now=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        **values,
    )
    return page


def _own(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _colours() -> Iterator[str]:
    """Paper is always light."""
    for around, theme in (("{}", vega.LIGHT), ("@media screen and (prefers-color-scheme: dark) {{ {} }}", vega.DARK)):
        rules = "; ".join(f"--{name}: {colour}" for name, colour in theme.items())
        yield around.format(f":root {{ {rules} }}")
    yield from (f".line-{place} {{ background: {colour} }}" for place, colour in enumerate(vega.SERIES))


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
