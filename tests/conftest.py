"""One process, few threads, no network: set before torch is imported."""

import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_model, make_tiny_vision_model

imported = 0
"""Modules when the garbage collector was last told of them."""


def pytest_configure() -> None:
    gc.disable()  # until all tests are imported


def pytest_collection_finish() -> None:
    _pass_over_what_lasts()
    gc.enable()


def pytest_runtest_logfinish() -> None:
    _pass_over_what_lasts()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries would say at the end that something is left


def _pass_over_what_lasts() -> None:
    """A run collects garbage twice; to look through all that libraries hold would take longer than the run itself."""
    global imported
    if len(sys.modules) > imported + 100:
        imported = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole training runs first: what is left for the end is short, so that workers end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the tests of tests/fuzz counted, whichever process ran them."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = [value for report in reports for name, value in report.user_properties if name == "fuzz"]
    if rows:
        terminalreporter.section("fuzzing")
        headings = ("target", "examples", "accepted", "refused", "failures", "seconds")
        totals = ["all", *(round(sum(column), 1) for column in list(zip(*rows, strict=True))[1:])]
        for name, *counts in (headings, *rows, totals):
            terminalreporter.write_line(f"{name:18}" + "".join(f"{count:>10}" for count in counts))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer text model with the embedded model's tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of 2 + 2 layers with its processor."""
    return make_tiny_vision_model(tmp_path_factory.mktemp("tiny_vision"))


@pytest.fixture(scope="session")
def tiny_untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny_untied"), tie=False)


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model again: its head size of 32 is one that vLLM's CPU attention has."""
    return make_tiny_model(tmp_path_factory.mktemp("vllm"))
