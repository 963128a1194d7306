"""A call in a thread beside the trainer's own work: the next step is sampled while this one updates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar

A = TypeVar("A")
STOP_SECONDS = 5.0
"""How long a call that nobody wants any more is waited for."""


class Beside(Generic[A]):
    """`work`, from where the block is entered. Whoever leaves the block early, by an error or a signal, ends it.

    It must not speak to other ranks, who would each hear the call at another moment.
    """

    def __init__(self, work: Callable[[], A], abandon: Callable[[], None]) -> None:
        """`abandon`: makes `work` end soon, whichever way."""
        self._work, self._abandon = work, abandon
        self._found: Future[A] = Future()
        self._thread = threading.Thread(target=self._run, name="beside-the-trainer", daemon=True)
        self._began = self._ended = self._asked = 0.0

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._found.done():
            self._abandon()
            self._thread.join(STOP_SECONDS)

    def result(self) -> A:
        """Waits for it. Raises what `work` raises."""
        self._asked = time.perf_counter()
        return self._found.result()

    def metrics(self) -> dict[str, float]:
        """Of a call that has a result: its seconds, and the share of them that passed before anybody waited."""
        seconds = self._ended - self._began
        return {"time/ahead": seconds, "time/ahead_hidden": min(1.0, (self._asked - self._began) / seconds)}

    def _run(self) -> None:
        try:
            found: Any = self._work()
        except BaseException as error:  # whatever it is, it is for who waits
            self._ended = time.perf_counter()
            self._found.set_exception(error)
        else:
            self._ended = time.perf_counter()
            self._found.set_result(found)
