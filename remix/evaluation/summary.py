"""What an evaluation says at its end: a table, summary.json, and summary.md, from which others can repeat it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from remix.evaluation.evaluate import Evaluation
from remix.evaluation.scores import bootstrap_interval, macro_average, macro_interval
from remix.terminal import markdown_code, markdown_text, showable

COLUMNS = (
    "benchmark",
    "N",
    "k",
    "avg@k",
    "95% interval",
    "pass@k",
    "maj@k",
    "cut",
    "no answer",
    "timed out",
    "tokens",
    "reflecting",
)
WIDE = 120
LEGEND = (
    "Scores in percent. N problems, k responses to each. avg@k: share of correct responses, the estimate of Pass@1; "
    "its interval by bootstrap over problems. pass@k: chance that k responses hold a correct one (unbiased). "
    "maj@k: share of problems whose most frequent answer is correct. cut: at the token limit. timed out: the grader's "
    "deadline or error. tokens: mean length of a response. reflecting: share of responses with a reflection phrase."
)


def scores(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The numbers as plain data, shares between 0 and 1."""
    return {
        "benchmarks": {evaluation.name: _scores(evaluation) for evaluation in evaluations},
        "macro_average": {
            "avg@k": macro_average([evaluation.avg_at_k for evaluation in evaluations]),
            "interval_95": _bounds(macro_interval([evaluation.per_problem for evaluation in evaluations])),
        },
    }


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "problems": evaluation.problems,
        "samples": evaluation.samples,
        "avg@k": evaluation.avg_at_k,
        "interval_95": _bounds(bootstrap_interval(evaluation.per_problem)),
        "pass@k": {str(k): value for k, value in evaluation.pass_at.items()},
        "maj@k": evaluation.maj_at_k,
        "truncated": evaluation.shares.truncated,
        "no_answer": evaluation.shares.no_answer,
        "timeout": evaluation.shares.timeout,
        "error": evaluation.shares.error,
        "mean_tokens": evaluation.mean_tokens,
        "self_reflection": evaluation.self_reflection,
    }


def _bounds(interval: Any) -> list[float]:
    return [interval.low, interval.high]


def rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table's cells, as COLUMNS name them."""
    for name, found in summary["benchmarks"].items():
        # Of several, that of all samples is shown, or the largest that was asked for.
        largest = max(found["pass@k"], key=int, default=None)
        shown = "" if largest is None else _percent(found["pass@k"][largest])
        yield (
            name,
            f"{found['problems']:,}",
            str(found["samples"]),
            _percent(found["avg@k"]),
            _interval(found["interval_95"]),
            shown if largest in (None, str(found["samples"])) else f"{shown} (k={largest})",
            "" if found["maj@k"] is None else _percent(found["maj@k"]),
            _percent(found["truncated"]),
            _percent(found["no_answer"]),
            _percent(found["timeout"] + found["error"]),
            f"{found['mean_tokens']:,.0f}",
            _percent(found["self_reflection"]),
        )
    if len(summary["benchmarks"]) > 1:
        macro = summary["macro_average"]
        yield ("average", "", "", _percent(macro["avg@k"]), _interval(macro["interval_95"]), *[""] * (len(COLUMNS) - 5))


def show(summary: Mapping[str, Any]) -> None:
    """The table and what its columns mean, on standard output."""
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=WIDE, markup=False, emoji=False)
    drawn = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name in COLUMNS:
        heading = name.replace(" ", "\n").replace("reflecting", "reflec-\nting")
        drawn.add_column(heading, justify="left" if name == "benchmark" else "right", overflow="fold", no_wrap=True)
    for row in rows(summary):
        drawn.add_row(*map(showable, row), style="bold" if row[0] == "average" else None)
    console.print(drawn)
    console.print(LEGEND, style="dim", highlight=False)


def markdown(summary: Mapping[str, Any]) -> str:
    """All that is needed to have the same numbers again."""
    run, session = summary["run"], summary["session"]
    lines = [
        f"# {markdown_text(run['model']['path'])}"
        + (f" with {markdown_text(run['adapter']['path'])}" if run["adapter"] else ""),
        "",
        *_markdown_table([COLUMNS, *rows(summary)]),
        "",
        LEGEND,
        "",
        "## How to repeat it",
        "",
        textwrap.indent(showable(session["command"]), "    "),  # a block that its text cannot end
        "",
        *_markdown_table([("", ""), *_facts(summary)]),
        "",
        "## Benchmarks",
        "",
    ]
    for name, benchmark in run["benchmarks"].items():
        lines += [f"### {name}", "", *_markdown_table([("", ""), *_benchmark(benchmark, summary["data"][name])]), ""]
    return "\n".join(lines)


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    run, session = summary["run"], summary["session"]
    model, adapter = run["model"], run["adapter"]
    yield "model", markdown_code(model["path"]) + (f" at commit {model['commit']}" if model["commit"] else "")
    for part, files in summary["files"].items():
        yield (
            f"{part}, sha256",
            "<br>".join([f"`{files['sha256']}`", *(f"{markdown_text(n)}: `{h}`" for n, h in files["files"].items())]),
        )
    yield "adapter", "none" if adapter is None else f"{markdown_code(adapter['path'])}, merged into the weights"
    yield "chat template", f"used, sha256 `{run['chat_template']}`" if run["chat_template"] else "not used"
    yield "engine", f"{run['engine']['name']}, {run['engine']['dtype']}, on {session['device']}"
    yield "seed", f"{run['seed']}; that of a response is derived from it, the problem's id and the sample's number"
    yield "grader", f"{run['grader']['name']} {run['grader']['version']}, {run['grader']['timeout']:g} s an answer"
    yield "versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    yield "seconds", f"{session['seconds']:.0f} in the last session, ended {session['finished']}"


def _benchmark(benchmark: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "title", markdown_text(data["title"])
    yield "licence", markdown_text(data["licence"])
    yield "data", f"{markdown_text(data['source'])}, revision {data['revision'] or 'none'}"
    yield "problems", f"{benchmark['problems']} of {data['of']}, sha256 `{benchmark['sha256']}` of problems and golds"
    yield (
        "template",
        markdown_code(benchmark["template"])
        + (f", system {markdown_code(benchmark['system'])}" if benchmark["system"] else ""),
    )
    yield (
        "sampling",
        f"{benchmark['samples']} a problem, temperature {benchmark['temperature']:g}, top-p {benchmark['top_p']:g}, "
        f"at most {benchmark['max_tokens']:,} tokens",
    )
    yield (
        "grader",
        markdown_text(", ".join(f"{key} {value}" for key, value in benchmark["grader"].items() if value is not None)),
    )
    yield "reflection phrases", ", ".join(map(markdown_code, benchmark["reflection_phrases"]))
    if data["notes"]:
        yield "notes", markdown_text(data["notes"])


def _markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in cells]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(bounds: Sequence[float]) -> str:
    return f"{_percent(bounds[0])}–{_percent(bounds[1])}"
