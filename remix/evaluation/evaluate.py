"""pass@1 of a policy on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from remix.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Averages over problems, each problem's over its samples."""

    pass_at_1: float
    """Share of correct samples: the unbiased estimate of a single try."""
    response_length: float
    """Tokens."""
    truncated: float
    """Share of responses cut at the token limit."""
    failed: float
    """Share of answers on which the grader itself failed (time-out or error); they count as not correct."""

    def metrics(self) -> dict[str, float]:
        return {
            "eval/pass@1": self.pass_at_1,
            "eval/response_length": self.response_length,
            "eval/truncated": self.truncated,
            "eval/grader_failed": self.failed,
        }


def evaluate(groups: Sequence[RolloutGroup]) -> Evaluation:
    """From scored groups, one a problem. Raises ValueError without any."""
    if not groups:
        raise ValueError("nothing to evaluate: no held-out prompts; raise `holdout`, or name an evaluation split")
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    verdicts = [[r.score.verdict for r in group.rollouts if r.score is not None] for group in groups]
    return Evaluation(
        pass_at_1=fmean(fmean(verdict == "correct" for verdict in of_problem) for of_problem in verdicts),
        response_length=fmean(len(rollout.response_ids) for rollout in rollouts),
        truncated=fmean(rollout.truncated for rollout in rollouts),
        failed=fmean(verdict in ("timeout", "error") for of_problem in verdicts for verdict in of_problem),
    )
