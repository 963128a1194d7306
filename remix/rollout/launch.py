"""The servers that a run starts for itself: on loopback, with a key of their own, started again when they die."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp

import torch

from remix.rollout.process import LAST_WORDS, START_SECONDS, child_environment
from remix.rollout.serve import KEY, check_free
from remix.terminal import printable

LOOPBACK = "127.0.0.1"
LOOK_SECONDS = 0.5
"""Between two looks at whether a server lives."""


def choose_ports(first: int | None, count: int) -> list[int]:
    """Raises ValueError where one that was asked for is in use."""
    if first is not None:
        ports = list(range(first, first + count))
        for port in ports:
            check_free(LOOPBACK, port, "rollout.engine.port")
        return ports
    with contextlib.ExitStack() as stack:  # open together, so that they differ
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


class OwnServers:
    """Processes of `remix.rollout.serve`, which end with this one, also if it is killed.

    A thread looks after them: one that died is started again and, once it answers, given the current weights.
    """

    def __init__(
        self,
        model: str,
        options: Sequence[str],
        *,
        ports: Sequence[int],
        devices: Sequence[str],
        key: str,
        max_restarts: int,
        message: Callable[[str], None],
        revive: Callable[[str], bool],
    ) -> None:
        """options: of `remix.rollout.serve`. devices: see the recipe. message: is told of each restart.

        revive: is asked with the address of a server that was started again until it has made it one of those in use.
        """
        self.urls = [f"http://{LOOPBACK}:{port}" for port in ports]
        self.restarts = 0
        """Servers that took the place of one that died."""
        self._words = [[model, f"--host={LOOPBACK}", f"--port={port}", *options] for port in ports]
        self._environments = [_environment(key, devices[i] if devices else None) for i in range(len(ports))]
        self._max_restarts = max_restarts
        self._message, self._revive = message, revive
        self._folder = Path(mkdtemp(prefix="remix-servers-"))
        self._processes = [self._start(index) for index in range(len(ports))]
        self._closing = threading.Event()
        self._reviving: set[int] = set()
        self._keeper = threading.Thread(target=self._keep, name="server-keeper", daemon=True)

    def wait(self, answers: Callable[[str], bool]) -> None:
        """Until all answer; from then on they are looked after. Raises ValueError where one ends instead."""
        deadline = time.monotonic() + START_SECONDS
        for index, url in enumerate(self.urls):
            while not answers(url):
                code = self._processes[index].poll()
                if code is not None or time.monotonic() > deadline:
                    how = "does not answer" if code is None else f"ended with exit status {code}"
                    raise ValueError(
                        f"rollout.engine: the vLLM server that was started for the run {how}. "
                        f"Its last words: {self.last_words(index) or 'none'}"
                    )
                time.sleep(LOOK_SECONDS)
        self._keeper.start()

    def last_words(self, index: int) -> str:
        """The end of what a server printed, safe to show."""
        said = self._log(index).read_bytes()[-4 * LAST_WORDS :].decode(errors="replace")
        return printable(said).strip()[-LAST_WORDS:]

    @property
    def hopeful(self) -> bool:
        """Whether one that is gone comes back."""
        alive = any(process.poll() is None for process in self._processes)
        return alive or self.restarts < self._max_restarts

    def close(self) -> None:
        """Ends them all. Closing twice is fine."""
        self._closing.set()
        if self._keeper.is_alive():
            self._keeper.join()
        for process in self._processes:
            _end(process)
        shutil.rmtree(self._folder, ignore_errors=True)

    def end(self, url: str) -> None:
        """One that hangs; it will be started again."""
        index = self.urls.index(url)
        if index not in self._reviving:
            _end(self._processes[index])

    def _keep(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            for index in range(len(self.urls)):
                self._look_after(index)

    def _look_after(self, index: int) -> None:
        ended = self._processes[index].poll() is not None
        if ended and self.restarts < self._max_restarts:
            self.restarts += 1
            self._reviving.add(index)
            self._message(
                f"the vLLM server {self.urls[index]} has ended: starting it again "
                f"({self.restarts} of {self._max_restarts} restarts)"
            )
            self._processes[index] = self._start(index)
        elif ended or (index in self._reviving and self._revive(self.urls[index])):
            self._reviving.discard(index)

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "remix.rollout.serve", f"--parent={os.getpid()}", *self._words[index]]
        with self._log(index).open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environments[index],
                start_new_session=True,  # Ctrl-C is for the trainer
            )

    def _log(self, index: int) -> Path:
        return self._folder / f"{index}.log"


def _environment(key: str, devices: str | None) -> Mapping[str, str]:
    environment = child_environment(os.environ, torch.device("cpu"))
    environment |= {KEY: key}
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return environment if devices is None else environment | {"CUDA_VISIBLE_DEVICES": devices}


def _end(process: subprocess.Popen[bytes]) -> None:
    """It ends its server, which has a process group of its own, as it goes."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
