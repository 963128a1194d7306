"""From the responses to an exam to its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remix.evaluation.exam import Exam, Response
from remix.evaluation.scores import (
    Grade,
    Shares,
    avg_at_k,
    macro_average,
    maj_at_k,
    mean_length,
    pass_at_k,
    self_reflection_rate,
    shares,
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of a model on one exam. Scores are means over problems, shares are of all responses."""

    name: str
    problems: int
    samples: int
    per_problem: tuple[float, ...]
    """avg@k of each problem, in order."""
    avg_at_k: float
    """The share of correct samples: pass@1, estimated from all of them."""
    pass_at: Mapping[int, float]
    """By k > 1."""
    maj_at_k: float | None
    """None for a single sample."""
    shares: Shares
    mean_tokens: float
    self_reflection: float

    def metrics(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}/pass@1": self.avg_at_k,
            f"{prefix}/problems": self.problems,  # what an interval of pass@1 is made from
            **{f"{prefix}/pass@{k}": value for k, value in self.pass_at.items()},
            **({} if self.maj_at_k is None else {f"{prefix}/maj@{self.samples}": self.maj_at_k}),
            f"{prefix}/response_length": self.mean_tokens,
            f"{prefix}/truncated": self.shares.truncated,
            f"{prefix}/no_answer": self.shares.no_answer,
            f"{prefix}/grader_failed": self.shares.timeout + self.shares.error,
            f"{prefix}/self_reflection": self.self_reflection,
        }


def evaluate(exam: Exam, responses: Sequence[Response], ks: Sequence[int] | None = None) -> Evaluation:
    """`ks`: of pass@k; without them, the powers of two up to the number of samples, and that number."""
    by_problem = _by_problem(exam, responses)
    samples = exam.samples
    correct = [[response.correct for response in of_problem] for of_problem in by_problem]
    per_problem = tuple(avg_at_k(of_problem) for of_problem in correct)
    wanted = pass_at_ks(samples) if ks is None else [k for k in ks if k > 1]
    return Evaluation(
        name=exam.name,
        problems=len(exam.prompts),
        samples=samples,
        per_problem=per_problem,
        avg_at_k=macro_average(per_problem),
        pass_at={k: macro_average([pass_at_k(samples, sum(c), k) for c in correct]) for k in wanted},
        maj_at_k=macro_average([maj_at_k(_grades(of)) for of in by_problem]) if samples > 1 else None,
        shares=shares([response.verdict for response in responses], [response.truncated for response in responses]),
        mean_tokens=mean_length([response.tokens for response in responses]),
        self_reflection=self_reflection_rate([response.text for response in responses], exam.reflection_phrases),
    )


def pass_at_ks(samples: int) -> list[int]:
    return sorted({*(2**i for i in range(1, samples.bit_length())), samples} - {1})


def training_metrics(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Of benchmarks by name, with their macro average; of a single nameless exam, the held-out prompts, as they are."""
    if [evaluation.name for evaluation in evaluations] == [""]:
        return evaluations[0].metrics("eval")
    metrics: dict[str, float] = {}
    for evaluation in evaluations:
        metrics |= evaluation.metrics(f"eval/{evaluation.name}")
    return metrics | {"eval/pass@1": macro_average([evaluation.avg_at_k for evaluation in evaluations])}


def problem_rows(exam: Exam, responses: Sequence[Response]) -> list[dict[str, Any]]:
    """One line per problem: what was asked for, what came, how often it was right."""
    rows = []
    for prompt, golds, of_problem in zip(exam.prompts, exam.golds, _by_problem(exam, responses), strict=True):
        rows.append(
            {
                "benchmark": exam.name,
                "problem": prompt.id,
                "golds": list(golds),
                "samples": exam.samples,
                "correct": sum(response.correct for response in of_problem),
                "avg@k": avg_at_k([response.correct for response in of_problem]),
                "maj@k": maj_at_k(_grades(of_problem)) if exam.samples > 1 else None,
                "verdicts": [response.verdict for response in of_problem],
                "answers": [response.extracted for response in of_problem],
                "tokens": [response.tokens for response in of_problem],
                "truncated": [response.truncated for response in of_problem],
            }
        )
    return rows


def _by_problem(exam: Exam, responses: Sequence[Response]) -> list[Sequence[Response]]:
    """Responses come in the order of the exam's questions."""
    assert len(responses) == exam.samples * len(exam.prompts), "every question has its response"
    return [responses[i * exam.samples : (i + 1) * exam.samples] for i in range(len(exam.prompts))]


def _grades(responses: Sequence[Response]) -> list[Grade]:
    return [Grade(response.extracted, response.correct) for response in responses]
