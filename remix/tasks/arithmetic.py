"""Generated arithmetic over the digits 1 to 9, worked step by step: the task of the embedded demo.

    kind           problem      careful chain
    sum            3+8+4+9=     11;15;24#24       every running total, then the answer after '#'
    sum_subtract   3+8-4+9=     11;7;16#16        at least one '-', and no running total below 0
    product_sum    6*7+3*4=     42;12;54#54       every product before it is added

A problem belongs to `train` or `test` by a hash of its own text, so no seed, size or mix can leak one into the other.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import prod
from typing import Literal

from remix.types import Prompt

Split = Literal["train", "test"]

TEST_SHARE = 8
"""One problem in so many is held out for `test`."""

_TERM = re.compile(r"[+-]?[1-9](?:\*[1-9])*")
_PROBLEM = re.compile(r"[1-9](?:\*[1-9])*(?:[+-][1-9](?:\*[1-9])*)+=")


def generate(
    *, kinds: Sequence[str], min_terms: int, max_terms: int, split: Split, size: int, seed: int
) -> list[Prompt]:
    """`size` distinct problems, kinds and numbers of terms in turn; one that runs out leaves its turn to the others.

    A smaller size is a prefix of a larger one.
    """
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds must name at least one kind, each once, not {list(kinds)}; there are {sorted(KINDS)}")
    if not 2 <= min_terms <= max_terms:
        raise ValueError(f"terms must satisfy 2 <= min_terms <= max_terms, not {min_terms} and {max_terms}")
    sources = [problems(kind, terms, split, seed) for terms in range(min_terms, max_terms + 1) for kind in kinds]
    found = list(islice(_in_turn(sources), size))
    if len(found) < size:
        raise ValueError(
            f"{size} distinct {split} problems asked for, but {list(kinds)} with {min_terms} to {max_terms} terms has "
            f"only {len(found)}: lower size, raise max_terms or add a kind (of {sorted(KINDS)})"
        )
    return [
        Prompt(
            id=f"arithmetic/{split}/{problem}",
            content=problem,
            answer=answer(problem),
            task="arithmetic",
            solution=careful_chain(problem),
        )
        for problem in found
    ]


def problems(kind: str, terms: int, split: Split, seed: int) -> Iterator[str]:
    """All problems of one kind, length and split, each once, in an order drawn from the seed."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of arithmetic {kind!r}; there are {sorted(KINDS)}")
    count, write = KINDS[kind]
    # Each kind and length draws by itself, so that adding one to the mix leaves the others as they were.
    for index in _shuffled(count(terms), random.Random(f"{seed}/{kind}/{terms}")):
        problem = write(index, terms)
        if split_of(problem) == split and min(work(problem)) >= 0:
            yield problem


def split_of(problem: str) -> Split:
    """Where a problem belongs, by its text alone."""
    return "test" if hashlib.sha256(problem.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def work(problem: str, slip_step: int | None = None, slip: int = 0) -> list[int]:
    """The numbers written on the way to the answer, which is the last.

    With `slip_step`, that number is off by `slip` and everything after it is worked from the wrong number.
    """
    if not _PROBLEM.fullmatch(problem):
        raise ValueError(f"not an arithmetic problem: {problem!r}; write terms as in '3+8-4=' or '6*7+3*4='")
    written: list[int] = []

    def write(number: int) -> int:
        written.append(number + (slip if len(written) == slip_step else 0))
        return written[-1]

    total = 0
    for position, term in enumerate(_TERM.findall(problem)):
        factors = [int(digit) for digit in term.lstrip("+-").split("*")]
        value = write(prod(factors)) if len(factors) > 1 else factors[0]
        signed = -value if term[0] == "-" else value
        total = write(total + signed) if position else signed
    return written


def chain(numbers: Sequence[int]) -> str:
    """A response: the numbers on the way, then '#' and the last of them as the answer."""
    return ";".join(map(str, numbers)) + f"#{numbers[-1]}"


def careful_chain(problem: str) -> str:
    """The response that writes every number on the way, without a slip."""
    return chain(work(problem))


def answer(problem: str) -> str:
    return str(work(problem)[-1])


def _shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """range(count) in random order, each once. Fisher-Yates over a sparse array: there may be 10^11 problems."""
    moved: dict[int, int] = {}
    for index in range(count):
        other = rng.randrange(index, count)
        yield moved.get(other, other)
        moved[other] = moved.pop(index, index)


def _in_turn(sources: Sequence[Iterator[str]]) -> Iterator[str]:
    """One from each source, round and round, until all are empty."""
    running = list(sources)
    while running:
        for source in list(running):
            try:
                yield next(source)
            except StopIteration:
                running.remove(source)


def _digits(index: int, count: int) -> list[str]:
    """`index` in base 9, as `count` digits from 1 to 9."""
    return [str(index // 9**place % 9 + 1) for place in range(count)]


def _sum(index: int, terms: int) -> str:
    return "+".join(_digits(index, terms)) + "="


def _sum_subtract(index: int, terms: int) -> str:
    first, *rest = _digits(index, terms)
    signs = index // 9**terms + 1  # one bit per sign; never 0, which would be a plain sum
    return first + "".join("+-"[signs >> place & 1] + digit for place, digit in enumerate(rest)) + "="


def _product_sum(index: int, terms: int) -> str:
    digits = _digits(index, 2 * terms)
    return "+".join(f"{left}*{right}" for left, right in zip(digits[::2], digits[1::2], strict=True)) + "="


KINDS: dict[str, tuple[Callable[[int], int], Callable[[int, int], str]]] = {
    "sum": (lambda terms: 9**terms, _sum),
    "sum_subtract": (lambda terms: 9**terms * (2 ** (terms - 1) - 1), _sum_subtract),
    "product_sum": (lambda terms: 81**terms, _product_sum),
}
"""By kind: how many problems of so many terms there are before any is left out, and how to write the i-th."""
