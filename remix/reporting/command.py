"""What `remix report` does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    """To the subcommands of `remix`."""
    parser = commands.add_parser(
        "report",
        usage="remix report RUN_DIR [RUN_DIR ...] [--out report.html] [--png DIR]",
        help="a page about one run, or several side by side",
        description="Writes one HTML file that needs no network: curves, evaluations, samples, warnings and the recipe "
        "of a run; of several, their curves together and the rollouts that each took to the same accuracy.",
    )
    parser.set_defaults(command=main)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default report.html)"
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="the curves as pictures too, into this folder")


def main(args: argparse.Namespace, *_: Any) -> int:
    """Raises ValueError before anything is written."""
    from remix.durable import write_text
    from remix.reporting.findings import findings
    from remix.reporting.page import run_page, runs_page, title
    from remix.reporting.runs import read_run
    from remix.reporting.vega import write_pngs
    from remix.terminal import showable

    out, folder = args.out, args.png
    paths = list(dict.fromkeys(path.resolve() for path in args.run_dirs))
    named = {path.resolve(): path for path in args.run_dirs}
    runs = [read_run(named[path]) for path in paths]
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: name a file in a folder that is there")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"--png {folder}: that is a file; name a folder")
    page, charts = run_page(runs[0]) if len(runs) == 1 else runs_page(runs)
    write_text(out, page)
    if folder is not None:
        print(f"{len(write_pngs(charts, folder))} pictures in {showable(folder)}")
    for run in runs:
        found = findings(run)
        titles = "; ".join(finding.title for finding in found)
        print(
            showable(
                f"{title(run)}: {run.steps:,} step{'s' * (run.steps > 1)}, {run.rollouts:,.0f} rollouts. {titles}"
            ).rstrip()
        )
    print(showable(out))
    return 0
