"""What ends a run early, apart from mistakes in the request, which are ValueErrors."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""
