"""What was learnt and what was forgotten: the accuracy matrix of a continual run as table, Markdown and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remix.durable import write_text
from remix.evaluation.continual import Record
from remix.evaluation.transfer import summary
from remix.terminal import markdown_text, showable

MEANINGS = {
    "ACC": "mean accuracy over the tasks learnt so far",
    "BWT": "backward transfer: what later tasks did to earlier ones",
    "forgetting": "the best that a task ever had, less what is left of it",
    "zero_shot": "mean accuracy on tasks before they were learnt",
}


def transfer_table(record: Record) -> RenderableType:
    """For the terminal: a row for every task learnt, a column for every task asked."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("after", no_wrap=True)
    for task in record.order:
        table.add_column(showable(task), justify="right", no_wrap=True)
    table.add_row(Text("nothing", style="dim"), *(Text(_percent(record.base[t]), style="dim") for t in record.order))
    for number, row in enumerate(record.learnt):
        cells = [
            Text(_percent(row.merged[task]), style="bold" if place == number else "dim" if place > number else "")
            for place, task in enumerate(record.order)
        ]
        table.add_row(showable(row.task), *cells)
    scores = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    for name, value in summary(record.matrix).items():
        scores.add_row(name, Text(_points(name, value), style="bold"), Text(MEANINGS[name], style="dim"))
    return Padding(Group(Text(f"method {record.method['type']}; pass@1"), "", table, "", scores), (1, 1))


def write_report(record: Record, run_dir: Path) -> list[Path]:
    """continual.md and continual.png in the run's folder."""
    picture, text = run_dir / "continual.png", run_dir / "continual.md"
    draw_matrix(record, picture)
    write_text(text, markdown(record, picture.name))
    return [text, picture]


def markdown(record: Record, picture: str | None = None) -> str:
    """`picture`: the file of `draw_matrix`, to be shown."""
    names = [markdown_text(task) for task in record.order]
    rows = [["nothing", *(_percent(record.base[task]) for task in record.order)]]
    rows += [[markdown_text(row.task), *(_percent(row.merged[task]) for task in record.order)] for row in record.learnt]
    scores = [[name, _points(name, value), MEANINGS[name]] for name, value in summary(record.matrix).items()]
    settings = ", ".join(f"{key} {value}" for key, value in record.method.items() if key != "type")
    own = [
        [
            markdown_text(row.task),
            _percent(row.own[row.task]),
            _percent(row.merged[row.task]),
            "–" if row.sign_conflict is None else f"{row.sign_conflict:.1%}",
            f"{row.rollouts:,}",
            f"{row.seconds:.0f}",
        ]
        for row in record.learnt
    ]
    parts = [
        f"# {record.method['type']}: {len(record.learnt)} of {len(record.order)} tasks learnt",
        f"Method: {record.method['type']}" + (f" ({markdown_text(settings)})." if settings else "."),
        *([] if picture is None else [f"![accuracy matrix]({picture})"]),
        "pass@1 on every task (columns) after each task was learnt (rows):",
        _markdown_table(["after", *names], rows),
        _markdown_table(["", "", ""], scores),
        "Each task's own adapter as it was trained, and what of it was left at once by merging:",
        _markdown_table(["task", "own", "merged", "sign conflict", "rollouts", "seconds"], own),
    ]
    return "\n\n".join(parts) + "\n"


def draw_matrix(record: Record, path: Path) -> None:
    """The matrix as a heat map, and each task's accuracy from when it was learnt on."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tasks, base = record.order, [record.base[task] for task in record.order]
    matrix = [base, *record.matrix]
    with mpl.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(4.2 + 1.1 * len(tasks), 1.6 + 0.45 * (len(tasks) + 1)), dpi=150, layout="constrained")
        heat, curves = figure.subplots(1, 2, width_ratios=(len(tasks), 6))
        heat.imshow(matrix, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                weight = "bold" if row == column + 1 else "normal"
                style = "normal" if row > column else "italic"  # not learnt yet
                colour = "white" if value > 0.5 else "black"
                said = f"{100 * value:.0f}"
                heat.text(column, row, said, ha="center", va="center", color=colour, weight=weight, style=style)
        heat.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        heat.set_yticks(range(len(matrix)), ["nothing", *(row.task for row in record.learnt)])
        heat.set_ylabel("after")
        heat.set_title("pass@1 in percent, by task", fontsize=9)
        for column, task in enumerate(tasks[: len(record.learnt)]):
            steps = range(column + 1, len(matrix))
            curves.plot(steps, [100 * matrix[row][column] for row in steps], marker="o", markersize=3, label=task)
        curves.set_xticks(range(1, len(matrix)))
        curves.set_ylim(0, 103)
        curves.set_xlabel("tasks learnt")
        curves.set_title("from when it was learnt on", fontsize=9)
        curves.spines[["top", "right"]].set_visible(False)
        curves.legend(frameon=False, fontsize=7, loc="lower left")
        figure.savefig(path)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:+.1f}" if name == "BWT" else _percent(value)
