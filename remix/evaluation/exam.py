"""A set of problems put to a model: the questions, the responses, their verdicts. Training and `remix eval` alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remix.rewards import Grade
from remix.rollout.sample import rollout_seed
from remix.types import Engine, Prompt, Request, Sampling, Verdict

Grading = Callable[[Sequence[Prompt], Sequence[str], Sequence[int]], Sequence[Grade]]
"""(prompts, responses, their lengths in tokens) -> one grade per response."""

EVALUATION = -1
"""The policy version of all evaluations: every model meets the same random numbers, so differences are the model's."""


@dataclass(frozen=True, slots=True)
class Exam:
    """Problems, and everything that decides what is asked and how it is judged."""

    name: str
    prompts: tuple[Prompt, ...]
    """Encoded."""
    golds: tuple[tuple[str, ...], ...]
    """By prompt, the answers of which any one is right."""
    samples: int
    """Responses to each problem."""
    sampling: Sampling
    grading: Grading
    reflection_phrases: tuple[str, ...] = ()
    """A response that holds one of these (case ignored) counts as self-reflecting."""

    @property
    def longest_sequence(self) -> int:
        """Most tokens of a prompt and its response together."""
        return max(len(prompt.token_ids) for prompt in self.prompts) + self.sampling.max_tokens

    @property
    def questions(self) -> list[Question]:
        return [Question(prompt, sample) for prompt in self.prompts for sample in range(self.samples)]


@dataclass(frozen=True, slots=True)
class Question:
    """One try at one problem."""

    prompt: Prompt
    sample: int


@dataclass(frozen=True, slots=True)
class Response:
    """What became of a question."""

    problem: str
    """The prompt's id."""
    sample: int
    seed: int
    text: str
    tokens: int
    """Length of the response, the end-of-sequence token included."""
    truncated: bool
    verdict: Verdict
    extracted: str | None
    """The answer that the grader found."""

    @property
    def correct(self) -> bool:
        return self.verdict == "correct"


def respond(
    exam: Exam, questions: Sequence[Question], engine: Engine, decode: Callable[[list[int]], str], run_seed: int
) -> list[Response]:
    """One response per question, in order. Each depends on its question and the run's seed alone."""
    if not questions:
        return []
    seeds = [rollout_seed(run_seed, question.prompt.id, EVALUATION, question.sample) for question in questions]
    requests = [
        Request(question.prompt.token_ids, seed, question.prompt.images)
        for question, seed in zip(questions, seeds, strict=True)
    ]
    completions = engine.generate(requests, exam.sampling)
    texts = [decode(completion.response_ids.tolist()) for completion in completions]
    lengths = [len(completion.response_ids) for completion in completions]
    grades = exam.grading([question.prompt for question in questions], texts, lengths)
    return [
        Response(
            problem=question.prompt.id,
            sample=question.sample,
            seed=seed,
            text=text,
            tokens=len(completion.response_ids),
            truncated=completion.finish_reason == "length",
            verdict=grade.verdict,
            extracted=grade.extracted,
        )
        for question, seed, completion, text, grade in zip(questions, seeds, completions, texts, grades, strict=True)
    ]
