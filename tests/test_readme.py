"""Every command that the README and the pages of use show, run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from remix import cli
from tests.tiny import ROOT

README = (ROOT / "README.md").read_text()
USE = ["README.md", *(f"docs/{name}.md" for name in ("training", "evaluation", "merging", "performance"))]
LINES = [line for page in USE for line in (ROOT / page).read_text(encoding="utf-8").splitlines()]
COMMANDS = [
    *dict.fromkeys(
        line.split("#")[0].strip() for line in LINES if re.match(r"    (bash|remix|accelerate|python) ", line)
    )
]
QUICK = ["max_steps=1", "eval.prompts=4", "batch.prompts=8"]
WITHOUT_RECIPE = ("merge", "continual", "watch", "schema", "report")
ELSEWHERE = {"bash scripts/test.sh"}  # what runs this


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path) -> None:
    """In the pages' order, since one resumes what another began, from a copy so that runs/ stays clean."""
    assert len(COMMANDS) >= 17
    for name in ("eval", "recipes", "scripts", "remix", ".venv", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"}
    for command in COMMANDS:
        if command in ELSEWHERE:
            continue
        words = shlex.split(command)
        if "scripts/bench_step.py" in words:
            words += ["--steps", "1", *QUICK[1:]]
        elif "scripts/bench_checkpoint.py" in words:
            words += ["--repeat", "1", *QUICK[1:]]
        elif words[:2] == ["remix", "eval"]:
            words += ["--limit", "8"]
        elif (words[0] == "remix" and words[1] in WITHOUT_RECIPE) or "scripts/bench_packing.py" in words:
            pass
        elif "continual" in command:
            words += ["steps=1", "phases=[{type: on_policy}]", *QUICK[1:], "continual.order=[colour,where]"]
        elif "auto" in words:
            words += QUICK
        elif "--resume" in words:
            words += ["max_steps=2"]
        elif "plan" not in words:
            words += QUICK
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"
    assert (tmp_path / "runs" / "demo" / "final" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "eval" / "summary.md").exists()
    assert (tmp_path / "runs" / "merged" / "model.safetensors").exists()
    assert (tmp_path / "report.html").exists()
    assert any((tmp_path / "pictures").iterdir())
    assert len((tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()) == 2


PAGES = ["README.md", "SECURITY.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in links if not ((ROOT / page).parent / link.split("#")[0]).exists()] == []


def test_the_example_of_many_machines_is_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    remix (plan --cluster .*)$", page, re.MULTILINE)
    assert cli.main(shlex.split(command)) == 0
    shown = capsys.readouterr().out
    for row in ("sent in an optimiser step", "rollouts received", "log-probs received"):
        (line,) = (line for line in shown.splitlines() if row in line)
        numbers = re.findall(r"[\d.]+ [GM]iB", line)
        assert numbers[-1] in " ".join(page.split())


def test_every_function_of_the_table_exists() -> None:
    import remix.algorithms
    import remix.merging.methods

    rooms = (remix.algorithms, remix.merging.methods)
    table = README.split("## The equations")[1].split("## The tree")[0]
    names = re.findall(r"`([a-z_]+)`", table)
    assert len(names) >= 10
    assert [name for name in names if not any(hasattr(room, name) for room in rooms)] == []
