"""Calls in processes of their own, several at a time: what the studies run their cells by."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import TypeVar

Of = TypeVar("Of")
Result = TypeVar("Result")


def in_processes(work: Callable[[Of], Result], items: Sequence[Of], jobs: int) -> Iterator[tuple[Of, Result]]:
    """Each item with its result, as they come. What a call raises is raised here, and none is begun after it."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), end_with_parent) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def end_with_parent() -> None:
    """In a worker: nobody waits for what it does once the study is killed, and the next study does it itself."""
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
