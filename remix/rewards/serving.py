"""The worker's side of `remix.rewards.workers`: a JSON line in, a JSON line out, whatever happens in between.

Free of torch, so that a worker starts fast and holds little memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

Handler = Callable[[Any], list[Any]]
"""From a request to the reply, both as JSON has them."""

_PR_SET_PDEATHSIG = 1


class CannotServeError(Exception):
    """What the worker is asked to serve is not to be had; the message is for whoever asked."""


def serve(prepare: Callable[[], Handler]) -> None:
    """Say `null`, or why not, once the handler is prepared; then answer requests until there are no more.

    The pipes are kept private: what anything prints goes to standard error, and standard input is empty.
    """
    _end_with_parent()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    worker = os.getpid()

    def say(reply: list[Any] | str | None) -> None:
        if os.getpid() != worker:
            os._exit(0)  # a child that the handler forked and did not end: it has no say
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()

    try:
        handle = prepare()
    except CannotServeError as error:
        return say(str(error))
    say(None)
    for line in requests:
        say(handle(json.loads(line)))


def _end_with_parent() -> None:
    """Linux kills this process when the thread that started it ends: inside a request, no end of file is seen.

    A parent that has ended before this call is noticed by that end of file.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
