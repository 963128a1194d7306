"""Charts as Vega-Lite specifications, which a browser draws with the library in the page and `--png` without one."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from remix.reporting.charts import Chart, Mark

Axis = Literal["steps", "rollouts"]
AXES: Mapping[Axis, str] = {"steps": "training steps", "rollouts": "rollouts"}
VERSION = "6.4"
"""Of Vega-Lite."""
LABEL = "datum.value % 1 ? '' : format(datum.value, '~s')"
"""Of an axis of whole numbers; a plain format would write 0k and 500m."""
HEIGHT = 170
FEW = 3
"""Points that are shown as such, since a line through them may be too short to see."""
ROOM = 42
"""Letters of a legend beside one another, at the narrowest."""
PNG_WIDTH, PNG_SCALE = 420, 3.0

# Okabe and Ito's colours, told apart with any colour vision; of ordered series viridis', light last.
LIGHT = {
    "ink": "#1c2126", "soft": "#5d6770", "line": "#e4e7ea", "card": "#ffffff", "page": "#f6f7f8", "shade": "#dfeaf4",
    "series-0": "#0072b2", "series-1": "#d55e00", "series-2": "#008a63", "series-3": "#b5578f", "series-4": "#b07a00",
    "series-5": "#3a93c9", "series-6": "#6b6b6b",
    "order-0": "#440154", "order-1": "#355e8d", "order-2": "#1f968b", "order-3": "#5aad3c", "order-4": "#b8a500",
    "good": "#00714f", "bad": "#b34700", "mark": "#fff7e8",
}  # fmt: skip
DARK = {
    "ink": "#e8eaed", "soft": "#a0a9b2", "line": "#33393f", "card": "#1b1f23", "page": "#121518", "shade": "#2a3a49",
    "series-0": "#56a8e0", "series-1": "#f0894a", "series-2": "#3cc397", "series-3": "#df8fbf", "series-4": "#e0b03c",
    "series-5": "#8fd0f5", "series-6": "#a8a8a8",
    "order-0": "#fde725", "order-1": "#7ad151", "order-2": "#22a884", "order-3": "#5b93c4", "order-4": "#a47cc4",
    "good": "#3cc397", "bad": "#f0894a", "mark": "#2c261b",
}  # fmt: skip
SERIES = [f"var(--series-{n})" for n in range(7)]
ORDER = [f"var(--order-{n})" for n in range(5)]


def rows(chart: Chart) -> list[dict[str, Any]]:
    """The data of a chart, a row for each point."""
    return [
        {
            "series": one.label,
            "steps": point.steps,
            "rollouts": round(point.rollouts),
            "value": _short(point.value),
            **({} if point.low is None or point.high is None else _bounds(point.low, point.high)),
        }
        for one in chart.series
        for point in one.points
    ]


def specification(chart: Chart, axis: Axis, *, furthest: Mapping[Axis, float]) -> dict[str, Any]:
    """Without its data, which is named `rows`. Colours are variables of the page: one specification for light, dark
    and paper. `furthest`: where the axes end, the same for all charts of a page."""
    x = {
        "field": axis,
        "type": "quantitative",
        "scale": {"domain": [0, furthest[axis]], "nice": False},
        "axis": {"title": AXES[axis], "labelExpr": LABEL, "tickMinStep": 1, "tickCount": 6},
    }
    return {
        "$schema": f"https://vega.github.io/schema/vega-lite/v{VERSION.partition('.')[0]}.json",
        "description": f"{chart.title}: {chart.about}; against {AXES[axis]}.",
        "data": {"name": "rows"},
        "width": "container",
        "height": HEIGHT,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "layer": [*_phases(chart, axis, x), *_curves(chart, x)],
        "config": CONFIG,
    }


def png(chart: Chart, axis: Axis, *, furthest: Mapping[Axis, float]) -> bytes:
    """On white, with its title."""
    import vl_convert

    whole = specification(chart, axis, furthest=furthest) | {
        "datasets": {"rows": rows(chart)},
        "width": PNG_WIDTH,
        "title": {"text": chart.title, "subtitle": textwrap.wrap(chart.about, 72)},
        "background": "white",
    }
    plain = re.sub(r"var\(--([a-z0-9-]+)\)", lambda match: LIGHT.get(match[1], match[0]), json.dumps(whole))
    return vl_convert.vegalite_to_png(plain, vl_version=VERSION, scale=PNG_SCALE)


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VERSION)


def furthest(charts: Sequence[Chart]) -> dict[Axis, float]:
    points = [point for chart in charts for one in chart.series for point in one.points]
    return {
        "steps": max((point.steps for point in points), default=1.0),
        "rollouts": max((point.rollouts for point in points), default=1.0) or 1.0,
    }


def write_pngs(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Every chart against steps and against rollouts."""
    folder.mkdir(parents=True, exist_ok=True)
    ends, paths = furthest(charts), []
    for chart in charts:
        for axis in AXES:
            path = folder / f"{chart.name}_by_{axis}.png"
            path.write_bytes(png(chart, axis, furthest=ends))
            paths.append(path)
    return paths


def _phases(chart: Chart, axis: Axis, x: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Replay shaded, reincarnations as dashed lines."""

    def at(mark: Mark) -> float:
        return mark.steps if axis == "steps" else mark.rollouts

    layers: list[dict[str, Any]] = []
    if chart.replay:
        ends = [{axis: at(start), "end": at(end)} for start, end in chart.replay]
        shade = {"type": "rect", "color": "var(--shade)", "opacity": 0.6, "tooltip": None}
        layers.append({"data": {"values": ends}, "mark": shade, "encoding": {"x": x, "x2": {"field": "end"}}})
    if chart.reincarnations:
        lines = [{axis: at(mark)} for mark in chart.reincarnations]
        dashes = {"type": "rule", "color": "var(--soft)", "strokeDash": [3, 3], "tooltip": None}
        layers.append({"data": {"values": lines}, "mark": dashes, "encoding": {"x": x}})
    return layers


def _curves(chart: Chart, x: Mapping[str, Any]) -> list[dict[str, Any]]:
    stacked, labels = chart.shape == "stack", [one.label for one in chart.series]
    y = {
        "field": "value",
        "type": "quantitative",
        "scale": {"type": "log"} if chart.log else {"zero": stacked, "nice": True},
        "axis": {"title": None, "format": chart.format, "tickCount": 5} | (_decades(chart) if chart.log else {}),
        "stack": "zero" if stacked else None,
    }
    colour = {
        "field": "series",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": labels, "range": ORDER if chart.ordered else SERIES},
        "legend": _legend(labels, stacked) if chart.legend or len(labels) > 1 else None,
    }
    shared = {"x": x, "y": y, "color": colour}
    positive = [{"filter": "datum.value > 0"}] if chart.log else []
    interpolate = "step-before" if chart.shape == "steps" else "linear"
    layers: list[dict[str, Any]] = []
    banded = any(point.low is not None for one in chart.series for point in one.points)
    if banded:
        y_band = {key: value for key, value in y.items() if key != "stack"} | {"field": "low"}
        layers.append(
            {
                "transform": [{"filter": "isValid(datum.low)"}, *([{"filter": "datum.low > 0"}] if chart.log else [])],
                "mark": {"type": "area", "opacity": 0.16, "tooltip": None, "interpolate": interpolate},
                "encoding": {"x": x, "y": y_band, "y2": {"field": "high"}, "color": colour},
            }
        )
    mark: dict[str, Any] = (
        {"type": "area", "opacity": 0.85, "interpolate": "linear"}
        if stacked
        else {"type": "line", "strokeWidth": 1.8, "interpolate": interpolate}
    )
    layers.append({"transform": positive, "mark": mark | {"tooltip": None}, "encoding": shared})
    if chart.shape == "dots" or max(len(one.points) for one in chart.series) <= FEW:
        dots = {"type": "point", "filled": True, "size": 26, "tooltip": None}
        layers.append({"transform": positive, "mark": dots, "encoding": shared})
    layers.append(_hover(shared, positive, _tooltip(chart, ends=banded)))
    return layers


def _legend(labels: Sequence[str], stacked: bool) -> dict[str, Any]:
    """In as many columns as a narrow chart has room for."""
    symbol = {"symbolType": "square", "symbolStrokeWidth": 0} if stacked else {"symbolType": "stroke"}
    columns = max(1, ROOM // (4 + max(map(len, labels))))
    return {"title": None, "columns": columns, "symbolOpacity": 1, **symbol}


def _hover(shared: Mapping[str, Any], positive: Sequence[Any], tooltip: Mapping[str, Any]) -> dict[str, Any]:
    """The point nearest to the pointer, and what it says."""
    near = {"type": "point", "on": "pointerover", "clear": "pointerout", "nearest": True}
    shown = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    return {
        "transform": list(positive),
        "params": [{"name": "near", "select": near}],
        "mark": {"type": "point", "filled": True, "size": 55, "aria": False},
        "encoding": {**shared, "opacity": shown, "tooltip": tooltip},
    }


def _tooltip(chart: Chart, *, ends: bool) -> dict[str, Any]:
    """An expression, since Vega-Lite would look for the text of a point in the cell that it lays around it."""
    point = "(datum.datum || datum)"

    def number(field: str, form: str) -> str:
        return f"isValid({point}.{field}) ? format({point}.{field}, '{form}') : '–'"

    parts = {"curve": f"{point}.series"} if len(chart.series) > 1 else {}
    parts |= {"value": number("value", chart.format)}
    parts |= {title: number(field, chart.format) for title, field in (("from", "low"), ("to", "high")) if ends}
    parts |= {"after step": number("steps", ",d"), "rollouts": number("rollouts", ",d")}
    return {"value": {"expr": "{" + ", ".join(f"{json.dumps(key)}: {said}" for key, said in parts.items()) + "}"}}


def _decades(chart: Chart) -> dict[str, Any]:
    """One line for each power of ten, in place of nine."""
    values = [point.value for one in chart.series for point in one.points if point.value > 0] or [1.0]
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return {"values": [10.0**power for power in range(first, last + 1, max(1, (last - first) // 5))]}


def _bounds(low: float, high: float) -> dict[str, float]:
    return {"low": _short(low), "high": _short(high)}


def _short(value: float) -> float:
    """As precise as a picture is."""
    return float(f"{value:.5g}")


CONFIG: dict[str, Any] = {
    "font": "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)", "titleColor": "var(--soft)", "gridColor": "var(--line)", "domain": False,
        "ticks": False, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelPadding": 6,
    },
    "axisX": {"grid": False, "domain": True, "domainColor": "var(--line)", "titlePadding": 6},
    "axisY": {"minExtent": 40, "maxExtent": 40},
    "legend": {
        "orient": "top", "labelColor": "var(--ink)", "labelFontSize": 11, "symbolSize": 120, "symbolStrokeWidth": 3,
        "offset": 8, "columnPadding": 10, "labelLimit": 240,
    },
    "title": {
        "anchor": "start", "color": "var(--ink)", "subtitleColor": "var(--soft)", "fontSize": 14,
        "subtitleFontSize": 11, "offset": 10,
    },
}  # fmt: skip
