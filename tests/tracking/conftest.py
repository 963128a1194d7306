"""A real run to watch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from remix.train import main as train
from tests.tiny import EMBEDDED
from tests.tracking.watching import STEPS, Terminal


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of the shipped recipe, made small."""
    run_dir = tmp_path_factory.mktemp("watched") / "run"
    words = [f"run_dir={run_dir}", f"steps={STEPS}", "batch.prompts=8", "eval.prompts=8", "eval.every=2"]
    words += ["phases.0.until=[{type: steps, after: 3}]", "log={trackers: [], completions_every: 1}"]
    assert train([str(EMBEDDED / "remix_grpo.yaml"), *words]) == 0
    return run_dir


@pytest.fixture
def growing(run_dir: Path, tmp_path: Path) -> Path:
    """The same run as it had begun: the folder and the recipe alone."""
    shutil.copy(run_dir / "recipe.yaml", tmp_path)
    return tmp_path


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    with ExitStack() as stack:

        def opened(place: Path | str, **environ: str) -> Terminal:
            made = Terminal(place, **environ)
            stack.callback(os.close, made.end)
            stack.callback(os.close, made.other)
            stack.callback(made.process.kill)
            return made

        yield opened
