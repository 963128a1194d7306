"""What a run leaves to read survives a kill, and a resumed run writes no line twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from remix.durable import write_json
from remix.tracking import run_log
from remix.tracking.run_log import RunLog, read_metrics
from remix.types import Prompt, Rollout, RolloutGroup, Score


def group(name: str, content: object = "1+1=", score: Score | None = None) -> RolloutGroup:
    def member(text: str) -> Rollout:
        ids = torch.tensor([1])
        return Rollout(ids, ids, torch.zeros(1), 0, "stop", 0, text, score)

    return RolloutGroup(Prompt(name, content, "2", "sum"), (member(f"{name} first"), member(f"{name} second")))


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new")
    log.log(0, "mix_policy", {"reward/mean": 0.1 + 0.2, "rollouts": 8})
    log.log(1, "on_policy", {"reward/mean": -1e-300})
    assert read_metrics(tmp_path / "new") == [
        {"step": 0, "phase": "mix_policy", "reward/mean": 0.1 + 0.2, "rollouts": 8},
        {"step": 1, "phase": "on_policy", "reward/mean": -1e-300},
    ]


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(3):
        log.log(step, "on_policy", {})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step + 1


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.log(0, "on_policy", {"x": 1.0})
    log.log(1, "on_policy", {"x": 2.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for cut in range(first_line, len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["x"] for row in read_metrics(tmp_path)] == [1.0], f"cut after {cut} bytes"
    # Resumed, the log goes on behind the last whole line.
    RunLog(tmp_path, from_step=2).log(2, "on_policy", {"x": 3.0})
    assert [row["x"] for row in read_metrics(tmp_path)] == [1.0, 3.0]


def test_a_character_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    RunLog(tmp_path).log(0, "on_policy", {})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + '{"step": 1, "phase": "ä'.encode()[:-1])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 1', "not JSON"),
        (b"\xff", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"3", "no JSON object with a `step`"),
        (b'{"step": null}', "no JSON object with a `step`"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    RunLog(tmp_path).log(0, "on_policy", {})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    for read in (read_metrics, lambda run_dir: RunLog(run_dir, from_step=3)):
        with pytest.raises(ValueError, match=rf"metrics\.jsonl:2: {message}.*remove the line"):
            read(tmp_path)


def test_from_step_cuts_off_what_lies_beyond(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(5):
        log.log(step, "on_policy", {"x": step})
        log.log_completions(step, [group(f"p{step}")], 1)
    resumed = RunLog(tmp_path, from_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    resumed.log(3, "on_policy", {"x": 30})
    assert [row["x"] for row in read_metrics(tmp_path)] == [0, 1, 2, 30]
    completions = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in completions] == ["p0", "p1", "p2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["completions.jsonl", "metrics.jsonl"]


def test_a_new_run_begins_with_an_empty_log(tmp_path: Path) -> None:
    RunLog(tmp_path).log(0, "on_policy", {})
    RunLog(tmp_path)
    assert read_metrics(tmp_path) == []


def test_completions_are_the_first_of_each_of_the_first_groups(tmp_path: Path) -> None:
    turns = ({"role": "user", "content": "ä?"},)
    groups = [group("a", score=Score(0.5, "correct")), group("b", turns), group("c")]
    RunLog(tmp_path).log_completions(7, groups, 2)
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert rows == [
        {
            "step": 7,
            "prompt_id": "a",
            "prompt": "1+1=",
            "answer": "2",
            "response": "a first",
            "reward": 0.5,
            "verdict": "correct",
        },
        {
            "step": 7,
            "prompt_id": "b",
            "prompt": [{"role": "user", "content": "ä?"}],
            "answer": "2",
            "response": "b first",
            "reward": None,
            "verdict": None,
        },
    ]


def test_one_run_one_log(tmp_path: Path) -> None:
    RunLog(tmp_path).log(0, "on_policy", {"x": 1})
    other = RunLog(tmp_path, enabled=False)
    other.log(0, "on_policy", {"x": 2})
    other.log_completions(0, [group("a")], 1)
    assert [row["x"] for row in read_metrics(tmp_path)] == [1]
    assert (tmp_path / "completions.jsonl").read_text() == ""


def test_no_run_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"pass": 0.5, "none": None})
    assert json.loads(path.read_text()) == {"pass": 0.5, "none": None}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"pass": 0.75, "bad": object()})
    assert json.loads(path.read_text()) == {"pass": 0.5, "none": None}

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(run_log.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"pass": 1.0})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"pass": 0.5, "none": None}
    write_json(path, {"pass": 1.0})
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
