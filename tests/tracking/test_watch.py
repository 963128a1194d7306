"""`remix watch` as a user sees it, on the folder of a real run: once, live, growing, cut back."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from remix.tracking.follow import FollowedRun, LocalFolder
from remix.tracking.run_log import RunLog
from remix.tracking.watch_view import RunView
from tests.tracking.watching import Terminal, lines, refused, rows, seen, write

# --- once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [48, 80, 150])
def test_a_view_of_any_width(
    run_dir: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = seen(capsys, run_dir)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    last = rows(run_dir)[-1]
    words = " ".join(shown.split())
    for text in ("on_policy 4/4", "done", f"reward {last['reward/mean']:.3f}", f"rollouts {last['rollouts']:,}"):
        assert text in words
    for text in ("λ 1.00", "reincarnated before step 3", "KL to precedent", "ESS", "entropy", "updating", "▁", "█"):
        assert text in words
    assert f"pass@1 {last['eval/pass@1']:.1%}" in words
    assert f"length {last['response/length']:.3g}" in words
    completion = json.loads((run_dir / "completions.jsonl").read_text().splitlines()[-1])
    assert completion["response"] in shown
    # Side by side where there is room.
    (line,) = [line for line in shown.splitlines() if line.lstrip().startswith("reward   ")]
    assert ("lag" in line) == (width == 150)


def test_a_common_terminal_shows_all_of_it(run_dir: Path) -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(RunView(FollowedRun(LocalFolder(run_dir)).poll(), lines=24))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue().splitlines()
    assert len(shown) <= 24
    assert shown[-1].startswith("╰"), "the completion, which comes last"


def test_replayed_lags_have_their_rows(
    run_dir: Path, growing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    write(growing, b"".join(lines(run_dir)[:2]))
    row = rows(run_dir)[1]
    (line,) = re.findall(r"^ +1  .*$", seen(capsys, growing), re.MULTILINE)
    assert line.split()[1] == f"{row['tokens/lag=1']:,.0f}"
    assert float(line.split()[2]) == pytest.approx(row["ratio/mean/lag=1"], rel=0.01)
    assert float(line.split()[-1]) == pytest.approx(row["ess/lag=1"], rel=0.01)


def test_before_the_first_step(growing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = seen(capsys, growing)
    assert "no step yet  0/4" in shown
    assert re.search(r"begun \d+:\d\d ago", shown)


def test_whether_it_still_lives(run_dir: Path, growing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(growing, b"".join(lines(run_dir)[:2]))
    for hours, expected in (
        (1, "running, last step 0:00 ago"),
        (-1, "silent for 1:"),
    ):  # no clock is late for the first
        then = time.time() + 3600 * hours
        os.utime(growing / "metrics.jsonl", (then, then))
        shown = seen(capsys, growing)
        assert expected in shown
        assert re.search(r"left \d+:\d\d", shown)


def test_a_resumed_run_is_not_done_by_its_older_result(
    run_dir: Path, growing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(growing, b"".join(lines(run_dir)[:3]))
    for steps, expected in ((3, "done"), (2, "running")):
        (growing / "result.json").write_text(json.dumps({"steps": steps}))
        assert expected in seen(capsys, growing)


def test_tasks_in_order_show_the_one_in_hand(run_dir: Path, growing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (growing / "recipe.yaml").write_text("continual: {order: [a, b, c]}\nsteps: 4\n")
    for number in range(2):
        stage = growing / "stages" / f"task={number:02d}"
        shutil.copytree(run_dir, stage, ignore=shutil.ignore_patterns("checkpoints", "final"))
        write(stage, b"".join(lines(run_dir)[: number + 1]))
    shown = seen(capsys, growing)
    assert "task 2 of 3" in " ".join(shown.split())
    assert "2/4" in shown
    assert "running" in shown, "a task that is done is not the run"


def test_what_a_log_holds_does_no_harm(run_dir: Path, growing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = b'{"step": %d, "phase": "x"}\nnot json\n\xff\n{"step": -1}\n[]\n' % 10**40
    row = rows(run_dir)[0] | {"phase": "\x1b[2Jcalm", "entropy": 10**400, "ess": "\x1b]0;title\x07", "tokens/lag=²": 1}
    write(growing, lines(run_dir)[0] + bad + json.dumps(row | {"kl/reference": float("nan")}).encode() + b"\n")
    said = {"step": 1, "prompt": [{"role": "user", "content": "a\x1b[31mb"}], "response": "over\rwritten\x1b[2J [bold]"}
    write(growing, json.dumps(said | {"answer": "\x9b2J4", "reward": 1e400}).encode() + b"\n", "completions.jsonl")
    shown = seen(capsys, growing)
    assert "lines that are damaged, left out: 5" in shown
    for text in ("calm", "ab", "overwritten [bold]", "answer 4"):
        assert text in shown
    assert not set("\x1b\x9b\r\x07") & set(shown)


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither recipe.yaml nor metrics.jsonl is in it" in refused(capsys, tmp_path)
    assert "no such folder" in refused(capsys, tmp_path / "nowhere")
    assert "no such folder" in refused(capsys, "./host:nowhere")


# --- live ---------------------------------------------------------------------------------------------------------


def test_a_run_that_grows_is_cut_back_and_ends(run_dir: Path, growing: Path, terminal: Callable[..., Terminal]) -> None:
    whole = lines(run_dir)
    watched = terminal(growing)
    watched.wait_for("no step yet  0/4")
    log = (growing / "metrics.jsonl").open("ab", buffering=0)
    with log:
        log.write(whole[0] + whole[1] + whole[2][:100])
        watched.wait_for("mix_policy  2/4", f"reward {rows(run_dir)[1]['reward/mean']:.3f}")
        log.write(whole[2][100:])
        watched.wait_for("mix_policy  3/4")
    RunLog(growing, from_step=1)  # resumed
    watched.wait_for("mix_policy  1/4", f"reward {rows(run_dir)[0]['reward/mean']:.3f}")
    assert "damaged" not in watched.shown.decode()
    write(growing, b"".join(whole))
    shutil.copy(run_dir / "completions.jsonl", growing)
    watched.wait_for("on_policy  4/4", "a completion of step 3")
    shutil.copy(run_dir / "result.json", growing)
    assert watched.wait_for_the_end() == 0
    left = watched.shown.rsplit(b"\x1b[?1049l", 1)[-1].decode()
    assert "done" in left, "the last view stays"


@pytest.mark.parametrize("way", ["q", "interrupt", "terminate"])
def test_leaving(growing: Path, terminal: Callable[..., Terminal], way: str) -> None:
    watched = terminal(growing)
    watched.wait_for("no step yet  0/4")
    if way == "q":
        os.write(watched.end, b"q")
    else:
        watched.process.send_signal(signal.SIGINT if way == "interrupt" else signal.SIGTERM)
    assert watched.wait_for_the_end() == (143 if way == "terminate" else 0)
    assert "Traceback" not in watched.shown.decode()
