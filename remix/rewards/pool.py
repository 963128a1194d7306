"""Grading in processes that can be killed, each answer under its own wall-clock deadline.

A worker that overruns is killed and its answer is a `timeout`; one that dies leaves an `error`; in both cases that
answer alone is lost and a new worker takes the place. Workers are plain subprocesses that speak JSON lines: unlike
alarm signals they work in any thread, and unlike multiprocessing they neither fork a process that holds a GPU nor
import its main module again, and daemonic processes may start them.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from remix.rewards.answers.extract import extract
from remix.rewards.equivalence import Grade, gold_answer, quick_grade

if TYPE_CHECKING:
    from remix.types import Verdict

START_SECONDS = 120.0
"""How long a worker may take to import what it needs, on a busy machine."""
MEMORY_BYTES = 2 * 1024**3
"""Address space of one worker."""

_Request = tuple[list[str], str, float | None]
"""Golds, answer, tolerance."""


class GraderPool:
    """Up to `workers` grading processes, started when an answer needs them. Several threads may call it."""

    def __init__(self, workers: int = 2, timeout: float = 5.0, memory: int = MEMORY_BYTES) -> None:
        self._size, self._timeout, self._memory = workers, timeout, memory
        self._workers: list[_Worker] = []
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def grade(
        self, golds: Sequence[Sequence[str]], responses: Sequence[str], tolerance: float | None = None
    ) -> list[Grade]:
        """One grade per response, in order; each response comes with one or more gold answers.

        `tolerance`: the relative error that a benchmark allows numerical answers, such as 0.01.
        """
        answers = [extract(response) for response in responses]
        grades = [quick_grade(*pair) for pair in zip(golds, answers, strict=True)]
        requests: dict[int, _Request] = {
            index: (list(map(gold_answer, golds[index])), str(answers[index]), tolerance)
            for index, found in enumerate(grades)
            if found is None
        }
        if requests:
            with self._lock:
                try:
                    for index, found in self._run(requests):
                        grades[index] = found
                except BaseException:
                    self._stop()  # replies still under way would be taken for those of the next call
                    raise
        return [found for found in grades if found is not None]

    def close(self) -> None:
        """End the workers. A later call starts new ones."""
        with self._lock:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, requests: Mapping[int, _Request]) -> Iterator[tuple[int, Grade]]:
        """Hand out requests, one per worker at a time, and yield the grades as they come."""
        waiting = deque(requests.items())
        self._staff(min(self._size, len(waiting)))
        while waiting or any(worker.task is not None for worker in self._workers):
            for worker in self._workers:
                if worker.idle and waiting:
                    worker.send(*waiting.popleft())
            active = [worker for worker in self._workers if not worker.idle]
            heard = _heard(active, min(worker.deadline for worker in active) - time.monotonic())
            for worker in active:
                task, found = worker.task, worker.attend(worker in heard)
                if not worker.running:
                    self._workers[self._workers.index(worker)] = self._start()
                if task is not None and found is not None:
                    yield task, found

    def _staff(self, size: int) -> None:
        """At least `size` workers that run."""
        if self._owner != os.getpid():  # forked: these are the parent's, and talking to them would mix up replies
            self._owner, self._workers = os.getpid(), []
        for worker in [worker for worker in self._workers if not worker.running]:
            worker.kill()
            self._workers.remove(worker)
        self._workers += [self._start() for _ in range(size - len(self._workers))]

    def _start(self) -> _Worker:
        return _Worker(self._timeout, self._memory)

    def _stop(self) -> None:
        if self._owner == os.getpid():
            for worker in self._workers:
                worker.kill()
        self._workers = []


class _Worker:
    """One process of `remix.rewards.math_worker` and the answer that it is at."""

    def __init__(self, timeout: float, memory: int) -> None:
        # -P and the explicit path: whatever lies in the working directory, the worker imports this very package.
        package_root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "remix.rewards.math_worker", str(memory), str(timeout + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self._timeout = timeout
        self._ready = False
        self._unsent = b""
        self._received = b""
        self.task: int | None = None
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def idle(self) -> bool:
        return self._ready and self.task is None

    @property
    def sending(self) -> bool:
        return bool(self._unsent)

    def send(self, task: int, request: _Request) -> None:
        self.task, self.deadline = task, time.monotonic() + self._timeout
        self._unsent = json.dumps(request).encode() + b"\n"

    def attend(self, heard: bool) -> Grade | None:
        """Read and write what its pipes take; the grade once its task has ended, one way or the other."""
        try:
            line = self._exchange() if heard else None
        except (BrokenPipeError, EOFError):
            return self._lose("error")
        if line is not None and self._ready:
            self.task = None
            return Grade(*json.loads(line))
        if line is not None:
            self._ready = True
        elif time.monotonic() > self.deadline:
            return self._lose("timeout")
        return None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
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

    def _lose(self, verdict: Verdict) -> Grade:
        self.kill()
        if not self._ready:
            raise RuntimeError(
                f"a grader process did not start within {START_SECONDS:.0f} s (exit code {self._process.returncode}); "
                f"see above, or run `{sys.executable} -m remix.rewards.math_worker {MEMORY_BYTES} 5` to see why"
            )
        return Grade(verdict)


def _heard(workers: Sequence[_Worker], seconds: float) -> list[_Worker]:
    """The workers whose pipes can be read or written to, waiting for one at most so long."""
    with selectors.PollSelector() as selector:  # unlike select(), fit for processes with thousands of open files
        for worker in workers:
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
            if worker.sending:
                selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        return [key.data for key, _ in selector.select(max(0.0, seconds))]
