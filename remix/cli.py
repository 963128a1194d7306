"""remix plan | train | watch | report | eval | merge | grade | continual | schema"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from remix.config.command import add_schema
from remix.evaluation import command as evaluation
from remix.merging import command as merging
from remix.reporting import command as reporting
from remix.terminal import Parser, guard_tracebacks, print_error, showable
from remix.tracking.watch import add_watch
from remix.training.resume import add_resume_options

# Nothing heavy up here: `remix --help` answers at once.

WORDS = "RECIPE [key=value ...]"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_THREADS = 8
SAVING_SECONDS = 60.0
ACCELERATE_LAUNCH = (
    # The launcher would die of a signal, with a stack trace; its trainers, which hear it too, decide what to do.
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); from accelerate.commands.launch import main; "
    "[signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)]; main()"
)


def main(argv: Sequence[str] | None = None) -> int:
    guard_tracebacks()
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    # argparse gives up on `key=value` after an option; these are they.
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not hasattr(args, "words"):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.words, args.arguments = [], list(sys.argv[2:] if argv is None else argv[1:])
    recipe, overrides = _split([*args.words, *rest])
    try:
        return int(args.command(args, recipe, overrides))
    except (ValueError, OSError) as error:
        print_error(error)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="remix", description="Reinforcement fine-tuning of language models that replays its rollouts.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    plan = commands.add_parser(
        "plan",
        usage=f"remix plan [--processes N | --cluster nodes=N,gpus=G] [--json] {WORDS}",
        help="what a recipe amounts to: batches, optimiser steps, rollouts, memory",
        description="Checks a recipe and prints what it amounts to. Loads no model.",
    )
    plan.set_defaults(command=_plan)
    plan.add_argument("--processes", type=int, metavar="N", help="processes it will run on (default 1)")
    plan.add_argument(
        "--cluster",
        metavar="nodes=N,gpus=G",
        help="what it asks of N machines of G GPUs: memory by backend, bytes, sampling rate; more keys: samplers= "
        "(GPUs for that alone), seconds= (of a step), tflops= (that a GPU achieves)",
    )
    plan.add_argument("--json", action="store_true", help="the plan as JSON")

    train = commands.add_parser(
        "train",
        usage=f"remix train [--config_file FILE] [--resume RUN_DIR|auto] [--allow-changed] {WORDS}",
        help="run a recipe",
        description="Runs a recipe under `accelerate launch`.",
    )
    train.set_defaults(command=_train)
    train.add_argument("--config_file", metavar="FILE", help="accelerate configuration, see recipes/accelerate/")
    add_resume_options(train)

    add_watch(commands)

    evaluate = commands.add_parser(
        "eval",
        usage=evaluation.USAGE,
        help="evaluate a model on benchmarks",
        description="Samples, grades, and writes scores with all that is needed to have them again.",
    )
    evaluate.set_defaults(command=_eval)
    evaluation.add_arguments(evaluate)

    merge = commands.add_parser(
        "merge",
        usage=merging.USAGE,
        help="merge adapters, or whole models, into their base",
        description="Merges PEFT adapters into their base, or whole models that were fine-tuned from it.",
    )
    merge.set_defaults(command=_merge)
    merging.add_arguments(merge)

    _add_grade(commands)
    _add_continual(commands)
    reporting.add_command(commands)
    add_schema(commands)
    for command in (plan, train):
        command.add_argument("words", nargs="*", metavar=WORDS, help="a recipe, and overrides like optimizer.lr=1e-5")
    return parser


def _add_grade(commands: Any) -> None:
    grade = commands.add_parser(
        "grade",
        usage="remix grade --in FILE.jsonl --out FILE.jsonl [--workers N] [--timeout S]",
        help="grade responses against gold answers",
        description='Reads lines {"gold": str | [str], "prediction": str, ...} and writes each with its verdict.',
    )
    grade.set_defaults(command=_grade)
    grade.add_argument("--in", dest="source", required=True, metavar="FILE", help="responses, as JSON lines")
    grade.add_argument("--out", dest="target", required=True, metavar="FILE", help="a new file for the verdicts")
    grade.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one per core")
    grade.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds per answer (default 5)")


def _add_continual(commands: Any) -> None:
    continual = commands.add_parser(
        "continual",
        usage="remix continual report RUN_DIR [--json]",
        help="what a run of tasks one after the other kept and forgot",
        description="Prints the accuracy matrix with ACC, BWT, forgetting and zero-shot accuracy, and writes them as "
        "continual.md and continual.png into the run's folder.",
    )
    continual.set_defaults(command=_continual)
    continual.add_argument("action", choices=("report",))
    continual.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    continual.add_argument("--json", action="store_true", help="the record and the four numbers as JSON")


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> None:
        from importlib.metadata import version

        print(f"remix {version('remix-rl')}")
        raise SystemExit(0)


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if one is named, and the overrides."""
    named = bool(words) and ("=" not in words[0] or Path(words[0]).is_file())
    return (words[0] if named else None), list(words[named:])


# --- remix plan ---------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace, recipe: str | None, overrides: Sequence[str]) -> int:
    from remix.config import load_recipe
    from remix.training.cluster_plan import plan_cluster, read_machines
    from remix.training.stages import make_plans

    if recipe is None:
        raise ValueError("name a recipe, for example: remix plan recipes/embedded/remix_grpo.yaml")
    machines = None if args.cluster is None else read_machines(args.cluster)
    if machines is not None and args.processes not in (None, machines.world_size):
        raise ValueError(
            f"--processes {args.processes} and --cluster with {machines.world_size}: leave out --processes"
        )
    processes = 1 if args.processes is None else args.processes
    checked = load_recipe(recipe, overrides)
    plans = make_plans(checked, machines.world_size if machines else _at_least_one("--processes", processes))
    clusters = {task: plan_cluster(checked, plan, machines) for task, plan in plans.items() if machines is not None}
    if args.json:
        import json
        from dataclasses import asdict

        found = {
            task: asdict(plan) | ({"cluster": asdict(clusters[task])} if machines else {})
            for task, plan in plans.items()
        }
        print(json.dumps(found[""] if list(found) == [""] else found, indent=2))
        return 0
    from rich.console import Console

    from remix.training.plan_view import render, render_cluster

    console = Console(markup=False, emoji=False)
    for number, (task, plan) in enumerate(plans.items()):
        if task:
            console.print(f" task {number + 1} of {len(plans)}: {showable(task)}", style="bold")
        console.print(render(plan))
        if machines is not None:
            console.print(render_cluster(clusters[task]))
    return 0


def _at_least_one(option: str, number: Any) -> int:
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{option} must be a whole number from 1, not {number!r}")
    return number


# --- remix eval ---------------------------------------------------------------------------------------------------


def _eval(args: argparse.Namespace, *_: Any) -> int:
    return evaluation.main(args, args.arguments, has_gpu=has_gpu(os.environ))


# --- remix merge --------------------------------------------------------------------------------------------------


def _merge(args: argparse.Namespace, *_: Any) -> int:
    return merging.main(args, has_gpu=has_gpu(os.environ))


# --- remix grade --------------------------------------------------------------------------------------------------


def _grade(args: argparse.Namespace, *_: Any) -> int:
    from rich.console import Console

    from remix.rewards.grade_file import count_lines, grade_file
    from remix.tracking.countdown import Countdown

    if not 0 < args.timeout < float("inf"):
        raise ValueError(f"--timeout must be a number of seconds above 0, not {args.timeout}")
    source, workers = Path(args.source), _at_least_one("--workers", args.workers)
    try:
        with Countdown(count_lines(source) or 0, console=Console(stderr=True)) as countdown:
            counts = grade_file(
                source, Path(args.target), workers, args.timeout, lambda count: countdown.advance(count, "grading")
            )
    except KeyboardInterrupt:
        print("interrupted; nothing has been written", file=sys.stderr)
        return 130
    lines = sum(counts.values())
    print(f"{lines:,} graded: " + (", ".join(f"{n:,} {verdict}" for verdict, n in counts.most_common()) or "no lines"))
    return 0


# --- remix continual ----------------------------------------------------------------------------------------------


def _continual(args: argparse.Namespace, *_: Any) -> int:
    from remix.evaluation.continual import read_record
    from remix.evaluation.continual_report import transfer_table, write_report
    from remix.evaluation.transfer import summary

    record = read_record(args.run_dir)
    if not record.learnt:
        raise ValueError(f"{args.run_dir}: no task has been learnt yet")
    if args.json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(record) | summary(record.matrix), indent=2))
        return 0
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    console.print(transfer_table(record))
    for path in write_report(record, args.run_dir):
        console.print(showable(str(path)), style="dim")
    return 0


# --- remix train --------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace, recipe: str | None, overrides: Sequence[str]) -> int:
    from remix.config import load_recipe
    from remix.training.interruption import STATUS_FOLDER, overall_status
    from remix.training.resume import resolve
    from remix.training.stages import make_plans

    # Here rather than only in the launched process, so that a mistake is one line and takes no seconds, and so that
    # all processes go on with the same run.
    path, words, resume = resolve([*([] if recipe is None else [recipe]), *overrides], args.resume)
    checked, (processes, here) = load_recipe(path, words), _processes(args.config_file)
    make_plans(checked, processes)
    command = [*_launcher(args.config_file), "-m", "remix.train", path, *overrides]
    command += ["--resume", checked.run_dir] if resume else []
    command += ["--allow-changed"] if args.allow_changed else []
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, **threads(os.environ, processes), STATUS_FOLDER: folder}
        return overall_status(Path(folder), run_in_front(command, environ), here)


def _processes(config_file: str | None) -> tuple[int, int]:
    """Of the whole run, and on each of its machines."""
    if config_file is None:
        return 1, 1
    import yaml

    if not Path(config_file).is_file():
        raise ValueError(f"--config_file {config_file}: no such file, see recipes/accelerate/")
    try:
        config = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config_file {config_file}: not readable as YAML: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--config_file {config_file}: not an accelerate configuration, see recipes/accelerate/")
    processes, machines = (
        _at_least_one(f"--config_file {config_file}: {key}", config.get(key, 1))
        for key in ("num_processes", "num_machines")
    )
    return processes, max(processes // machines, 1)


def _launcher(config_file: str | None) -> list[str]:
    # Quiet: a failed run has said why itself; the launcher's own stack trace would bury it.
    launch = [sys.executable, "-c", ACCELERATE_LAUNCH, "--quiet"]
    if config_file is not None:
        return [*launch, "--config_file", config_file]
    # Every choice spelled out, or accelerate lists its defaults in a warning.
    launch += ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return launch if has_gpu(os.environ) else [*launch, "--cpu"]


def has_gpu(environ: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether a GPU of NVIDIA or AMD is there and not hidden, without importing torch."""
    if environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    return any(devices.glob("nvidia[0-9]*")) or (devices / "kfd").exists()


def threads(environ: Mapping[str, str], processes: int) -> dict[str, str]:
    """OpenMP's settings, where the user has none. Its threads spin while they wait, which on cores that anyone
    else uses makes a step many times slower: they are told to sleep."""
    if "OMP_NUM_THREADS" in environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(max(cores // processes, 1), MOST_THREADS)
    return {"OMP_NUM_THREADS": str(count), "OMP_WAIT_POLICY": environ.get("OMP_WAIT_POLICY", "PASSIVE")}


def run_in_front(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs a command, hands signals on to it once and to all its processes, and returns its exit code.

    It has a session of its own: on Ctrl-C a terminal signals whatever it can reach, and a run that closes its
    engine and files on the first interrupt would be killed by the second.
    """
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if process is None:
            early.append(number)
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        process = subprocess.Popen(command, env=dict(environ), start_new_session=True)
        for number in early:
            forward(number, None)
        code = process.wait()
        _wait_for_group(process.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def _wait_for_group(leader: int) -> None:
    """A launcher that a signal has ended may leave a trainer behind that is still saving."""
    deadline = time.monotonic() + SAVING_SECONDS
    with suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(leader, 0)
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
