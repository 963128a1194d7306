"""What is done to engines, and what is seen of their processes from outside."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import torch

from remix.errors import Interrupted
from remix.types import Completion

LISTEN = "0A"


def assert_identical(got: Sequence[Completion], expected: Sequence[Completion]) -> None:
    """Bit for bit."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.response_ids, other.response_ids)
        assert torch.equal(one.sampler_logprobs, other.sampler_logprobs)
        assert one.finish_reason == other.finish_reason


@contextmanager
def interruption(delay: float) -> Iterator[None]:
    """After so many seconds a signal handler raises Interrupted in this thread.

    The collector rests meanwhile: what is raised in a callback of it, as hypothesis has one, is lost.
    """

    def handler(*_: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGUSR1))
    gc.disable()
    timer.start()
    try:
        yield
    finally:
        timer.join()
        gc.enable()
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def later(delay: float, pid: int, number: int) -> Iterator[None]:
    """The process gets the signal after so many seconds."""
    timer = threading.Timer(delay, os.kill, (pid, number))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def listening(pid: int) -> list[IPv4Address | IPv6Address]:
    """The addresses on which TCP sockets of a process listen."""
    mine = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()
    ]
    return [_address(row[1]) for row in rows if row[3] == LISTEN and f"socket:[{row[9]}]" in mine]


def _address(local: str) -> IPv4Address | IPv6Address:
    """Of 0100007F:1F90: words of 32 bits in the machine's byte order, then the port."""
    words = local.split(":")[0]
    return ip_address(b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8)))


def alive(pid: int) -> bool:
    """It runs: neither gone nor a zombie that nobody has buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
