"""Libraries of many modules, imported sooner."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """What is imported within lasts as long as the process: the garbage collector does not look through it, neither
    while it grows nor in any later collection. For processes of our own: what else is there by then is passed over too.
    """
    enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
            atexit.register(gc.unfreeze)  # or some would say at the end that something is left
        if enabled:
            gc.enable()
