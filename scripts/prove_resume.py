"""Proves that a run which is killed and resumed is the run that it would have been, bit for bit.

    python scripts/prove_resume.py [--cases WORDS] [--kills N] [--seed S] [--out DIR]

For every embedded recipe, with full weights and LoRA, sampling by transformers and vLLM, on one process and two, and
for ReMix-GRPO with every other kind of adapter, with a LoRA swapped into vLLM, and with vLLM sampling a step while the
one before it updates (`overlap`, also for ReMix-PPO with LoRA on two processes): once without interruption, and once
killed by SIGKILL, all processes at a time, at random moments of random stages (and once asked to stop by SIGTERM),
resumed after each. Then both have to hold the same final weights, checkpoint, metrics (but for times), rollout shards
and completions. Exit status 1 where one does not.

`--cases "remix_ppo vllm"` runs only those whose name holds all the words.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import psutil

from remix.training.interruption import EXIT_INTERRUPTED, STATUS_FOLDER, leave, overall_status

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("remix_grpo", "remix_ppo", "grpo", "ppo")
STAGES = ("reincarnating", "sampling", "scoring", "anchors", "updating", "syncing", "evaluating", "saving")
STEPS = 6
MOST_SECONDS = 600.0
"""Of one process from start to end."""
STAGE_LOG = "REMIX_STAGE_LOG"
TWO_PROCESSES = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
main_process_port: 0
use_cpu: false
mixed_precision: 'no'
dynamo_backend: 'no'
"""


@dataclass(frozen=True)
class Case:
    recipe: str
    adapter: str
    engine: str
    """hf, vllm, or overlap: vLLM in a process of its own, under `rollout.overlap`."""
    processes: int

    def __str__(self) -> str:
        return f"{self.recipe} {self.adapter} {self.engine} {self.processes}"

    def overrides(self, run_dir: Path) -> list[str]:
        """Small, with a reincarnation, evaluations and checkpoints in between."""
        group = 1 if self.recipe.endswith("ppo") else 8
        phases = ["phases.0.until.0.after=3"] if self.recipe.startswith("remix") else []
        swapped = self.adapter == "hot_swap"
        merge = self.adapter == "lora" and self.engine != "hf"
        beside = self.engine == "overlap"
        engine = (
            f"type: {'vllm' if beside else self.engine}{', lora: hot_swap' * swapped}{', own_process: true' * beside}"
        )
        # With dropout, so that the random generators of every rank matter; merged in half of the cases.
        lora = ["adapter.dropout=0.1", f"reincarnation.lora={'merge' if merge else 'snapshot'}"]
        return [
            f"run_dir={run_dir}",
            f"max_steps={STEPS}",
            f"adapter.type={'lora' if swapped else self.adapter}",
            f"rollout.engine={{{engine}}}",
            f"rollout.overlap={str(beside).lower()}",
            f"batch.prompts={64 // group}",
            "eval.every=2",
            "eval.prompts=16",
            "checkpoint.every=2",
            "log.completions_every=1",
            *phases,
            *(lora if self.adapter == "lora" or swapped else []),
        ]


def all_cases() -> list[Case]:
    kinds = [("ia3", "hf"), ("prefix", "hf"), ("prompt", "hf"), ("layers", "hf"), ("layers", "vllm")]
    return [
        *(Case(*of) for of in product(RECIPES, ("none", "lora"), ("hf", "vllm"), (1, 2))),
        *(Case("remix_grpo", *kind, 1) for kind in [*kinds, ("hot_swap", "vllm"), ("none", "overlap")]),
        Case("remix_ppo", "lora", "overlap", 2),
    ]


@dataclass
class Verdict:
    case: Case
    kills: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


def prove(case: Case, folder: Path, *, kills: int, seed: int) -> Verdict:
    """Runs the case whole and in pieces, and compares what they leave."""
    verdict, started, dice = Verdict(case), time.monotonic(), random.Random(f"{seed}/{case}")
    whole, pieces = folder / "whole" / "run", folder / "pieces" / "run"  # apart, or `auto` would take one for the other
    status, _ = run(case, whole, None)
    assert status == 0, f"{case}: the run without interruption ended with {status}, see {log_of(whole)}"
    ends = [signal.SIGKILL] * kills + [signal.SIGTERM]
    stages = sorted(dice.sample(possible_stages(whole), k=len(ends)), key=lambda stage: stage != "reincarnating")
    for number, stage in zip(dice.sample(ends, k=len(ends)), stages, strict=True):
        # Late stages are reached only once in what a few kills leave of a run.
        occurrence = dice.randint(1, 2) if stage in ("sampling", "anchors", "updating") else 1
        status, struck = run(case, pieces, Strike(number, stage, occurrence, dice.random(), whole))
        if struck is None:
            verdict.differences.append(f"was done before it could be struck at {stage}")
            break
        verdict.kills.append(struck)
        if number == signal.SIGTERM and status not in (0, EXIT_INTERRUPTED):
            verdict.differences.append(f"SIGTERM ended it with {status}, not {EXIT_INTERRUPTED}, see {log_of(pieces)}")
    status, _ = run(case, pieces, None)
    assert status == 0, f"{case}: the resumed run ended with {status}, see {log_of(pieces)}"
    verdict.differences += differences(whole, pieces)
    verdict.seconds = time.monotonic() - started
    return verdict


@dataclass(frozen=True)
class Strike:
    """A signal to all processes at some moment of the n-th time that a stage is reached."""

    number: signal.Signals
    stage: str
    occurrence: int
    moment: float
    """Share of the stage's usual time that has passed."""
    whole: Path
    """The run without interruption, by which that time is known."""

    def delay(self) -> float:
        rows = [json.loads(line) for line in (self.whole / "metrics.jsonl").read_text().splitlines()]
        times = sorted(row[f"time/{self.stage}"] for row in rows if f"time/{self.stage}" in row)
        return self.moment * (times[len(times) // 2] if times else 0.05)


def run(case: Case, run_dir: Path, strike: Strike | None) -> tuple[int, str | None]:
    """Starts the case or goes on with it. Returns its exit status, and where the strike hit it, if it did."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    stage_log, hardware = run_dir.with_suffix(".stages"), run_dir.parent / "two_processes.yaml"
    stage_log.write_text("")
    hardware.write_text(TWO_PROCESSES)
    config = hardware if case.processes == 2 else ROOT / "recipes" / "accelerate" / "cpu.yaml"
    recipe = ROOT / "recipes" / "embedded" / f"{case.recipe}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    command += [str(Path(__file__).resolve()), "--child", str(recipe), *case.overrides(run_dir), "--resume", "auto"]
    environment = {**os.environ, STAGE_LOG: str(stage_log), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if case.processes == 2 else {}
    with tempfile.TemporaryDirectory() as statuses, log_of(run_dir).open("ab") as log:
        environment[STATUS_FOLDER] = statuses
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        struck = None if strike is None else _strike(process, stage_log, strike)
        try:
            return overall_status(Path(statuses), process.wait(MOST_SECONDS), case.processes), struck
        finally:
            _signal_all(process.pid, signal.SIGKILL)


def _strike(process: subprocess.Popen[bytes], stage_log: Path, strike: Strike) -> str | None:
    delay, deadline = strike.delay(), time.monotonic() + MOST_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if stage_log.read_text().split().count(strike.stage) >= strike.occurrence:
            time.sleep(delay)
            at = (stage_log.read_text().split() or ["start"])[-1]
            _signal_all(process.pid, strike.number)
            return f"{strike.number.name.removeprefix('SIG')} {at}"
        time.sleep(0.002)
    return None


def _signal_all(pid: int, number: signal.Signals) -> None:
    """To the launcher and every process that it has started, ranks and engines, however deep."""
    try:
        parent = psutil.Process(pid)
        tree = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            # The launcher hands a SIGTERM on or would die of it; its trainers decide.
            if number == signal.SIGKILL or (process.pid != pid and "--child" in process.cmdline()):
                process.send_signal(number)
        except psutil.Error:
            continue


def possible_stages(whole: Path) -> list[str]:
    seen = set(whole.with_suffix(".stages").read_text().split())
    return [stage for stage in STAGES if stage in seen]


def log_of(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")


# --- what has to be the same --------------------------------------------------------------------------------------


def differences(whole: Path, pieces: Path) -> Iterator[str]:
    for name in ("metrics.jsonl", "completions.jsonl"):
        one, two = (
            [_without_times(json.loads(line)) for line in (of / name).read_text().splitlines()]
            for of in (whole, pieces)
        )
        if one != two:
            yield f"{name}: {_first_difference(one, two)}"
    for pattern in ("rollouts/*", "final/*", "checkpoints/step=*/tensors.safetensors", "checkpoints/step=*/state.json"):
        yield from _compare_files(whole, pieces, pattern)


def _compare_files(whole: Path, pieces: Path, pattern: str) -> Iterator[str]:
    names = [sorted(path.relative_to(of).as_posix() for path in of.glob(pattern)) for of in (whole, pieces)]
    if pattern.startswith("checkpoints"):  # an interruption may have left one more; the last has to be the same
        names = [found[-1:] for found in names]
    if names[0] != names[1]:
        yield f"{pattern}: {names[0]} against {names[1]}"
        return
    for name in names[0]:
        one, two = ((of / name).read_bytes() for of in (whole, pieces))
        if name.endswith("README.md"):  # the model card tells the seconds
            one, two = (b"\n".join(line for line in text.splitlines() if b"seconds" not in line) for text in (one, two))
        if name.endswith("state.json"):
            plain = [json.loads(text) for text in (one, two)]
            for state in plain:
                del state["state"]["seconds"]
                state["recipe"] = state["recipe"].replace(str(pieces), str(whole))
            if plain[0] != plain[1]:
                yield f"{name}: the state differs"
        elif one != two:
            yield f"{name}: {len(one)} and {len(two)} bytes that differ"


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def _first_difference(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> str:
    if [row["step"] for row in one] != [row["step"] for row in two]:
        return f"steps {[row['step'] for row in one]} against {[row['step'] for row in two]}"
    for a, b in zip(one, two, strict=True):
        for key in [*a, *b]:
            if a.get(key) != b.get(key):
                return f"step {a['step']}, {key}: {a.get(key)} against {b.get(key)}"
    return "order"


# --- the commands -------------------------------------------------------------------------------------------------


def child(arguments: list[str]) -> NoReturn:
    """`remix.train` as it is, which also writes down each stage that it reaches."""
    from remix import train
    from remix.tracking.progress import Progress

    announce = Progress.stage

    def stage(self: Progress, name: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            with open(os.environ[STAGE_LOG], "a") as log:
                log.write(f"{name.replace(' ', '_')}\n")
        announce(self, name)

    Progress.stage = stage  # type: ignore[method-assign]
    leave(train.main(arguments))


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", metavar="WORDS")
    parser.add_argument("--kills", type=int, default=3, metavar="N", help="SIGKILLs of a case, beside one SIGTERM")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), metavar="S", help="of the moments")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the runs there")
    options = parser.parse_args()
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out}: holds something already; name a new folder")

    from rich.console import Console
    from rich.table import Table

    console = Console()
    cases = [case for case in all_cases() if set(options.cases.split()) <= set(str(case).split())]
    table = Table("case", "struck", "identical", "seconds", title=f"killed and resumed, seed {options.seed}")
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases:
            folder = (options.out or Path(temporary)) / str(case).replace(" ", "-")
            verdict = prove(case, folder, kills=options.kills, seed=options.seed)
            failed += bool(verdict.differences)
            said = "yes" if not verdict.differences else "NO: " + "; ".join(verdict.differences)
            console.print(f"{case}: {', '.join(verdict.kills)}: {said} ({verdict.seconds:.0f} s)", highlight=False)
            table.add_row(str(case), ", ".join(verdict.kills), said, f"{verdict.seconds:.0f}")
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
