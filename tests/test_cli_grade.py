"""`remix grade`, run as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remix.rewards import grade_file
from remix.rewards.grade_file import count_lines

ROOT = Path(__file__).parents[1]
BOMB = r"\boxed{\sum_{k=1}^{10^9} \sin(k^k)}"


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "remix.cli", "grade", *map(str, args)]


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, cwd=ROOT)


def line(gold: object, prediction: object, **more: object) -> bytes:
    return json.dumps({"gold": gold, "prediction": prediction, **more}).encode() + b"\n"


def test_one_line_out_per_line_in_whatever_it_holds(tmp_path: Path) -> None:
    lines = [
        (line("1/2", r"\boxed{0.5}", id=7, extra={"a": [1]}), "correct"),
        (b"\n", "error"),
        (b"not json\r\n", "error"),
        (b"[1, 2]\n", "error"),
        (b"null\n", "error"),
        (b'{"gold": "5"}\n', "error"),
        (b'{"prediction": "5"}\n', "error"),
        (line(5, r"\boxed{5}"), "error"),
        (line([], r"\boxed{5}"), "error"),
        (line(["5", None], r"\boxed{5}"), "error"),
        (line("5", None), "error"),
        (b'\xff\xfe {"gold"\n', "error"),
        (b"[" * 100_000 + b"\n", "error"),
        (b'{"gold": ' + b"9" * 5000 + b', "prediction": "5"}\n', "error"),
        (line(["4", "5"], r"\boxed{5}", correct="stays not", raw="mine"), "correct"),
        (line("5", ""), "no_answer"),
        (line("5", "\ud800 \u2028 \x00"), "no_answer"),
        (line("5", r"\boxed{" * 100_000), "no_answer"),
        (line("5", BOMB), "timeout"),
        (line("x^2", r"so \boxed{x \cdot x}")[:-1], "correct"),  # no newline at the end
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(text for text, _ in lines))
    done = run("--in", source, "--out", target, "--workers", "2", "--timeout", "1.5")
    assert done.returncode == 0, done.stderr
    assert "20 graded" in done.stdout
    written = [json.loads(text) for text in target.read_bytes().split(b"\n")[:-1]]
    assert [row["verdict"] for row in written] == [verdict for _, verdict in lines]
    assert all(row["correct"] is (row["verdict"] == "correct") for row in written)
    assert written[0] == {
        "gold": "1/2",
        "prediction": r"\boxed{0.5}",
        "id": 7,
        "extra": {"a": [1]},
        "correct": True,
        "verdict": "correct",
        "extracted": "0.5",
    }
    assert written[2]["raw"] == "not json"
    assert "not JSON" in written[2]["error"]
    assert written[11]["raw"].startswith(r"\xff\xfe")
    assert written[14]["raw"] == "mine"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_order_is_kept_over_batches(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(line(str(n), rf"\boxed{{{n + n % 2}}}", id=n) for n in range(1500)))
    assert run("--in", source, "--out", target, "--workers", "1").returncode == 0
    rows = [json.loads(text) for text in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(1500))
    assert [row["correct"] for row in rows] == [n % 2 == 0 for n in range(1500)]
    assert count_lines(source) == 1500


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    assert run("--in", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl").returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--in", "missing.jsonl", "--out", "out.jsonl"], "missing.jsonl"),
        (["--in", ".", "--out", "out.jsonl"], "directory"),
        (["--in", "in.jsonl", "--out", "there.jsonl"], "there.jsonl is there already"),
        (["--in", "in.jsonl", "--out", "in.jsonl"], "in.jsonl is there already"),
        (["--in", "in.jsonl", "--out", "nowhere/out.jsonl"], "there is no directory"),
        (["--in", "in.jsonl", "--out", "out.jsonl", "--workers", "0"], "--workers must be"),
        (["--in", "in.jsonl", "--out", "out.jsonl", "--timeout", "0"], "--timeout must be"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(line("5", "5"))
    (tmp_path / "there.jsonl").write_text("precious")
    paths = [str(tmp_path / word) if "." in word and not word[0].isdigit() else word for word in arguments]
    done = run(*paths)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text() == "precious"


def test_an_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line("5", BOMB) * 3)
    process = subprocess.Popen(command("--in", source, "--out", target, "--timeout", "60"), cwd=ROOT)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.jsonl.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert not target.exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line("5", "5"))
    with pytest.raises(ValueError, match="has appeared while this ran"):
        grade_file.grade_file(source, target, 1, 5, lambda _: target.write_text("theirs"))
    assert target.read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(line("5", r"\boxed{5}") * 50)
    master, slave = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color"}
    environ.pop("NO_COLOR", None)
    subprocess.run(command("--in", source, "--out", tmp_path / "out.jsonl"), cwd=ROOT, stderr=slave, env=environ)
    os.set_blocking(master, False)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    os.close(slave)
    assert "50/50" in shown
    assert "left" in shown


def test_help_is_quick_and_light() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command("--help")[1:]], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert "--timeout" in done.stdout
    assert not {"torch", "rich", "sympy", "mpmath"} & {text.split("|")[-1].strip() for text in done.stderr.splitlines()}
