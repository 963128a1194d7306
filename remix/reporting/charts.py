"""Which curves a report shows, and what each is made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from remix.reporting.lines import Line, Point, accuracy, band, thinned
from remix.reporting.runs import PASS_AT_1, Run, interval
from remix.terminal import showable

STAGES = ("sampling", "scoring", "anchors", "updating", "syncing", "evaluating")
"""Of a step, from the bottom of the stack to its top."""
EQUAL = "equal rewards"


class Series(NamedTuple):
    label: str
    points: Sequence[Point]


class Mark(NamedTuple):
    """A reincarnation, or one end of a phase: where it is on either axis."""

    steps: float
    rollouts: float


@dataclass(frozen=True)
class Chart:
    name: str
    """Of files."""
    title: str
    about: str
    series: Sequence[Series]
    format: str = ".3~g"
    """Of values, as d3-format has it."""
    shape: Literal["line", "steps", "dots", "stack"] = "line"
    log: bool = False
    replay: Sequence[tuple[Mark, Mark]] = ()
    """Phases that replay, to be shaded."""
    reincarnations: Sequence[Mark] = ()
    legend: bool = False
    """Even where there is one series."""
    ordered: bool = False
    """Whether the series have an order, such as by lag."""


@dataclass(frozen=True)
class Plot:
    """A chart of metrics of every training step."""

    name: str
    title: str
    about: str
    keys: Mapping[str, str] = field(default_factory=dict)
    """Metric by label; of several runs, each is a chart of its own."""
    by_lag: str | None = None
    """A metric that stands once for each policy lag."""
    band: tuple[str, str] | None = None
    """Metrics by lag that bound it."""
    format: str = ".3~g"
    shape: Literal["line", "steps"] = "line"
    log: bool = False
    events: bool = False
    """Of things that may never happen: curves that stay at 0 are left out."""


PLOTS = (
    Plot(
        "length",
        "Response length",
        "tokens, mean over a step's fresh responses",
        {"sampled": "response/length"},
        format=",.5~r",
    ),
    Plot(
        "responses",
        "Kinds of responses",
        "shares of a step's fresh responses; of its groups, those with equal rewards",
        {
            "cut off": "response/truncated",
            "no answer": "verdict/no_answer",
            "self-reflecting": "response/self_reflection",
            EQUAL: "rollouts/uniform_groups",
        },
        format=".3~p",
        events=True,
    ),
    Plot("entropy", "Entropy", "nats per token, of the policy in training", {"entropy": "entropy"}),
    Plot(
        "kl",
        "KL to the anchors",
        "nats per token; reference: the base, or the policy at the last reincarnation; precedent: one step before; "
        "update: as the step began",
        {"reference": "kl/reference", "precedent": "kl/precedent", "update": "kl/update"},
    ),
    Plot("lambda", "λ", "share of the reference in the KL constraint", {"λ": "kl/lambda"}, shape="steps"),
    Plot(
        "ratio",
        "Importance ratio by lag",
        "mean over tokens, and from the 5th to the 95th percentile; lag: how many policies old a rollout is",
        {"ratio": "ratio/mean"},
        by_lag="ratio/mean",
        band=("ratio/p05", "ratio/p95"),
        format=".4~g",
    ),
    Plot(
        "clip_fraction",
        "Clip fraction by lag",
        "share of tokens whose gradient is clipped",
        {"clip fraction": "clip_fraction"},
        by_lag="clip_fraction",
        format=".3~p",
    ),
    Plot(
        "ess",
        "Effective sample size by lag",
        "share of tokens that as many equal weights would count",
        {"effective sample size": "ess"},
        by_lag="ess",
        format=".3~p",
    ),
    Plot("replay_age", "Replay age", "mean lag of the tokens trained on", {"mean lag": "policy_lag/mean"}),
    Plot(
        "mismatch",
        "Sampler mismatch",
        "|log-prob of the engine − of the trainer|, nats per token",
        {"mean": "sampler/mismatch_mean", "largest": "sampler/mismatch_max"},
        format=".1~e",
        log=True,
    ),
    Plot(
        "gradient",
        "Gradient norm",
        "before clipping, mean over a step's updates",
        {"policy": "grad_norm/policy", "critic": "grad_norm/critic"},
    ),
)


def of_run(run: Run) -> list[Chart]:
    """All that a run has values for."""
    charts = [_rewards(run), _accuracies(run), *(_metrics(run, plot) for plot in PLOTS), _times(run)]
    replay = [
        (Mark(phase.start, phase.rollouts_start), Mark(phase.end, phase.rollouts_end))
        for phase in run.phases
        if phase.type == "mix_policy"
    ]
    marks = reincarnation_marks(run)
    return [
        replace(chart, series=series, replay=replay, reincarnations=marks)
        for chart in charts
        if (series := [_shown(one) for one in chart.series if one.points])
    ]


def of_lines(lines: Sequence[Line]) -> list[Chart]:
    """The same metrics, each line a curve with its seeds as band."""
    evaluated = Chart(
        "pass_at_1", "pass@1", "evaluated; the band is from the lowest to the highest seed",
        _over(lines, accuracy), ".3~p", "dots",
    )  # fmt: skip
    reward = Plot("reward", "Reward", "mean of a step's fresh responses", {"": "reward/mean"})
    seconds = Plot("time", "Seconds of a step", "all stages, evaluations included", {"": "time/step"})
    charts = [evaluated]
    for plot in (reward, *PLOTS, seconds):
        for label, key in plot.keys.items():
            several, series = len(plot.keys) > 1, _over(lines, lambda run, key=key: _points(run, key))  # type: ignore[misc]
            if plot.events and not any(point.value for one in series for point in one.points):
                continue
            charts.append(
                Chart(
                    f"{plot.name}_{label}".replace(" ", "_") if several else plot.name,
                    f"{plot.title.removesuffix(' by lag')}" + (f": {label}" if several else ""),
                    plot.about.partition(", and from the 5th")[0],
                    series,
                    plot.format,
                    plot.shape,
                    plot.log,
                )
            )
    return [
        replace(chart, series=[_shown(one) for one in chart.series])
        for chart in charts
        if any(one.points for one in chart.series)
    ]


def reincarnation_marks(run: Run) -> list[Mark]:
    return [Mark(phase.end, phase.rollouts_end) for phase in run.phases[:-1]]


def _shown(series: Series) -> Series:
    return Series(showable(series.label), thinned(series.points))


def _over(lines: Sequence[Line], points: Callable[[Run], Sequence[Point]]) -> list[Series]:
    return [Series(line.label, band(line, points)) for line in lines]


def _points(run: Run, key: str) -> list[Point]:
    return [Point(row.steps, row.rollouts, value) for row, value in run.series(key)]


def _rewards(run: Run) -> Chart:
    """The total, and its parts where there are several."""
    known = {name for row in run.rows for name in row.metrics}
    parts = sorted(name for name in known if re.fullmatch(r"reward/(?!mean$|std$).+", name))
    keys = {"total": "reward/mean"} | ({name.removeprefix("reward/"): name for name in parts} if parts[1:] else {})
    series = [Series(label if len(keys) > 1 else "reward", _points(run, key)) for label, key in keys.items()]
    return Chart("reward", "Reward", "mean of a step's fresh responses", series)


def _accuracies(run: Run) -> Chart:
    def points(key: str, exam: str) -> Iterator[Point]:
        for at in run.evaluations:
            value, bounds = at.metrics.get(key), interval(at, exam)
            if value is not None:
                yield Point(at.steps, at.rollouts, value, *(bounds or ()))

    exams = run.exams()
    series = [Series("mean" if len(exams) > 1 else "pass@1", list(points(PASS_AT_1, "")))]
    if len(exams) > 1:
        series += [Series(exam, list(points(f"eval/{exam}/pass@1", exam))) for exam in exams]
    known = any(point.low is not None for one in series for point in one.points)
    return Chart(
        "pass_at_1", "pass@1", "evaluated" + (", with its 95% interval" if known else ""), series, ".3~p", "dots"
    )


def _metrics(run: Run, plot: Plot) -> Chart:
    series = [Series(label, _points(run, key)) for label, key in plot.keys.items()]
    if plot.by_lag is not None:
        series = _by_lag(run, plot.by_lag, plot.band) or series
    if plot.events:
        series = [one for one in series if any(point.value for point in one.points)]
    series = [one for one in series if one.label != EQUAL or run.learns_from_groups]
    legend, ordered = len(plot.keys) > 1, plot.by_lag is not None
    return Chart(
        plot.name, plot.title, plot.about, series, plot.format, plot.shape, plot.log, legend=legend, ordered=ordered
    )


def _by_lag(run: Run, key: str, bounds: tuple[str, str] | None) -> list[Series]:
    found = (re.fullmatch(re.escape(key) + r"/lag=(\d{1,9})", name) for row in run.rows for name in row.metrics)
    lags = sorted({int(match[1]) for match in found if match})
    series = []
    for lag in lags:
        points = [
            Point(row.steps, row.rollouts, value, *(row.metrics.get(f"{bound}/lag={lag}") for bound in bounds or ()))
            for row, value in run.series(f"{key}/lag={lag}")
        ]
        series.append(Series(f"lag {lag}", points))
    return series


def _times(run: Run) -> Chart:
    """Every stage at every step, 0 where it was not entered, so that they can be stacked; and what is left."""
    series = [
        Series(stage, [Point(row.steps, row.rollouts, row.metrics.get(f"time/{stage}") or 0.0) for row in run.rows])
        for stage in STAGES
        if run.series(f"time/{stage}")
    ]
    if series:
        spent = [sum(one.points[at].value for one in series) for at in range(len(run.rows))]
        rest = [
            Point(row.steps, row.rollouts, max(0.0, (row.metrics.get("time/step") or 0.0) - known))
            for row, known in zip(run.rows, spent, strict=True)
        ]
        series.append(Series("other", rest))
    return Chart("time", "Seconds of a step", "by stage", series, ".3~g", "stack")
