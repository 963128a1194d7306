"""Proves that a run is the same run under every backend, and goes on under any other.

    python scripts/prove_backends.py [--cases WORDS] [--seed S] [--out DIR]

For the embedded recipes, with full weights and LoRA: once in one process without interruption; then under each file of
recipes/accelerate/ with two processes, on a CPU over gloo: two steps, and the rest by `--resume`. Metrics, final
weights and the last checkpoint have to agree with those of one process, up to rounding. Then what a backend saved goes
on in one process, and what one process saved under the backend. Exit status 1 where something differs. A draw that lies
on the border between two tokens may fall to the other one by rounding, and everything after it is another run: where
responses differ, it is said how many at first, and how far log-probs were apart before. Another `--seed` draws anew.

`--cases "fsdp2 remix_ppo"` runs only those whose name holds all the words. DeepSpeed needs the extra `deepspeed`, g++
and, for the first start, a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

from remix.replay import logged_steps, read_shards

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cpu_2proc", "multi_node", "fsdp2", "zero2", "zero3", "zero3_offload")
RECIPES = ("grpo", "ppo", "remix_grpo", "remix_ppo")
STEPS, HALF = 4, 2
MOST_SECONDS = 600.0
METRICS = (
    "loss/policy",
    "loss/kl",
    "loss/value",
    "grad_norm/policy",
    "grad_norm/critic",
    "entropy",
    "kl/update",
    "ess",
)
METRICS += ("kl/reference", "kl/precedent", "value/explained_variance", "reward/mean", "rollouts", "batch/replayed")
TOLERANCE = 2e-3
"""Of a metric, relative to its size or to 0.01, whichever is larger: float32, summed in another order, a few optimiser
steps long."""
WEIGHT_TOLERANCE = 1e-2
"""Of a tensor, the largest difference as a share of its largest entry; a run that did anything else is off by more."""


@dataclass(frozen=True)
class Case:
    backend: str
    recipe: str
    adapter: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.backend} {self.recipe} {self.adapter}"

    @property
    def arguments(self) -> list[str]:
        path = ROOT / "recipes" / "embedded" / f"{self.recipe}.yaml"
        return [str(path), *overrides(self.recipe, self.adapter), f"seed={self.seed}", f"steps={STEPS}"]


def all_cases(seed: int = 0) -> list[Case]:
    return [Case(*of, seed) for of in product(BACKENDS, RECIPES, ("none", "lora"))]


def overrides(recipe: str, adapter: str) -> list[str]:
    """Small, with a reincarnation (folding a LoRA in) in between. A large epsilon, so that rounding stays rounding in
    AdamW; micro-batches so small that ranks have different numbers of them."""
    group = 1 if recipe.endswith("ppo") else 8
    phases = ["phases.0.until.0.after=2", "kl.lambda_schedule={start: 0.9, hold: 0, every: 1, drop: 0.2, floor: 0.3}"]
    lora = ["reincarnation.lora=merge", "adapter.alpha=16"] if adapter == "lora" else []
    return [
        f"batch={{prompts: {56 // group}, minibatches: 2, tokens_per_microbatch: 400}}",
        f"adapter.type={adapter}",
        "optimizer.lr=2e-4",
        "optimizer.eps=1e-3",
        "kl.weight=0.01",
        "eval.every=0",
        "eval.prompts=8",
        f"checkpoint.every={HALF}",
        "log.trackers=[]",
        *(phases if recipe.startswith("remix") else []),
        *lora,
    ]


def launch(backend: str, arguments: Sequence[str], log: Path, *, module: Sequence[str] = ("remix.train",)) -> None:
    """`accelerate launch` of a file of recipes/accelerate/, with two processes unless it is `cpu`. `module`: what is
    run, with arguments that come before these."""
    config = ROOT / "recipes" / "accelerate" / f"{backend}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    commands = [[*command, "--num_processes", "1" if backend == "cpu" else "2"]]
    if backend == "multi_node":
        place = ["--main_process_port", str(_free_port())]
        commands = [[*commands[0], *place, "--machine_rank", str(rank)] for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        processes = [
            subprocess.Popen([*of, "-m", *module, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output)
            for of in commands
        ]
        try:
            statuses = [process.wait(MOST_SECONDS) for process in processes]
        finally:
            for process in processes:
                process.terminate()
    if any(statuses):
        raise RuntimeError(f"{backend}: ended with {statuses}, see {log}:\n{log.read_text()[-2000:]}")


def reference(case: Case, folder: Path) -> Path:
    """The run of one process, made once for all backends."""
    run_dir = folder / "one" / f"{case.recipe}-{case.adapter}"
    if not (run_dir / "result.json").exists():
        launch("cpu", [*case.arguments, f"run_dir={run_dir}"], _log(run_dir))
    return run_dir


def prove(case: Case, folder: Path) -> Iterator[str]:
    """What differs."""
    one = reference(case, folder)
    own = folder / str(case).replace(" ", "-")
    launch(case.backend, [*case.arguments, f"run_dir={own}", f"max_steps={HALF}"], _log(own))
    back, there = own.with_name(f"{own.name}-then-one"), own.with_name(f"{own.name}-after-one")
    shutil.copytree(own, back, symlinks=True)
    cut(one, there)
    for backend, run_dir in ((case.backend, own), ("cpu", back), (case.backend, there)):
        launch(backend, [*case.arguments, "max_steps=null", "--resume", str(run_dir)], _log(run_dir))
        yield from (f"{run_dir.name}: {said}" for said in differences(one, run_dir))


def cut(whole: Path, half: Path) -> None:
    """A copy of a run as it was after HALF steps."""
    later = ("final", "result.json", f"step={STEPS:06d}", "latest", "best")
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns(*later))


def differences(one: Path, other: Path) -> Iterator[str]:
    yield from _other_draws(one, other)
    rows, others = (
        [json.loads(line) for line in (of / "metrics.jsonl").read_text().splitlines()] for of in (one, other)
    )
    if len(rows) != len(others):
        yield f"{len(others)} steps, not {len(rows)}"
    for row, found in zip(rows, others, strict=False):
        for name in METRICS:
            known, value = row.get(name), found.get(name)
            if (known is None) != (value is None):
                yield f"step {row['step']}: {name} is {value}, not {known}"
            elif known is not None and not abs(value - known) <= TOLERANCE * max(abs(known), 0.01):
                yield f"step {row['step']}: {name} is {value:.6g}, not {known:.6g}"
    for pattern in ("final/*.safetensors", f"checkpoints/step={STEPS:06d}/tensors.safetensors"):
        yield from _tensors(one, other, pattern)


def _other_draws(one: Path, other: Path) -> Iterator[str]:
    """The first step with other responses, if there is one."""
    shards = logged_steps(other)
    for step, paths in sorted(logged_steps(one).items()):
        groups, others = read_shards(paths), read_shards(shards.get(step, []))
        pairs = [
            (a, b) for x, y in zip(groups, others, strict=False) for a, b in zip(x.rollouts, y.rollouts, strict=False)
        ]
        far, differ = 0.0, 0
        for a, b in pairs:
            same = min(len(a.response_ids), len(b.response_ids))
            ids = a.response_ids[:same] == b.response_ids[:same]
            before = int(ids.long().cumprod(0).sum())
            differ += not torch.equal(a.response_ids, b.response_ids)
            apart = (a.sampler_logprobs[:before] - b.sampler_logprobs[:before]).abs()
            far = max([far, *apart.tolist()])
        if differ:
            said = f"{differ} of {len(pairs)} responses have another token, before which log-probs agree to {far:.1g}"
            yield f"step {step}: {said}"
            return


def _tensors(one: Path, other: Path, pattern: str) -> Iterator[str]:
    names = [sorted(path.relative_to(of) for path in of.glob(pattern)) for of in (one, other)]
    if names[0] != names[1] or not names[0]:
        yield f"{pattern}: {names[1]}, not {names[0]}"
        return
    for name in names[0]:
        known, found = load_file(one / name), load_file(other / name)
        expected = {key for key in known if not key.startswith("rng.")}
        if expected != {key for key in found if not key.startswith("rng.")}:
            yield f"{name}: other tensors"
            continue
        for key in sorted(expected):
            if known[key].shape != found[key].shape or known[key].dtype != found[key].dtype:
                yield f"{name}: {key} is {found[key].shape} {found[key].dtype}"
                continue
            size = known[key].float().abs().max().item()
            worst = (known[key].float() - found[key].float()).abs().max().item()
            if not worst <= WEIGHT_TOLERANCE * max(size, 1e-6):
                yield f"{name}: {key} differs by {worst:.3g} (largest entry {size:.3g})"


def _log(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.log")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", metavar="WORDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the runs there")
    options = parser.parse_args()
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out}: holds something already; name a new folder")

    from rich.console import Console
    from rich.table import Table

    console, failed = Console(), 0
    table = Table("backend", "recipe", "adapter", "same", "seconds", title="two processes against one")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        for case in all_cases(options.seed):
            if not set(options.cases.split()) <= set(str(case).split()):
                continue
            started = time.monotonic()
            try:
                found = list(prove(case, folder))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                found = [str(error)]
            failed += bool(found)
            said, seconds = "yes" if not found else f"NO: {'; '.join(found[:5])}", f"{time.monotonic() - started:.0f}"
            console.print(f"{case}: {said} ({seconds} s)", highlight=False, markup=False)
            table.add_row(*str(case).split(), "yes" if not found else "NO", seconds)
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
