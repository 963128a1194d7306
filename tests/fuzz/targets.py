"""Every surface that takes what others wrote, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from remix.rewards import GraderPool
from tests.fuzz import answers, lines, recipes, shards
from tests.fuzz.harness import MachineTarget, Target, Tools

TARGETS: dict[str, Target | MachineTarget] = {
    "recipe bytes": Target(recipes.BYTES, recipes.check_recipe, 150),
    "recipe text": Target(recipes.TEXT, recipes.check_recipe, 120),
    "recipe mutated": Target(recipes.MUTATED, recipes.check_recipe, 120),
    "recipe overrides": Target(recipes.OVERRIDDEN, recipes.check_recipe, 90),
    "plan": Target(recipes.MUTATED, recipes.check_plan, 120),
    "jsonl bytes": Target(lines.PROBLEM_BYTES, lines.check_problems, 300),
    "jsonl lines": Target(lines.PROBLEM_LINES, lines.check_problems, 300),
    "run log": Target(lines.LOGS, lines.check_log, 200),
    "shard round trip": Target(shards.WRITTEN, shards.check_round_trip, 80),
    "shard torn text": Target(shards.TORN, shards.check_round_trip, 60),
    "shard damaged": Target(shards.DAMAGES, shards.check_damaged, 250),
    "replay buffer": MachineTarget(shards.BufferMachine, 25),
    "answer text": Target(answers.TEXT_CASES, answers.check_text, 250),
    "grader": Target(answers.EXAMS, answers.check_grader, 40),
}


@contextmanager
def open_tools() -> Iterator[Tools]:
    with TemporaryDirectory() as folder, GraderPool(workers=1, timeout=answers.TIMEOUT) as pool:
        yield Tools(Path(folder), pool)
