"""What learning one task after the other does to the others.

a[t][i] is the accuracy on task i after task t was learnt; T tasks, rows and columns in the order of learning. Formulas
as in GEM (arXiv 1706.08840) and Chaudhry et al. (arXiv 1801.10112), the four that PAM (arXiv 2506.03189) reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]
"""[T][T], in shares from 0 to 1; or its first rows, while a run is under way."""


def average_accuracy(a: Matrix) -> float:
    """ACC = 1/t Σ_{i≤t} a[t, i] at the last row t: over the tasks learnt so far."""
    return fmean(a[-1][: len(a)])


def backward_transfer(a: Matrix) -> float | None:
    """BWT = 1/(t-1) Σ_{i<t} (a[t, i] - a[i, i]). None after a single task."""
    last = len(a) - 1
    return fmean(a[last][i] - a[i][i] for i in range(last)) if last else None


def forgetting(a: Matrix) -> float | None:
    """1/(t-1) Σ_{i<t} (max_{s<t} a[s, i] - a[t, i]). None after a single task."""
    last = len(a) - 1
    return fmean(max(row[i] for row in a[:last]) - a[last][i] for i in range(last)) if last else None


def zero_shot(a: Matrix) -> float | None:
    """The mean of a[t, i] over all i > t: tasks that had not been learnt yet. None where there are none."""
    unseen = [value for t, row in enumerate(a) for value in row[t + 1 :]]
    return fmean(unseen) if unseen else None


def summary(a: Matrix) -> dict[str, float | None]:
    """All four by name."""
    return {
        "ACC": average_accuracy(a),
        "BWT": backward_transfer(a),
        "forgetting": forgetting(a),
        "zero_shot": zero_shot(a),
    }
