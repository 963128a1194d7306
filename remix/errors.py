"""What ends a run early, apart from mistakes in the request, which are ValueErrors."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


class Interrupted(BaseException):
    """Somebody asked the run to stop. Like KeyboardInterrupt no Exception, so that nothing takes it for a failure."""


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
