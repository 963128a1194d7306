"""The options of `remix eval`. Nothing heavy up here: `remix --help` answers at once."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from remix.imports import lasting
from remix.secrets import redact
from remix.terminal import showable

USAGE = (
    "remix eval --model M [--adapter A] [--benchmarks math | aime24,math500,...] [--samples k] [--temperature t]\n"
    "                  [--top-p q] [--max-tokens n] [--engine vllm|hf] [--data-dir DIR] [--limit n] [--seed s]\n"
    "                  [--out DIR] [--resume] [options]"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="hub id or directory")
    add("--adapter", metavar="A", help="a PEFT adapter for it, hub id or directory")
    add("--benchmarks", default="math", metavar="NAMES", help="suites and benchmarks, comma-separated (default math)")
    add("--samples", type=_from(1), metavar="k", help="responses to a problem (default: as the benchmark is defined)")
    add("--temperature", type=_number(None), metavar="t", help="0 = greedy (default: as defined)")
    add("--top-p", type=_number(1.0), metavar="q", help="nucleus (default: as defined)")
    add("--max-tokens", type=_from(1), metavar="n", help="most tokens of a response (default: as defined)")
    add("--pass-at", type=_list, metavar="k,...", help="k of pass@k (default: powers of two up to --samples)")
    add("--engine", choices=("vllm", "hf"), help="default: vllm where it and a GPU are there, else hf")
    add("--data-dir", type=Path, metavar="DIR", help="local copies of the benchmarks (default: the hub)")
    add("--limit", type=_from(1), metavar="n", help="only the first n problems of each benchmark")
    add("--seed", type=_from(0), default=0, metavar="s", help="of sampling (default 0)")
    add("--out", type=Path, metavar="DIR", help="default: a new folder in runs/")
    add("--resume", action="store_true", help="go on with the evaluation in --out; what is done is not done again")
    add("--revision", metavar="R", help="branch, tag or commit of a model from the hub")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: bfloat16 on a GPU, else float32)")
    add(
        "--chat",
        choices=("auto", "always", "never"),
        default="auto",
        help="the chat template; auto: where there is one",
    )
    add("--batch-size", type=_from(1), metavar="n", help="responses sampled and stored at a time (hf 64, vllm 512)")
    add("--workers", type=_from(1), metavar="n", help="grader processes (default: one a core, at most 8)")
    add("--timeout", type=_number(None, least=0.1), default=5.0, metavar="s", help="seconds for an answer (default 5)")


def main(options: argparse.Namespace, arguments: Sequence[str], *, has_gpu: bool) -> int:
    """Exit status: 0 done, 130 interrupted. Raises ValueError where the request is wrong."""
    # Spinning OpenMP threads on shared cores cost more than they give; torch reads these when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.resume and options.out is None:
        raise ValueError("--resume needs --out, the folder of the evaluation to go on with")
    engine: Literal["vllm", "hf"] = options.engine or ("vllm" if has_gpu and find_spec("vllm") else "hf")
    if engine == "vllm" and find_spec("vllm") is None:
        raise ValueError("--engine vllm: vLLM is not installed; run `bash scripts/setup.sh vllm`, or use --engine hf")
    with lasting():
        from remix.evaluation.overrides import Overrides
        from remix.evaluation.runner import EvalRequest, default_out, run
        from remix.evaluation.summary import show
        from remix.models.loading import quiet

    quiet()
    request = EvalRequest(
        model=options.model,
        adapter=options.adapter,
        revision=options.revision,
        benchmarks=[options.benchmarks],
        overrides=Overrides(
            samples=options.samples,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            limit=options.limit,
        ),
        pass_at=options.pass_at,
        engine=engine,
        dtype=options.dtype,
        chat=options.chat,
        data_dir=options.data_dir,
        seed=options.seed,
        out=options.out or default_out(options.model, options.adapter),
        resume=options.resume,
        batch_size=options.batch_size,
        workers=options.workers or min(os.cpu_count() or 1, 8),
        timeout=options.timeout,
        command=redact(shlex.join(["remix", "eval", *arguments])),
    )
    try:
        summary = run(request)
    except KeyboardInterrupt:
        print(showable(f"stopped; the same command with --out {request.out} --resume goes on"), file=sys.stderr)
        return 130
    show(summary)
    used = "used" if summary["run"]["chat_template"] else "not used"
    print(showable(f"chat template {used}; {request.out}/summary.md says how to repeat it"))
    return 0


def _from(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, not {text!r}")
        return int(text)

    return number


def _number(most: float | None, least: float = 0.0) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf") or (most is not None and not 0 < value <= most):
            bounds = f"a number from {least:g}" if most is None else f"above 0 and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text!r}")
        return value

    return number


def _list(text: str) -> list[int]:
    return [_from(1)(part) for part in text.split(",")]
