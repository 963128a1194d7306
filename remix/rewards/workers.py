"""Processes that can be killed: every request runs under its own wall-clock deadline, and none takes the caller along.

A worker that overruns is killed and its request is a `timeout`; one that dies leaves an `error`; in both cases that
request alone is lost and a new worker takes the place. Workers are plain subprocesses that speak JSON lines
(`remix.rewards.serving` is their side): unlike alarm signals they work in any thread, and unlike multiprocessing they
neither fork a process that holds a GPU nor import its main module again, and daemonic processes may start them.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

START_SECONDS = 120.0
"""How long a worker may take to import what it needs, on a busy machine."""
CHECK_SECONDS = 1.0
"""How often a silent worker is looked after: what it has forked may hold its pipes open when it is gone."""
KILL_SECONDS = 5.0
"""How long a killed worker is waited for: one in a system call that never ends, as of a dead network drive, stays."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A request without a reply."""

    verdict: Literal["timeout", "error"]
    reason: str


Reply = list[Any]
"""What a worker answers: a JSON array."""


class StartError(RuntimeError):
    """A worker that did not come up, in its own words where it had any."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What to start, and what to call it where it fails."""

    module: str
    arguments: tuple[str, ...]
    name: str
    by_hand: str
    """The command that shows why one does not start."""
    timeout: float
    """Seconds for one request."""
    start_seconds: float = START_SECONDS


class WorkerPool:
    """Up to `size` processes, started when a request needs them. Several threads may call it, one is served at a time.

    The workers of a process that is killed are killed with it.
    """

    def __init__(self, spec: WorkerSpec, size: int) -> None:
        self._spec, self._size = spec, size
        self._workers: list[_Worker] = []
        self._starter: ThreadPoolExecutor | None = None
        self._proven = False
        """A worker has come up before: one that does not is a failure on the way and no mistake in the request."""
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Bring up all workers now. Raises StartError where one does not come up."""
        with self._lock, self._stopping_on_errors():
            self._sweep()
            self._staff(self._size)
            while starting := [worker for worker in self._workers if not worker.ready]:
                for worker, heard in _listen(starting):
                    worker.attend(heard)
            self._proven = True

    def map(self, requests: Sequence[Any]) -> list[Reply | Lost]:
        """One reply per request, in order; a request is whatever JSON can hold.

        Raises StartError where no worker has come up before. Later on, what cannot be served for want of workers is
        lost as an `error`, and the next call tries again.
        """
        if not requests:
            return []
        with self._lock, self._stopping_on_errors():
            return self._run(requests)

    def close(self) -> None:
        """End the workers. A later call starts new ones."""
        with self._lock:
            self._stop()

    def _run(self, requests: Sequence[Any]) -> list[Reply | Lost]:
        """Hand out requests, one per worker at a time, until each has its reply or is lost."""
        found: dict[int, Reply | Lost] = {}
        waiting = deque(enumerate(requests))
        self._sweep()
        wanted = min(self._size, len(requests))
        while True:
            try:
                self._staff(wanted)
                if len(found) == len(requests):
                    return [found[task] for task in range(len(requests))]
                self._exchange(waiting, found)
            except StartError as error:
                if not self._proven:
                    raise
                wanted = sum(not worker.lost for worker in self._workers)  # these do the rest of this call
                if not wanted:
                    found |= {task: Lost("error", str(error)) for task, _ in waiting}

    def _exchange(self, waiting: deque[tuple[int, Any]], found: dict[int, Reply | Lost]) -> None:
        """Give idle workers what waits, and collect what the others have found until the first of them is heard."""
        for worker in self._workers:
            if worker.ready and worker.task is None and waiting:
                worker.send(*waiting.popleft())
        for worker, heard in _listen([w for w in self._workers if not w.ready or w.task is not None]):
            task, reply = worker.task, worker.attend(heard)
            self._proven = self._proven or worker.ready
            if task is not None and reply is not None:
                found[task] = reply

    def _sweep(self) -> None:
        """Forget workers that ended since the last call, and those of a parent that has forked."""
        if self._owner != os.getpid():  # talking to the parent's would mix up replies; its thread is not here either
            self._owner, self._workers, self._starter = os.getpid(), [], None
        for worker in self._workers:
            if not worker.running:
                worker.kill()

    def _staff(self, size: int) -> None:
        """At least `size` workers."""
        self._workers = [worker for worker in self._workers if not worker.lost]
        while len(self._workers) < size:
            if self._starter is None:
                # A worker ends with the *thread* that started it, so that is none of the callers'.
                self._starter = ThreadPoolExecutor(1, thread_name_prefix="remix-worker-starter")
            try:
                self._workers.append(self._starter.submit(_Worker, self._spec).result())
            except OSError as error:
                raise StartError(f"{self._spec.name} could not be started: {error}") from error

    @contextmanager
    def _stopping_on_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._stop()  # replies still under way would be taken for those of the next call
            raise

    def _stop(self) -> None:
        if self._owner == os.getpid():
            for worker in self._workers:
                worker.kill()
            if self._starter is not None:
                self._starter.shutdown()
        self._workers, self._starter = [], None


class _Worker:
    """One process and the request that it is at."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        # -P and the explicit path: whatever lies in the working directory, the worker imports this very package.
        package_root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", spec.module, *spec.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C is for the parent, which then ends its workers, each with all that it started itself.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self._unsent = memoryview(b"")
        self._received = b""
        self.ready = self.lost = False
        self.task: int | None = None
        self.deadline = time.monotonic() + spec.start_seconds

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def sending(self) -> bool:
        return bool(self._unsent)

    def send(self, task: int, request: Any) -> None:
        self.task, self.deadline = task, time.monotonic() + self._spec.timeout
        self._unsent = memoryview(json.dumps(request).encode() + b"\n")

    def attend(self, heard: bool) -> Reply | Lost | None:
        """Read and write what its pipes take; the reply once its task has ended, one way or the other."""
        try:
            line = self._exchange() if heard else None
            if line is None:
                if time.monotonic() > self.deadline:
                    return self._overrun()
                if not heard and not self.running:
                    raise EOFError
                return None
            said = json.loads(line)
        except (BrokenPipeError, EOFError, ValueError):
            return self._dead()
        if self.ready:
            self.task = None
            return list(said)
        if said is not None:
            self.kill()
            raise StartError(said)
        self.ready = True
        return None

    def kill(self) -> None:
        """End it and whatever it has started that is still in its session."""
        if self.lost:
            return  # its number may be another's by now
        self.lost = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _exchange(self) -> bytes | None:
        """A line if one is complete. Nothing here blocks, so that a stopped worker cannot hold up the others."""
        try:
            if self._unsent:
                self._unsent = self._unsent[os.write(self.stdin, self._unsent) :]
            chunk = os.read(self.stdout, 1 << 16)
        except BlockingIOError:
            return None
        if not chunk:
            raise EOFError
        self._received += chunk
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        return line

    def _overrun(self) -> Lost:
        self.kill()
        if not self.ready:
            raise self._start_error(f"did not start within {self._spec.start_seconds:g} s")
        return Lost("timeout", f"no reply within {self._spec.timeout:g} s")

    def _dead(self) -> Lost:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # its pipes close a moment before it has an exit code
        self.kill()
        code = self._process.returncode
        killed = code is not None and code < 0
        end = f"signal {-code}: {signal.strsignal(-code)}" if killed else f"exit code {code}"
        if not self.ready:
            raise self._start_error(f"did not start ({end})")
        return Lost("error", f"its process died ({end})")

    def _start_error(self, what: str) -> StartError:
        return StartError(f"{self._spec.name} {what}; see above, or run `{self._spec.by_hand}` to see why")


def _listen(workers: Sequence[_Worker]) -> list[tuple[_Worker, bool]]:
    """Each worker and whether its pipes can be read or written to, waiting for the first deadline at most."""
    seconds = min(CHECK_SECONDS, min(worker.deadline for worker in workers) - time.monotonic())
    with selectors.PollSelector() as selector:  # unlike select(), fit for processes with thousands of open files
        for worker in workers:
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
            if worker.sending:
                selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        heard = {id(key.data) for key, _ in selector.select(max(0.0, seconds))}
    return [(worker, id(worker) in heard) for worker in workers]
