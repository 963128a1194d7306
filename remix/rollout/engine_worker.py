"""The engine's process: a `VLLMEngine` that answers the frames of `remix.rollout.process` on its standard streams.

Started as `python -m remix.rollout.engine_worker PARENT_PID`. The first frame holds the engine's arguments, every
further one a call; each is answered by one frame. A ValueError is an answer, any other error ends this process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from remix.imports import lasting
from remix.rollout import frames

if TYPE_CHECKING:
    from remix.rollout.vllm import VLLMEngine

PR_SET_PDEATHSIG = 1
"""Of <linux/prctl.h>: the signal that this process gets when the thread that started it ends."""


def main() -> None:
    _die_with(int(sys.argv[1]))
    faulthandler.enable()  # a crash of compiled code leaves last words too
    calls, replies = _own_pipes()
    first = frames.read(calls)
    assert first is not None
    try:
        engine = _build(first.plain)
    except (ValueError, ModuleNotFoundError) as error:
        frames.write(replies, frames.pack({"error": str(error)}))
        return
    frames.write(replies, frames.pack({"kv_blocks": engine.kv_blocks}))
    while (message := frames.read(calls)) is not None:
        arriving = _weights(calls) if message.plain["call"] == "sync" else iter(())
        try:
            reply = _answer(engine, message, arriving)
        except ValueError as error:
            for _ in arriving:
                pass  # what is still on its way is no call
            reply = frames.pack({"error": str(error)})
        frames.write(replies, reply)
    engine.close()


def _die_with(parent: int) -> None:
    """Whatever this process is at, it ends with its trainer, also one that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:  # gone before it could be watched
        sys.exit(1)


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the trainer, out of reach of whatever else reads or prints here."""
    calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return calls, replies


def _build(arguments: dict[str, Any]) -> VLLMEngine:
    with lasting():
        from remix.rollout.vllm import VLLMEngine

    return VLLMEngine(**arguments)


def _answer(engine: VLLMEngine, message: frames.Message, arriving: Iterator[tuple[str, Tensor]]) -> bytes:
    if message.plain["call"] == "sync":
        engine.sync(arriving)
        return frames.pack({})
    return frames.pack_completions(engine.generate(*frames.unpack_requests(message)))


def _weights(calls: BinaryIO) -> Iterator[tuple[str, Tensor]]:
    """One frame a tensor, and one without a name after the last."""
    while True:
        message = frames.read(calls)
        if message is None:
            raise EOFError("the trainer hung up amid its weights")
        if message.plain["weight"] is None:
            return
        yield message.plain["weight"], message.tensors["tensor"]


if __name__ == "__main__":
    main()
