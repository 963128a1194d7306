"""`remix eval`: from a request to a folder with generations, scores and a summary."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from remix.durable import write_json, written_whole
from remix.evaluation.benchmarks import Benchmark, Problems, load_benchmarks, load_problems
from remix.evaluation.build import Chat, benchmark_exam, check_context
from remix.evaluation.evaluate import evaluate, problem_rows
from remix.evaluation.exam import Exam, Question, Response, respond
from remix.evaluation.identity import run_identity, uses_chat
from remix.evaluation.overrides import Overrides
from remix.evaluation.storage import Store, check_free
from remix.evaluation.subject import Dtype, EngineName, Subject, find_subject
from remix.evaluation.summary import markdown, scores
from remix.rewards import GraderPool
from remix.tracking.countdown import Countdown

BATCH_SIZE: dict[EngineName, int] = {"hf": 64, "vllm": 512}
"""Of a chunk, where none is asked for. vLLM fills its batches by itself, so it takes what is worth losing to a kill."""


@dataclass(frozen=True)
class EvalRequest:
    """The command line, parsed."""

    model: str
    out: Path
    benchmarks: Sequence[str] = ("math",)
    adapter: str | None = None
    revision: str | None = None
    """Of the model, on the hub."""
    overrides: Overrides = field(default_factory=Overrides)
    pass_at: Sequence[int] | None = None
    engine: EngineName = "hf"
    dtype: Dtype | None = None
    """None: bfloat16 on a GPU, else float32."""
    chat: Chat = "auto"
    data_dir: Path | None = None
    seed: int = 0
    resume: bool = False
    batch_size: int | None = None
    """Responses sampled, graded and stored at a time."""
    workers: int = 2
    """Grader processes."""
    timeout: float = 5.0
    """Seconds for the grading of one answer."""
    command: str = ""


@dataclass(frozen=True)
class _Suite:
    """The benchmarks of a request, loaded and encoded; the three run in parallel."""

    benchmarks: Sequence[Benchmark]
    problems: Sequence[Problems]
    exams: Sequence[Exam]


def check(request: EvalRequest) -> None:
    """Raises ValueError where `run` would before it writes anything; loads no weights."""
    with GraderPool(workers=request.workers, timeout=request.timeout) as grader:
        _found(request, grader)


def run(request: EvalRequest) -> dict[str, Any]:
    """Evaluates, or goes on with it, and returns the summary. Raises ValueError before anything is written."""
    started = time.perf_counter()
    check_free(request.out, resume=request.resume)
    with ExitStack() as stack:
        grader = stack.enter_context(GraderPool(workers=request.workers, timeout=request.timeout))
        subject, suite = _found(request, grader)
        exams = suite.exams
        identity = run_identity(
            subject,
            list(zip(suite.benchmarks, suite.problems, exams, strict=True)),
            engine=request.engine,
            chat=uses_chat(subject.tokenizer, request.chat),
            seed=request.seed,
            timeout=request.timeout,
        )
        store = stack.enter_context(Store(request.out, identity, resume=request.resume))
        responses = _answer(request, subject, exams, store)
        evaluations = [evaluate(exam, found, request.pass_at) for exam, found in zip(exams, responses, strict=True)]
        summary = {
            **scores(evaluations),
            "run": identity,
            "data": _data(suite),
            "files": subject.fingerprints,
            "session": {
                "command": request.command,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "seconds": round(time.perf_counter() - started, 3),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }
        _write(request.out, suite, responses, summary)
    return summary


def _found(request: EvalRequest, grader: GraderPool) -> tuple[Subject, _Suite]:
    benchmarks = load_benchmarks(request.benchmarks)
    _check_samples(request, benchmarks)
    problems = [load_problems(benchmark, request.data_dir) for benchmark in benchmarks]
    subject = find_subject(
        request.model,
        request.adapter,
        revision=request.revision,
        dtype=request.dtype,
        engine=request.engine,
        with_images=any(prompt.images for found in problems for prompt in found.prompts),
    )
    if request.chat == "always" and not subject.tokenizer.chat_template:
        raise ValueError(f"--chat always: the tokenizer of {request.model} has no chat template")
    exams = [
        benchmark_exam(*pair, subject.tokenizer, grader, request.overrides, request.chat, subject.processor)
        for pair in zip(benchmarks, problems, strict=True)
    ]
    check_context(exams, subject.context, "--max-tokens")
    return subject, _Suite(benchmarks, problems, exams)


def _answer(request: EvalRequest, subject: Subject, exams: Sequence[Exam], store: Store) -> list[list[Response]]:
    """Every question's response, in order: those of the store, and the others sampled now, chunk by chunk."""
    kept = [store.responses(exam.name) for exam in exams]
    missing = [
        [question for question in exam.questions if (question.prompt.id, question.sample) not in found]
        for exam, found in zip(exams, kept, strict=True)
    ]
    total = sum(len(exam.questions) for exam in exams)
    size = request.batch_size or BATCH_SIZE[request.engine]
    done = total - sum(map(len, missing))
    with ExitStack() as stack:
        countdown = stack.enter_context(Countdown(total, done=done, console=Console(stderr=True)))
        if done:
            countdown.message(f"{request.out}: {done:,} of {total:,} responses are there already")
        if any(missing):
            countdown.message(f"loading {request.model}" + (f" with {request.adapter}" if request.adapter else ""))
            longest = max(exam.longest_sequence for exam in exams)
            images = max(len(prompt.images) for exam in exams for prompt in exam.prompts)
            engine = subject.engine(request.engine, max_model_len=longest, batch_size=size, images=images)
            stack.callback(engine.close)
            store.begin()
            countdown.begin()
        for exam, questions, found in zip(exams, missing, kept, strict=True):
            for start in range(0, len(questions), size):
                chunk: Sequence[Question] = questions[start : start + size]
                responses = respond(exam, chunk, engine, subject.decoder(), request.seed)
                store.add(exam.name, responses)
                found.update({(response.problem, response.sample): response for response in responses})
                correct = sum(response.correct for response in found.values()) / len(found)
                countdown.advance(len(chunk), exam.name, f"{correct:.1%} correct")
    return [
        [found[question.prompt.id, question.sample] for question in exam.questions]
        for exam, found in zip(exams, kept, strict=True)
    ]


def _check_samples(request: EvalRequest, benchmarks: Sequence[Benchmark]) -> None:
    for benchmark in benchmarks:
        samples, most = request.overrides.samples_of(benchmark), max(request.pass_at or [1])
        if most > samples:
            raise ValueError(
                f"pass@{most} needs {most} samples of a problem, but {benchmark.name} has {samples}: "
                f"set --samples to {most} or more, or lower --pass-at"
            )


def _data(suite: _Suite) -> dict[str, dict[str, Any]]:
    return {
        benchmark.name: {
            "title": benchmark.title,
            "licence": benchmark.licence,
            "source": problems.source,
            "revision": problems.revision,
            "sha256": problems.sha256,
            "of": len(problems.prompts),
            "notes": benchmark.notes,
        }
        for benchmark, problems in zip(suite.benchmarks, suite.problems, strict=True)
    }


def _write(out: Path, suite: _Suite, responses: Sequence[Sequence[Response]], summary: dict[str, Any]) -> None:
    with written_whole(out / "problems.jsonl") as file:
        for exam, found in zip(suite.exams, responses, strict=True):
            file.writelines(json.dumps(row).encode() + b"\n" for row in problem_rows(exam, found))
    write_json(out / "summary.json", summary)
    with written_whole(out / "summary.md") as file:
        file.write(markdown(summary).encode())


def default_out(model: str, adapter: str | None) -> Path:
    """A folder of its own for every call."""
    name = "-".join(Path(path).resolve().name if Path(path).is_dir() else path.split("/")[-1]
                    for path in (model, adapter) if path)  # fmt: skip
    return Path("runs") / f"eval-{name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
