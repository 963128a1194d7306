"""What in a run's curves is worth a second look, in plain words, and what to try.

Every rule is a pure function of a run. A curve's beginning is the mean of its first tenth, its end that of its last
fifth (of 3 and 5 steps at least), so that one odd step says nothing. The limits are rules of thumb, set where a run of
ours or of the literature was on its way to collapse; a run may stay well beyond one of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median, pstdev
from typing import Literal, NamedTuple

from remix.reporting.runs import PASS_AT_1, Evaluation, Run, interval

FEWEST_STEPS = 8
"""Below that, no trend is made out."""
LOW_ESS, ESS_LEFT = 0.5, 0.75
"""Of the tokens; of what it was at the beginning."""
LOW_ESS_OF_A_LAG = 0.3
MUCH_CLIPPED = 0.3
ENTROPY_LEFT, ENTROPY_GROWN = 0.1, 2.0
"""Of what it was at the beginning."""
SOLVED = 0.95
"""A mean verdict or pass@1 above which entropy has no reason to stay."""
LENGTH_LOST = 0.3
"""Of the longest smoothed response length: the Whipping Effect."""
REWARD_LOST = 0.2
"""Of the gain at the peak."""
MUCH_CUT, MUCH_UNANSWERED, MUCH_UNIFORM = 0.1, 0.3, 0.7
MISGRADED, LEFT_OUT = 0.01, 0.02
MISMATCH, MISMATCH_GROWN = 1e-2, 10.0
"""Nats of KL per token between engine and trainer; a tenth of it counts if it grew so many times."""
FAR = 0.5
"""Nats of KL per token to the reference."""
SPIKE = 20.0
"""Gradient norms, by their median."""


class Finding(NamedTuple):
    """`backticks` in a remedy are keys of the recipe or files of the run."""

    weight: Literal["serious", "look"]
    title: str
    seen: str
    remedy: str


def findings(run: Run) -> list[Finding]:
    """Serious ones first."""
    found = [finding for rule in RULES for finding in rule(run)]
    return sorted(found, key=lambda finding: finding.weight != "serious")


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means over `width` neighbours, as many as there are whole windows."""
    return [fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


def beginning(values: Sequence[float]) -> float:
    return fmean(values[: max(3, len(values) // 10)])


def end(values: Sequence[float]) -> float:
    return fmean(values[-max(5, len(values) // 5) :])


def _values(run: Run, key: str) -> list[float]:
    """Of a metric, where there are enough to speak of a trend; else none."""
    values = [value for _, value in run.series(key)]
    return values if len(values) >= FEWEST_STEPS else []


def not_finite(run: Run) -> Iterator[Finding]:
    if run.not_finite:
        first, steps = min(run.not_finite.items(), key=lambda item: item[1])
        more = f" {len(run.not_finite) - 1} other metrics were so too." if len(run.not_finite) > 1 else ""
        yield Finding(
            "serious",
            "Values that are not finite",
            f"{first} was NaN or infinite first at step {steps}"
            + (f", and {more} other metrics later." if more else "."),
            "Lower `optimizer.lr` or `optimizer.max_grad_norm`, or set `model.dtype` to float32.",
        )


def skipped_updates(run: Run) -> Iterator[Finding]:
    skipped = [(row, value) for row, value in run.series("updates/skipped") if value > 0]
    if skipped:
        done = sum(value for _, value in run.series("updates"))
        count = sum(value for _, value in skipped)
        yield Finding(
            "serious",
            "Updates were skipped",
            f"Loss or gradient of {count:,.0f} of {done + count:,.0f} updates was not finite, first at step "
            f"{skipped[0][0].steps}. They were not applied.",
            "Look at the batches in `skipped/`; lower `optimizer.lr`, or set `model.dtype` to float32.",
        )


def reward_falls(run: Run) -> Iterator[Finding]:
    values = _values(run, "reward/mean")
    width = max(3, len(values) // 10)
    curve = smoothed(values, width)
    if not curve:
        return
    peak = max(curve)
    steps = [row.steps for row, _ in run.series("reward/mean")][curve.index(peak) + width - 1]
    lost = peak - curve[-1]
    # The spread of a step about its neighbours, and of the mean of a window of them.
    noise = pstdev(b - a for a, b in pairwise(values)) / math.sqrt(2 * width)
    if lost > REWARD_LOST * (peak - curve[0]) and lost > 3 * noise:
        yield Finding(
            "serious",
            "The reward falls after a peak",
            f"It was {peak:.3g} about step {steps} and is {curve[-1]:.3g} at the end.",
            "Take the model from `checkpoints/best`; end the replay phase earlier (`phases.0.until`), or lower "
            "`optimizer.lr`, `phases.0.utd_ratio` or `phases.0.off_policy_fraction`.",
        )


def accuracy_falls(run: Run) -> Iterator[Finding]:
    scored = [evaluation for evaluation in run.evaluations if evaluation.metrics.get(PASS_AT_1) is not None]
    if not scored:
        block = run.recipe.get("eval")
        every = block.get("every") if isinstance(block, Mapping) else None
        if run.result is None and run.steps < max(FEWEST_STEPS, every if isinstance(every, int) else 0):
            return  # the first one is yet to come
        yield Finding(
            "look",
            "Nothing was evaluated",
            "No pass@1 has been measured, so what the run has gained is not known.",
            "Set `eval.every`, and `eval.before` for a score of the untrained model.",
        )
        return
    best, last = max(scored, key=_pass), scored[-1]
    # Of scores whose intervals are known, a fall is what both together do not explain.
    margins = [(band.high - band.low) / 2 for e in (best, last) if (band := interval(e))]
    lost = _pass(best) - _pass(last)
    if lost > (math.hypot(*margins) if len(margins) == 2 else 0.05):
        yield Finding(
            "serious",
            "pass@1 falls after a peak",
            f"It was {_pass(best):.1%} after step {best.steps} and is {_pass(last):.1%} after step {last.steps}.",
            "Take the model from `checkpoints/best`; stop there with `max_steps`, or lower `optimizer.lr`.",
        )
    elif run.steps >= FEWEST_STEPS and scored[0].steps == 0 < last.steps and _pass(last) <= _pass(scored[0]):
        yield Finding(
            "serious",
            "Nothing was gained",
            f"pass@1 was {_pass(scored[0]):.1%} before training and is {_pass(last):.1%} after step {last.steps}.",
            "Read the samples below: are right answers scored as right? Then raise `optimizer.lr`, or take tasks "
            "that the model solves sometimes.",
        )


def few_effective_samples(run: Run) -> Iterator[Finding]:
    less = "Lower `phases.0.off_policy_fraction`, `phases.0.window`, `phases.0.utd_ratio` or `optimizer.lr`."
    values = _values(run, "ess")
    ends_at = (beginning(values), end(values)) if values else (1.0, 1.0)
    seen = "The effective sample size went from {:.0%} to {:.0%} of the tokens".format(*ends_at)
    if ends_at[1] < LOW_ESS:
        large = ": a few large importance ratios decide the gradient."
        yield Finding("serious", "Few samples do the work", seen + large, less)
        return
    if ends_at[1] < ESS_LEFT * ends_at[0]:
        yield Finding("look", "Fewer samples do the work", seen + ".", less)
    lags = {key for row in run.rows for key in row.metrics if re.fullmatch(r"ess/lag=[1-9]\d*", key)}
    ends = {key: end(of_lag) for key in lags if (of_lag := _values(run, key))}
    if ends and min(ends.values()) < LOW_ESS_OF_A_LAG:
        key = min(ends, key=lambda name: ends[name])
        yield Finding(
            "look",
            "Old samples hardly count",
            f"Of rollouts {key.rpartition('=')[2]} policies old, the effective sample size is {ends[key]:.0%}.",
            less,
        )


def much_is_clipped(run: Run) -> Iterator[Finding]:
    values = _values(run, "clip_fraction")
    if values and end(values) > MUCH_CLIPPED:
        yield Finding(
            "serious",
            "Many gradients are clipped",
            f"{end(values):.0%} of the tokens are clipped at the end, {beginning(values):.0%} were at the beginning.",
            "The policy moves too far within a step: lower `optimizer.lr`, `phases.0.utd_ratio` or "
            "`batch.minibatches`.",
        )


def entropy(run: Run) -> Iterator[Finding]:
    values = _values(run, "entropy")
    if not values or beginning(values) <= 0:
        return
    seen = f"It was {beginning(values):.3g} nats per token at the beginning and is {end(values):.3g} at the end."
    solved = any(
        values and end(values) > SOLVED for values in (_values(run, "verdict/correct"), _values(run, "reward/mean"))
    )
    if end(values) < ENTROPY_LEFT * beginning(values) and not solved:
        yield Finding(
            "serious",
            "The entropy is gone",
            seen + " The policy hardly explores any more.",
            "Raise `objective.entropy_weight`, `kl.weight` or `rollout.temperature`, or lower `optimizer.lr`.",
        )
    elif end(values) > ENTROPY_GROWN * beginning(values):
        yield Finding(
            "serious",
            "The entropy grows",
            seen + " That often comes before a collapse into noise.",
            "Lower `objective.entropy_weight` or `optimizer.lr`, or raise `kl.weight`.",
        )


def length_whips(run: Run) -> Iterator[Finding]:
    values = _values(run, "response/length")
    curve = smoothed(values, 3) if values else []
    if not curve or max(curve) <= 0:
        return
    top = curve.index(max(curve))
    lost = 1 - min(curve[top:]) / curve[top]
    if lost > LENGTH_LOST:
        recovered = curve[-1] > (1 - LENGTH_LOST / 2) * curve[top]
        yield Finding(
            "look" if recovered else "serious",
            "Responses shrank" + (" and grew again" if recovered else ""),
            f"From {curve[top]:,.0f} tokens they fell to {min(curve[top:]):,.0f} ({lost:.0%} less); they have "
            f"{curve[-1]:,.0f} at the end. Replay rewards shortness: its ratios are largest where advantages are "
            "negative.",
            "End the replay phase earlier, for example by a `length_drop` in `phases.0.until`; lower "
            "`phases.0.off_policy_fraction` or `phases.0.utd_ratio`.",
        )


def responses_are_cut(run: Run) -> Iterator[Finding]:
    values = _values(run, "response/truncated")
    if values and end(values) > MUCH_CUT:
        yield Finding(
            "serious" if end(values) > 3 * MUCH_CUT else "look",
            "Responses are cut off",
            f"{end(values):.0%} of the responses reach the token limit at the end, {beginning(values):.0%} did at the "
            "beginning.",
            "Raise `rollout.max_tokens`, or keep them out of training with `rollout.mask_overlong`.",
        )


def sampler_disagrees(run: Run) -> Iterator[Finding]:
    values = _values(run, "sampler/mismatch_kl")
    if not values:
        return
    last, grown = end(values), end(values) > MISMATCH_GROWN * beginning(values)
    if last > MISMATCH or (last > MISMATCH / 10 and grown):
        yield Finding(
            "serious",
            "Sampler and trainer disagree" + (" more and more" if grown else ""),
            f"The engine's log-probs are {last:.2g} nats per token (KL) from the trainer's at the end; at the "
            f"beginning it was {beginning(values):.2g}.",
            "Use the same precision in both (`model.dtype`), lower `optimizer.lr`, and check that the engine's build "
            "fits the model.",
        )


def grading(run: Run) -> Iterator[Finding]:
    failed = [
        (row.metrics.get("verdict/timeout") or 0.0) + (row.metrics.get("verdict/error") or 0.0) for row in run.rows
    ]
    if fmean(failed) > MISGRADED:
        yield Finding(
            "serious",
            "Responses could not be graded",
            f"{fmean(failed):.1%} of all responses got no score: the grader failed or ran out of time.",
            "Mend the reward function, or give it more time (`timeout` of a `python` reward).",
        )
    unanswered = _values(run, "verdict/no_answer")
    if unanswered and end(unanswered) > MUCH_UNANSWERED:
        yield Finding(
            "look",
            "Many responses have no answer",
            f"In {end(unanswered):.0%} of the responses no answer was found at the end.",
            "Read the samples below; say in `prompt.template` how an answer is given, or raise `rollout.max_tokens`.",
        )


def wasted_samples(run: Run) -> Iterator[Finding]:
    uniform = _values(run, "rollouts/uniform_groups")
    if run.learns_from_groups and uniform and end(uniform) > MUCH_UNIFORM:
        solved = end(_values(run, "reward/mean") or [0.0]) > 0.5
        yield Finding(
            "look",
            "Most groups teach nothing",
            f"In {end(uniform):.0%} of the groups all rewards are equal at the end: the tasks are too "
            f"{'easy' if solved else 'hard'} for this policy.",
            "Take other tasks, raise `rollout.group_size`, or sample anew with `rollout.refill.max_rounds`.",
        )
    left, whole = (sum(value for _, value in run.series(key)) for key in ("batch/left_out", "batch/rollouts"))
    if whole and left / whole > LEFT_OUT:
        yield Finding(
            "look",
            "Rollouts were left out",
            f"{left / whole:.1%} of the rollouts had no score, or log-probs that are not finite.",
            "Mend the reward if it fails; otherwise lower `optimizer.lr`.",
        )


def far_from_reference(run: Run) -> Iterator[Finding]:
    values = _values(run, "kl/reference")
    if values and end(values) > FAR:
        yield Finding(
            "look",
            "The policy is far from its reference",
            f"KL to the reference is {end(values):.2g} nats per token at the end.",
            "Raise `kl.weight` or lower `optimizer.lr`, if the samples below read worse than they score.",
        )


def gradients_spike(run: Run) -> Iterator[Finding]:
    found = [(value, row.steps) for row, value in run.series("grad_norm/policy")]
    if len(found) >= FEWEST_STEPS:
        (most, steps), usual = max(found), median(value for value, _ in found)
        if usual > 0 and most > SPIKE * usual:
            yield Finding(
                "look",
                "The gradient spikes",
                f"Its norm was {most:.3g} at step {steps}, {most / usual:.0f} times the median.",
                "Lower `optimizer.max_grad_norm` or `optimizer.lr`; warm up longer (`optimizer.warmup_steps`).",
            )


def _pass(evaluation: Evaluation) -> float:
    value = evaluation.metrics[PASS_AT_1]
    assert value is not None, "only scored evaluations are compared"
    return value


RULES: Sequence[Callable[[Run], Iterator[Finding]]] = (
    not_finite,
    skipped_updates,
    accuracy_falls,
    reward_falls,
    few_effective_samples,
    much_is_clipped,
    entropy,
    length_whips,
    sampler_disagrees,
    responses_are_cut,
    grading,
    wasted_samples,
    far_from_reference,
    gradients_spike,
)
