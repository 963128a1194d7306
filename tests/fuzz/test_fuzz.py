"""Every target on a fixed, derandomised budget of inputs; scripts/fuzz.py goes on with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fuzz.harness import Tools, fuzz
from tests.fuzz.targets import TARGETS, open_tools


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    with open_tools() as opened:
        yield opened


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_gets_through(name: str, tools: Tools, record_property: Callable[[str, object], None]) -> None:
    tally = fuzz(TARGETS[name], tools, TARGETS[name].examples)
    record_property("fuzz", [name, *tally.row])
    for failure in tally.failures:
        raise failure
    assert tally.examples >= TARGETS[name].examples // 2
