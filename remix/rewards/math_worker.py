"""The grader's worker process: [golds, answer, tolerance] in, [verdict, extracted] out.

Started as `python -m remix.rewards.math_worker MEMORY_BYTES CPU_SECONDS` by `remix.rewards.pool`.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
import time
from typing import Any

from remix.rewards.equivalence import judge, warm_up
from remix.rewards.serving import Handler, serve


def main() -> None:
    memory, cpu_seconds = int(sys.argv[1]), float(sys.argv[2])
    _limit(resource.RLIMIT_AS, memory)
    _limit(resource.RLIMIT_CORE, 0)

    def handle(request: Any) -> list[Any]:
        # Should the parent be gone, nobody enforces the deadline: then this ends a computation that does not.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_seconds))
        golds, answer, tolerance = request
        try:
            found = judge(golds, answer, tolerance)
        except MemoryError:
            raise  # ends this process: the next answer deserves a clean one
        except Exception:  # a parser and computer algebra, on whatever a model wrote
            return ["error", None]
        return [found.verdict, found.extracted]

    def prepare() -> Handler:
        logging.disable(logging.CRITICAL)  # math-verify warns that its own time-outs are off
        warm_up()
        # From here on, what libraries print would fill the log with warnings of model text.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        return handle

    serve(prepare)


def _limit(kind: int, value: int) -> None:
    """Lower the soft limit; the hard one, which can never be raised again, stays."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()
