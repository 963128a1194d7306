"""A real run of a tiny model, and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remix.train import run
from tests.tiny import MIX, tiny_recipe

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
"""That let it run as root, on a machine without a screen, and ask for nothing by itself."""


@pytest.fixture(scope="session")
def real_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of replay, one on-policy."""
    folder = tmp_path_factory.mktemp("real") / "run"
    phases = [{**MIX[0], "until": [{"type": "steps", "after": 2}]}, {"type": "on_policy"}]
    log = {"trackers": [], "completions_every": 1}
    run(tiny_recipe(tiny_model, folder, {"steps": 3, "phases": phases, "log": log, "eval": {"every": 1}}))
    return folder


@pytest.fixture(scope="module")  # no longer: other tests count the processes that they leave behind
def browser() -> Iterator[Any]:
    """Chromium as the system has it; `apt-get install chromium`."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=binary, args=list(FLAGS), timeout=120_000)
        yield opened
        opened.close()
