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

from remix.errors import TrainingError
from remix.training.interruption import EXIT_FAILED

GO_ON = "The run goes on from its last checkpoint with --resume"


class Watchdog:
    """Every rank notes in the store that all share where it is; a thread looks after the time it waits.

    The thread, since a collective that hangs in native code can be neither interrupted nor given another deadline.
    """

    def __init__(self, rank: int, world_size: int, store: Any, timeout: float) -> None:
        """`store`: a torch.distributed store; `timeout`: seconds that a rank waits for the others."""
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
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
        except RuntimeError as error:  # of any communication library: the connection to a rank is lost
            if isinstance(error, TrainingError):
                raise
            missing = self.missing(patience=2.0)
            if missing is None:
                raise
            raise TrainingError(missing) from error
        finally:
            self._waiting = None

    def missing(self, patience: float = 0.0) -> str | None:
        """The ranks that have died, or else are stopped, or else have not come to where this one waits.

        None where it waits for nobody, or all have come. `patience`: seconds that a process which has just been
        killed may take to be gone.
        """
        if self._waiting is None:
            return None
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline = time.monotonic() + patience
        try:
            while True:
                dead = [rank for rank in others if self._state(rank) == "dead"]
                if dead or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            stopped = [rank for rank in others if self._state(rank) == "stopped"]
            late = [rank for rank in others if int(self._get("place", rank)["arrivals"]) < self._arrivals]
            said = [self._describe(rank) for rank in dead or stopped or late]
        except RuntimeError:  # the store is with the launcher of the first machine
            return f"the store of the run does not answer rank {self.rank}: its launcher or machine is gone"
        return f"{'; '.join(said)}. {GO_ON}" if said else None

    def _describe(self, rank: int) -> str:
        process, place, state = self._get("process", rank), self._get("place", rank), self._state(rank)
        where = f"rank {rank} (process {process['pid']} on {process['host']})"
        if state == "dead":
            return f"{where} has died; it was last seen at {place['stage']}"
        return f"{where} hangs{' (it is stopped)' if state == 'stopped' else ''}; it was last seen at {place['stage']}"

    def _state(self, rank: int) -> str:
        """dead, stopped or alive, as far as this machine can tell."""
        process = self._get("process", rank)
        if process["host"] != socket.gethostname():
            return "alive"
        try:
            stat = Path(f"/proc/{process['pid']}/stat").read_text(encoding="utf-8")
        except OSError:
            return "dead" if Path("/proc/self").exists() else "alive"
        code = stat.rpartition(")")[2].split()[0]
        return {"Z": "dead", "X": "dead", "T": "stopped"}.get(code, "alive")

    def _look_after(self) -> None:
        while True:
            time.sleep(min(1.0, self.timeout / 10))
            waiting = self._waiting
            if waiting is not None and time.monotonic() - waiting[1] > self.timeout:
                missing = self.missing() or f"all have arrived: the connection hangs. {GO_ON}"
                waited = f"rank {self.rank} has waited {self.timeout:g} s (faults.rank_timeout) at {waiting[0]}"
                os.write(2, f"error: {waited}: {missing}\n".encode())
                os._exit(EXIT_FAILED)

    def _set(self, key: str, value: dict[str, Any]) -> None:
        self._store.set(f"remix/{key}/{self.rank}", json.dumps(value))

    def _get(self, key: str, rank: int) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._store.get(f"remix/{key}/{rank}"))
        return value
