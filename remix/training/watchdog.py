"""Ranks that wait for one another: the one that has died or hangs is named, and the others end in time."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from remix.errors import TrainingError
from remix.training.interruption import EXIT_FAILED, leave, say

DEATH_SECONDS = 5.0
"""How long a process that is about to end may take to be gone, and how long one that is gone is waited for: most
libraries notice by themselves that a connection is closed, and then say more."""
GO_ON = "The run goes on from its last checkpoint with --resume"


class Watchdog:
    """Every rank notes in the store that all share where it is; a thread looks after the time it waits.

    The thread, since a collective that hangs in native code can be neither interrupted nor given another deadline.
    """

    def __init__(self, rank: int, world_size: int, store: Any, timeout: float) -> None:
        """`store`: a torch.distributed store; `timeout`: seconds that a rank waits for the others."""
        self.rank, self.timeout = rank, timeout
        self._others = [other for other in range(world_size) if other != rank]
        self._store = store
        self._arrivals = 0
        self._waiting: tuple[str, float] | None = None
        """For what, and since when by the monotonic clock."""
        self._set("process", {"pid": os.getpid(), "host": socket.gethostname()})
        self._set("place", {"arrivals": 0, "stage": "the start"})
        threading.Thread(target=self._look_after, daemon=True).start()

    @contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        """What needs the other ranks. Raises TrainingError that names the one that is gone."""
        self._arrivals += 1
        try:
            self._set("place", {"arrivals": self._arrivals, "stage": stage})
            self._waiting = (stage, time.monotonic())
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of any communication library, where the connection to a rank is lost
            gone = None if isinstance(error, TrainingError) else self._gone_soon()
            if gone is None:
                raise
            raise TrainingError(gone) from error
        finally:
            self._waiting = None

    def gone(self) -> str | None:
        """The ranks that have died or are stopped, where this one waits; None where there are none."""
        if self._waiting is None:
            return None
        try:
            states = {rank: self._state(rank) for rank in self._others}
        except RuntimeError:  # the store is with the launcher of the first machine
            return f"the store of the run does not answer rank {self.rank}: its launcher or machine is gone. {GO_ON}"
        dead, stopped = ([rank for rank in self._others if states[rank] == state] for state in ("dead", "stopped"))
        return self._named(dead or stopped)

    def _gone_soon(self) -> str | None:
        deadline = time.monotonic() + DEATH_SECONDS
        while (gone := self.gone()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return gone

    def _late(self) -> str | None:
        """The ranks that have not come to where this one waits."""
        return self._named([o for o in self._others if int(self._get("place", o)["arrivals"]) < self._arrivals])

    def _look_after(self) -> None:
        dead_since: float | None = None
        while True:
            time.sleep(min(1.0, self.timeout / 10))
            waiting, now = self._waiting, time.monotonic()
            if waiting is None:
                dead_since = None
                continue
            gone = self.gone() if now - waiting[1] > DEATH_SECONDS else None
            dead_since = (dead_since or now) if gone is not None and "has died" in gone else None
            if dead_since is not None and now - dead_since > DEATH_SECONDS:
                self._end(waiting, f"{gone}")
            if now - waiting[1] > self.timeout:
                why = gone or self._late() or f"all have come, so the connection between them hangs. {GO_ON}"
                waited = f"rank {self.rank} has waited {self.timeout:g} s (faults.rank_timeout) at {waiting[0]}"
                self._end(waiting, f"{waited}: {why}")

    def _end(self, waiting: tuple[str, float], why: str) -> None:
        if self._waiting is waiting:
            say(f"error: {why}")
            leave(EXIT_FAILED)

    def _named(self, ranks: list[int]) -> str | None:
        return f"{'; '.join(map(self._describe, ranks))}. {GO_ON}" if ranks else None

    def _describe(self, rank: int) -> str:
        process, place, state = self._get("process", rank), self._get("place", rank), self._state(rank)
        said = {"dead": "has died", "stopped": "hangs (it is stopped)"}.get(state, "hangs")
        return (
            f"rank {rank} (process {process['pid']} on {process['host']}) {said}; it was last seen at {place['stage']}"
        )

    def _state(self, rank: int) -> str:
        """dead, stopped or alive, as far as this machine can tell."""
        process = self._get("process", rank)
        if process["host"] != socket.gethostname() or not Path("/proc/self/stat").exists():
            return "alive"
        try:
            stat = Path(f"/proc/{process['pid']}/stat").read_text(encoding="utf-8")
        except OSError:
            return "dead"
        return {"Z": "dead", "X": "dead", "T": "stopped"}.get(stat.rpartition(")")[2].split()[0], "alive")

    def _set(self, key: str, value: dict[str, Any]) -> None:
        self._store.set(f"remix/{key}/{self.rank}", json.dumps(value))

    def _get(self, key: str, rank: int) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._store.get(f"remix/{key}/{rank}"))
        return value
