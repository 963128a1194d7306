"""From benchmarks, or the held-out prompts of a recipe, to exams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from remix.config import PromptConfig
from remix.evaluation.benchmarks import Benchmark, ExactMatchGrader, MathGrader, Problems
from remix.evaluation.exam import Exam, Grading
from remix.evaluation.overrides import Overrides
from remix.rewards import Grade, GraderPool
from remix.rewards.exact import exact_grade
from remix.rollout.sample import Scorer
from remix.tasks import encode
from remix.types import Prompt, Sampling

Chat = Literal["auto", "always", "never"]


def benchmark_exam(
    benchmark: Benchmark,
    problems: Problems,
    tokenizer: Any,
    grader: GraderPool,
    overrides: Overrides,
    chat: Chat,
    processor: Any = None,
) -> Exam:
    """`processor`: of a vision-language model. Raises ValueError where the request contradicts itself."""
    prompts = problems.prompts[: overrides.limit]
    golds = {prompt.id: accepted for prompt, accepted in zip(problems.prompts, problems.golds, strict=True)}
    # The context is checked against prompt and response together, below.
    form = PromptConfig(template=benchmark.template, system=benchmark.system, chat=chat, max_tokens=2**31)
    return Exam(
        name=benchmark.name,
        prompts=tuple(encode(prompts, tokenizer, form, processor)),
        golds=tuple(golds[prompt.id] for prompt in prompts),
        samples=overrides.samples_of(benchmark),
        sampling=overrides.sampling(benchmark),
        grading=_grading(benchmark, golds, grader),
        reflection_phrases=benchmark.reflection,
    )


def held_out_exam(
    prompts: Sequence[Prompt],
    rewards: Scorer,
    *,
    name: str,
    samples: int,
    sampling: Sampling,
    reflection_phrases: Sequence[str],
) -> Exam:
    """A recipe's held-out prompts, judged by its rewards. Without a name its scores are those of the run."""
    if not prompts:
        raise ValueError("nothing to evaluate: no held-out prompts; raise `holdout`, or name an evaluation split")

    def grading(prompts: Sequence[Prompt], responses: Sequence[str], lengths: Sequence[int]) -> list[Grade]:
        return [Grade(score.verdict) for score in rewards.score(prompts, responses, lengths)]

    return Exam(
        name=name,
        prompts=tuple(prompts),
        golds=tuple((prompt.answer,) for prompt in prompts),
        samples=samples,
        sampling=sampling,
        grading=grading,
        reflection_phrases=tuple(reflection_phrases),
    )


def check_context(exams: Sequence[Exam], context: int | None, remedy: str) -> None:
    """Raises ValueError where a prompt and its response may be longer than the model's context."""
    for exam in exams:
        longest = max(exam.prompts, key=lambda prompt: len(prompt.token_ids))
        length, most = len(longest.token_ids), exam.sampling.max_tokens
        if context is not None and length + most > context:
            raise ValueError(
                f"{exam.name or 'evaluation'}: {longest.id} has {length:,} tokens, and {most:,} may follow, but the "
                f"model's context holds {context:,} in all: set {remedy} to {context - length:,} or less"
                if length < context
                else f"{exam.name or 'evaluation'}: {longest.id} has {length:,} tokens, and the model's context holds "
                f"{context:,}: this model cannot be evaluated on it"
            )


def _grading(benchmark: Benchmark, golds: dict[str, tuple[str, ...]], grader: GraderPool) -> Grading:
    chosen = benchmark.grader

    def exact(prompts: Sequence[Prompt], responses: Sequence[str], lengths: Sequence[int]) -> list[Grade]:
        assert isinstance(chosen, ExactMatchGrader)
        return [
            exact_grade(golds[prompt.id], response, chosen.after)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def math(prompts: Sequence[Prompt], responses: Sequence[str], lengths: Sequence[int]) -> list[Grade]:
        assert isinstance(chosen, MathGrader)
        accepted = [golds[prompt.id] for prompt in prompts]
        return grader.grade(accepted, responses, tolerance=chosen.rel_tolerance or None)

    return exact if isinstance(chosen, ExactMatchGrader) else math
