"""Exams made of benchmarks and of held-out prompts, answered by an engine that says what it is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from remix.config import parse_recipe
from remix.evaluation.benchmarks import Benchmark, Problems, load_benchmarks
from remix.evaluation.build import benchmark_exam, check_context, held_out_exam
from remix.evaluation.evaluate import evaluate
from remix.evaluation.exam import Exam, respond
from remix.evaluation.overrides import Overrides, evaluation_responses
from remix.rewards import GraderPool
from remix.types import Completion, Prompt, Request, Sampling, Score
from tests.tiny import EMBEDDED, tiny_recipe


class Told:
    """Says the texts in order, and remembers what it was asked."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, iter(texts)
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.requests += requests
        ids = [torch.tensor(self.tokenizer.encode(next(self.texts))) for _ in requests]
        return [Completion(row, torch.zeros(len(row)), "stop") for row in ids]

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED / "base")


@pytest.fixture(scope="module")
def grader() -> Iterator[GraderPool]:
    with GraderPool(workers=1) as pool:
        yield pool


MEASURES = Benchmark.model_validate(
    {
        "name": "measures", "title": "Measures", "source": "here", "licence": "none", "count": 2, "file": "none",
        "template": "Q: {problem} A:", "samples": 4, "temperature": 0.6, "top_p": 0.9, "max_tokens": 20,
        "grader": {"type": "math", "rel_tolerance": 0.01},
    }
)  # fmt: skip
PROBLEMS = Problems(
    prompts=(Prompt("measures/0", "1+1", "2", "measures"), Prompt("measures/1", "g", "9.81", "measures")),
    golds=(("2", "two"), ("9.81",)),
    source="here",
    revision=None,
    sha256="0",
)


def ask(exam: Exam, tokenizer: Any, texts: Sequence[str]) -> tuple[list[str], Told]:
    engine = Told(tokenizer, texts)
    responses = respond(exam, exam.questions, engine, tokenizer.decode, 7)
    return [response.verdict for response in responses], engine


def test_a_benchmark_is_asked_and_judged_as_it_is_defined(tokenizer: Any, grader: GraderPool) -> None:
    exam = benchmark_exam(MEASURES, PROBLEMS, tokenizer, grader, Overrides(), "auto")
    assert (exam.samples, exam.sampling) == (4, Sampling(20, temperature=0.6, top_p=0.9))
    assert tokenizer.decode(exam.prompts[0].token_ids) == "Q: 1+1 A:"
    told = [r"\boxed{2}", r"\boxed{3}", "", r"\boxed{\frac{4}{2}}"]
    told += [r"\boxed{9.8}", r"\boxed{9.6}", r"\boxed{9.81}", "no idea"]
    verdicts, engine = ask(exam, tokenizer, told)
    assert verdicts[:2] == ["correct", "wrong"]
    assert verdicts[3:7] == ["correct", "correct", "wrong", "correct"]  # 9.8 is within 1% of 9.81, 9.6 is not
    assert {verdicts[2], verdicts[7]} <= {"no_answer", "wrong"}
    assert len({request.seed for request in engine.requests}) == 8
    again = ask(replace(exam, prompts=exam.prompts[1:], golds=exam.golds[1:]), tokenizer, told)[1]
    assert [request.seed for request in again.requests] == [request.seed for request in engine.requests[4:]]


def test_what_is_asked_instead(tokenizer: Any, grader: GraderPool) -> None:
    greedy = benchmark_exam(MEASURES, PROBLEMS, tokenizer, grader, Overrides(temperature=0.0, limit=1), "auto")
    assert (greedy.samples, greedy.sampling) == (1, Sampling(20, temperature=0.0, top_p=1.0))
    assert [prompt.id for prompt in greedy.prompts] == ["measures/0"]
    other = Overrides(samples=2, temperature=0.9, top_p=0.5, max_tokens=5)
    assert (other.samples_of(MEASURES), other.sampling(MEASURES)) == (2, Sampling(5, temperature=0.9, top_p=0.5))
    with pytest.raises(ValueError, match="measures: at temperature 0 all 3 samples are the same"):
        Overrides(samples=3, temperature=0.0).samples_of(MEASURES)


def test_the_embedded_benchmark_by_its_own_grader(tokenizer: Any, grader: GraderPool) -> None:
    (benchmark,) = load_benchmarks(["arithmetic"])
    exam = benchmark_exam(benchmark, PROBLEMS, tokenizer, grader, Overrides(), "auto")
    assert ask(exam, tokenizer, ["1;2#2", "9.81"])[0] == ["correct", "no_answer"]


def test_held_out_prompts_are_judged_by_the_rewards(tokenizer: Any) -> None:
    class Rewards:
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str], lengths: Sequence[int]) -> list[Score]:
            # The reward is no part of it: a wrong answer may well be rewarded for its form.
            return [
                Score(7.0, "correct" if text == prompt.answer else "wrong")
                for prompt, text in zip(prompts, responses, strict=True)
            ]

    prompts = [replace(prompt, token_ids=(5,)) for prompt in PROBLEMS.prompts]
    exam = held_out_exam(prompts, Rewards(), name="", samples=1, sampling=Sampling(8), reflection_phrases=["wait"])
    responses = respond(exam, exam.questions, Told(tokenizer, ["2", "8"]), tokenizer.decode, 0)
    assert evaluate(exam, responses).avg_at_k == 0.5
    with pytest.raises(ValueError, match="holdout"):
        held_out_exam([], Rewards(), name="", samples=1, sampling=Sampling(8), reflection_phrases=[])


def test_prompt_and_response_fit_the_context(tokenizer: Any, grader: GraderPool) -> None:
    exam = benchmark_exam(MEASURES, PROBLEMS, tokenizer, grader, Overrides(), "auto")
    assert exam.longest_sequence == 9 + 20
    check_context([exam], None, "--max-tokens")
    check_context([exam], 29, "--max-tokens")
    with pytest.raises(ValueError, match=r"measures/0 has 9 tokens, and 20 may follow.*set --max-tokens to 19 or less"):
        check_context([exam], 28, "--max-tokens")
    with pytest.raises(ValueError, match="cannot be evaluated on it"):
        check_context([exam], 9, "--max-tokens")


def test_the_plan_counts_evaluations(tmp_path: Any) -> None:
    recipe = tiny_recipe(EMBEDDED / "base", tmp_path, {"eval": {"prompts": 30, "samples": 2}})
    assert evaluation_responses(recipe) == 60
    five = {"benchmarks": ["math"], "samples": None}
    # aime24 30 x 16, amc23_83 83 x 16, math500 500, minerva_math 272, olympiadbench 675
    assert evaluation_responses(parse_recipe({**recipe.model_dump(), "eval": five})) == 113 * 16 + 1447
    assert evaluation_responses(parse_recipe({**recipe.model_dump(), "eval": {**five, "limit": 10}})) == 20 * 16 + 30
    with pytest.raises(ValueError, match="did you mean 'math500'"):
        evaluation_responses(parse_recipe({**recipe.model_dump(), "eval": {"benchmarks": ["math50"]}}))
