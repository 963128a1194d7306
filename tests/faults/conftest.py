"""The run that the others would have been."""

from pathlib import Path

import pytest

from tests.faults.harness import train


@pytest.fixture(scope="session")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unharmed") / "run"
    train(run_dir)
    return run_dir
