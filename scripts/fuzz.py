"""Fresh random inputs for everything that reads what others wrote, for as long as asked.

    python scripts/fuzz.py [--seconds N] [--target NAME] [--seed S]

Prints a table of counts, and the smallest input behind every failure; exits with 1 where there was one.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fuzz.harness import Tally, fuzz
from tests.fuzz.targets import TARGETS, open_tools

ROUND = 100
"""Examples between two looks at the clock."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Fresh random inputs for everything that reads what others wrote.")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all, shared equally by the targets")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, help="the same seed gives the same inputs, as far as time allows")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    first = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    tallies = {name: run(name, options.seconds / len(names), first) for name in names}
    show(tallies, first)
    return int(any(tally.failures for tally in tallies.values()))


def run(name: str, seconds: float, first: int) -> Tally:
    """Rounds with one seed after the other, until the time is up or something fails."""
    total = Tally()
    with open_tools() as tools:
        until, number = time.monotonic() + seconds, first
        while time.monotonic() < until and not total.failures:
            total += fuzz(TARGETS[name], tools, ROUND, number)
            number += 1
    for failure in total.failures:
        print(f"--- {name}, seed {number - 1} ---")
        traceback.print_exception(failure)
    return total


def show(tallies: dict[str, Tally], first: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("target", title=f"seeds from {first}")
    for heading in ("examples", "accepted", "refused", "failures", "seconds"):
        table.add_column(heading, justify="right")
    total = Tally()
    for name, tally in tallies.items():
        total += tally
        table.add_row(name, *map(str, tally.row))
    table.add_section()
    table.add_row("all", *map(str, total.row))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
