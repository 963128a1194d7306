"""What `remix continual report` says of a run, under way or done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from remix.cli import main
from remix.evaluation.continual import Learnt, Record, read_record
from remix.evaluation.continual_report import markdown, transfer_table

ORDER = ["colour", "<b>shape|", "digit"]
ROWS = [(0.9, 0.2, 0.1), (0.5, 0.8, 0.3), (0.6, 0.4, 1.0)]


def record(learnt: int = 3) -> Record:
    rows = [
        Learnt(
            task=task,
            own={name: 0.95 if name == task else 0.0 for name in ORDER},
            merged=dict(zip(ORDER, accuracies, strict=True)),
            sign_conflict=0.25 if index else None,
            rollouts=1200,
            seconds=12.3,
        )
        for index, (task, accuracies) in enumerate(zip(ORDER, ROWS, strict=True))
    ]
    base = dict.fromkeys(ORDER, 0.125)
    return Record({"type": "pam", "average": "half"}, ORDER, base, rows[:learnt])


def shown(of: Record) -> str:
    console = Console(width=100, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(transfer_table(of))
    return capture.get()


def test_the_table_has_every_number() -> None:
    text = shown(record())
    assert [line.split() for line in text.splitlines() if line.startswith((" nothing", " digit"))] == [
        ["nothing", "12.5", "12.5", "12.5"],
        ["digit", "60.0", "40.0", "100.0"],
    ]
    for words in ("ACC          66.7", "BWT          -35.0", "forgetting   35.0", "zero_shot    20.0"):
        assert words in text


def test_a_run_under_way() -> None:
    assert "BWT          –" in shown(record(1))


def test_the_command_writes_a_page_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record().write(tmp_path)
    assert read_record(tmp_path) == record()
    assert main(["continual", "report", str(tmp_path)]) == 0
    assert "66.7" in capsys.readouterr().out
    page = (tmp_path / "continual.md").read_text()
    assert "| digit | 95.0 | 100.0 | 25.0% | 1,200 | 12 |" in page
    assert "<b>" not in page  # a task's name is a text, no markup
    with Image.open(tmp_path / "continual.png") as picture:
        assert picture.width > picture.height > 300
    assert main(["continual", "report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["BWT"] == pytest.approx(-0.35)


def test_markdown_is_whole_before_the_last_task() -> None:
    assert "2 of 3 tasks learnt" in markdown(record(2), "continual.png")


@pytest.mark.parametrize("content", [None, "{", '{"learnt": 3}', '{"learnt": []}'])
def test_what_is_no_continual_run_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "continual.json").write_text(content)
    assert main(["continual", "report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
