"""Answers graded per second and how many of them rightly, beside math-verify called serially and through a pool.

    python scripts/bench_grader.py [FILE.jsonl] [--workers N] [--limit N]

FILE has lines {"gold": str | [str], "prediction": str, "expected": bool}. Without one: ../shared/data/grader_dev.jsonl
where it is, else cases made here.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remix.rewards import GraderPool
from remix.rewards.equivalence import GRADER_NAME, GRADER_VERSION

DEFAULT = Path(__file__).parents[2] / "shared/data/grader_dev.jsonl"
TIMEOUT = 5

Case = tuple[tuple[str, ...], str, bool]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers graded per second, beside math-verify.")
    parser.add_argument("file", nargs="?", type=Path, help="labelled answers")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=int, help="of the answers")
    options = parser.parse_args()
    path = options.file or (DEFAULT if DEFAULT.is_file() else None)
    cases = (read(path) if path else made())[: options.limit]
    golds, responses = [golds for golds, _, _ in cases], [response for _, response, _ in cases]

    def ours() -> list[bool]:
        return [grade.verdict == "correct" for grade in pool.grade(golds, responses)]

    def peer_in_pool() -> list[bool]:
        return processes.map(math_verify_says, cases, chunksize=8)

    from rich.console import Console
    from rich.table import Table

    table = Table("", "seconds", "answers/s", "ratio", "right", "false positives", "false negatives")
    table.title = f"{len(cases):,} answers of {path or 'this script'}, {options.workers} workers, all warm"
    wanted = [expected for _, _, expected in cases]
    with (
        GraderPool(workers=options.workers, timeout=TIMEOUT) as pool,
        multiprocessing.get_context("spawn").Pool(options.workers) as processes,
    ):
        ways: dict[str, Callable[[], list[bool]]] = {
            f"{GRADER_NAME} {GRADER_VERSION}": ours,
            "math-verify, pool": peer_in_pool,
            "math-verify, serial": lambda: [math_verify_says(case) for case in cases],
        }
        warm = [((r"\frac{1}{2}",), r"\boxed{\frac{\sqrt{4}}{4}}", True)] * (4 * options.workers)
        pool.grade([case[0] for case in warm], [case[1] for case in warm])
        processes.map(math_verify_says, warm, chunksize=1)
        math_verify_says(warm[0])
        first = None
        for name, way in ways.items():
            began = time.perf_counter()
            found = way()
            seconds = time.perf_counter() - began
            first = first or seconds
            table.add_row(
                name, f"{seconds:.2f}", f"{len(cases) / seconds:,.0f}", f"{seconds / first:.1f}", *marks(wanted, found)
            )
    Console(width=120).print(table)


def read(path: Path) -> list[Case]:
    cases = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        gold = row["gold"]
        cases.append(((gold,) if isinstance(gold, str) else tuple(gold), row["prediction"], bool(row["expected"])))
    return cases


def made(number: int = 600) -> list[Case]:
    """Sums of fractions, powers and roots, half of them wrong by one."""
    draw = random.Random(0)
    cases: list[Case] = []
    for index in range(number):
        a, b, wrong = draw.randint(2, 99), draw.randint(2, 99), index % 2
        kinds = [
            (str(a * b), f"{a * b + wrong}"),
            (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b + wrong}}}"),
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b + wrong}}}"),
            (f"({a}, {b})", rf"\left({a}, {b + wrong}\right)"),
            (f"(x+{a})^2", f"x^2+{2 * a}x+{a * a + wrong}"),
            (f"{a}, {b}", f"{b}, {a + wrong}"),
        ]
        gold, answer = kinds[index // 2 % len(kinds)]
        cases.append(((gold,), rf"Hence we find \(\boxed{{{answer}}}\).", not wrong))
    return cases


def math_verify_says(case: Case) -> bool:
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    golds, response, _ = case
    answer: list[Any] = parse(response, parsing_timeout=TIMEOUT)
    return any(verify(parse(rf"\boxed{{{gold}}}"), answer, timeout_seconds=TIMEOUT) for gold in golds)


def marks(wanted: Sequence[bool], found: Sequence[bool]) -> tuple[str, str, str]:
    pairs = list(zip(wanted, found, strict=True))
    right = sum(a == b for a, b in pairs) / max(len(pairs), 1)
    return f"{right:.1%}", str(sum(b and not a for a, b in pairs)), str(sum(a and not b for a, b in pairs))


if __name__ == "__main__":
    main()
