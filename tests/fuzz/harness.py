"""Inputs by the hundred through the real code: how a target is run, bounded and counted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from hypothesis.strategies import SearchStrategy

from remix.rewards import GraderPool

Outcome = Literal["accepted", "refused"]
"""The code took the input, or turned it down in the way that it should."""

CPU_SECONDS = 5.0
"""That this process may spend on one input."""
MEMORY_BYTES = 256 << 20
"""By which one input may raise the memory in use."""
MACHINE_STEPS = 25


@dataclass(frozen=True)
class Tools:
    """What targets share."""

    folder: Path
    """For files; every input writes its own anew."""
    pool: GraderPool


@dataclass
class Tally:
    """What became of a target's inputs."""

    examples: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: list[Exception] = field(default_factory=list)
    """What hypothesis raised; its notes hold the smallest input that fails."""

    def __iadd__(self, other: Tally) -> Tally:
        self.examples += other.examples
        self.accepted += other.accepted
        self.refused += other.refused
        self.seconds += other.seconds
        self.failures += other.failures
        return self

    @property
    def row(self) -> tuple[int, int, int, int, float]:
        """Examples, accepted, refused, failures, seconds."""
        return self.examples, self.accepted, self.refused, len(self.failures), round(self.seconds, 1)


@dataclass(frozen=True)
class Target:
    """One surface. `check` raises AssertionError, or lets through what the code must not raise."""

    inputs: SearchStrategy[Any]
    check: Callable[[Tools, Any], Outcome]
    examples: int
    """In the test suite."""

    def run(self, tools: Tools, tally: Tally, config: settings, number: int | None) -> None:
        def one(example: Any) -> None:
            tally.examples += 1
            with bounded():
                outcome = self.check(tools, example)
            tally.accepted += outcome == "accepted"
            tally.refused += outcome == "refused"

        test = config(given(example=self.inputs)(one))
        (test if number is None else seed(number)(test))()


@dataclass(frozen=True)
class MachineTarget:
    """A sequence of calls beside a simple model; a whole sequence counts as one example."""

    machine: Callable[[Path], RuleBasedStateMachine]
    examples: int

    def run(self, tools: Tools, tally: Tally, config: settings, number: int | None) -> None:
        def start() -> RuleBasedStateMachine:
            tally.examples += 1
            tally.accepted += 1
            return self.machine(tools.folder)

        if number is not None:
            seed(number)(start)
        run_state_machine_as_test(start, settings=config)


def fuzz(target: Target | MachineTarget, tools: Tools, examples: int, number: int | None = None) -> Tally:
    """So many inputs, derandomised without a seed `number`."""
    tally = Tally()
    config = settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        stateful_step_count=MACHINE_STEPS,
    )
    began = time.perf_counter()
    try:
        target.run(tools, tally, config, number)
    except Exception as failure:
        tally.failures.append(failure)
    tally.seconds = time.perf_counter() - began
    return tally


@contextmanager
def bounded() -> Iterator[None]:
    """Raises AssertionError where an input takes too much of this process's time or memory."""

    def too_slow(*_: object) -> None:
        raise AssertionError(f"takes more than {CPU_SECONDS} s of the processor")

    # Virtual time is the process's own: a busy machine does not count, and pytest's real-time alarm is left alone.
    before = signal.signal(signal.SIGVTALRM, too_slow)
    memory = _peak_memory(reset=True)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    grown = _peak_memory() - memory
    assert grown <= MEMORY_BYTES, f"takes {grown >> 20} MiB of memory"


def _peak_memory(reset: bool = False) -> int:
    """Bytes of the highest resident set, since the last reset where the system allows one."""
    if reset:
        with suppress(OSError):  # a read-only /proc: the peak is then that of the process's life
            Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0
