"""`remix watch` as a user sees it, on the folder of a real run: once, live, growing, cut back, and through ssh."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from remix import cli
from remix.tracking.follow import Folder, FollowedRun, LocalFolder, RunState
from remix.tracking.remote import RemoteFolder, remote_place
from remix.tracking.run_log import RunLog
from remix.tracking.watch_view import RunView
from remix.train import main as train
from tests.tiny import EMBEDDED, ROOT

STEPS = 4


@pytest.fixture(scope="module")
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


def lines(run_dir: Path) -> list[bytes]:
    return (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(run_dir)]


def write(folder: Path, content: bytes, name: str = "metrics.jsonl") -> None:
    """As a run that is resumed does: another file under the same name."""
    (folder / "new").write_bytes(content)
    (folder / "new").replace(folder / name)


def seen(capsys: pytest.CaptureFixture[str], place: Path | str) -> str:
    assert cli.main(["watch", "--once", str(place)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], place: Path | str) -> str:
    assert cli.main(["watch", str(place)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    return said.err


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
    assert "begun 0:0" in shown


def test_whether_it_still_lives(run_dir: Path, growing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(growing, b"".join(lines(run_dir)[:2]))
    shown = seen(capsys, growing)
    assert "running, last step 0:0" in shown
    assert "left 0:0" in shown
    an_hour_ago = time.time() - 3600
    os.utime(growing / "metrics.jsonl", (an_hour_ago, an_hour_ago))
    assert "silent for 1:00:0" in seen(capsys, growing)


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
    assert "task 2 of 3" in shown
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


class Terminal:
    """`remix watch` in a terminal of 100 x 40."""

    def __init__(self, place: Path | str, **environ: str) -> None:
        self.shown = b""
        self.end, other = pty.openpty()
        ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.before = termios.tcgetattr(other)
        self.other = other
        command = [sys.executable, "-m", "remix.cli", "watch", str(place)]
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        environment = {**kept, "TERM": "xterm-256color", **environ}
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, cwd=ROOT, env=environment, start_new_session=True
        )

    def read(self) -> None:
        if select.select([self.end], [], [], 0.1)[0]:
            self.shown += os.read(self.end, 1 << 16)

    @property
    def frame(self) -> str:
        """What was drawn last."""
        return re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", self.shown.rsplit(b"\x1b[H", 1)[-1].decode(errors="replace"))

    def wait_for(self, *texts: str) -> None:
        deadline = time.monotonic() + 60
        while not all(text in self.frame for text in texts):
            assert self.process.poll() is None, self.frame
            assert time.monotonic() < deadline, self.frame
            self.read()

    def wait_for_the_end(self) -> int:
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.frame
            self.read()
        while select.select([self.end], [], [], 0.1)[0]:
            self.shown += os.read(self.end, 1 << 16)
        assert termios.tcgetattr(self.other) == self.before, "the terminal is as it was"
        for taken, given in ((b"\x1b[?1049h", b"\x1b[?1049l"), (b"\x1b[?25l", b"\x1b[?25h")):
            assert self.shown.count(taken) == self.shown.count(given) == 1
        return self.process.returncode


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


# --- on another machine -------------------------------------------------------------------------------------------


@pytest.fixture
def ssh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an `ssh` that has the login shell of "the other machine" run the command, in a home of its own.

    It is told to fail by a file `fail`, and writes down what it was called with in `words`.
    """
    folder = tmp_path_factory.mktemp("ssh")
    (folder / "home").mkdir()
    script = f"""#!/bin/sh
        printf '%s\\n' "$@" >{folder}/words
        if [ -f {folder}/fail ]; then echo 'me@box: Permission denied (publickey).' >&2; exit 255; fi
        while [ "$1" != -- ]; do shift; done
        echo "Last login: today"
        cd {folder}/home && exec sh -c "exec $3"
    """
    (folder / "ssh").write_text(script)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("path", ["absolute", "run", "~/run", 'it\'s $(touch harm); `touch harm` & "so" \\ -on'])
def test_the_view_from_elsewhere_is_that_from_here(
    run_dir: Path, ssh: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir if path == "absolute" else ssh / "home" / path.removeprefix("~/")
    if path != "absolute":
        folder.symlink_to(run_dir)
    place = f"me@box:{folder if path == 'absolute' else path}"
    here, there = (seen(capsys, where).split("\n", 1) for where in (run_dir, place))
    assert there[1] == here[1]
    words = (ssh / "words").read_text()
    assert "\n--\nme@box\nsh -c " in words
    assert not (ssh / "home" / "harm").exists()


def test_live_from_elsewhere(run_dir: Path, growing: Path, ssh: Path, terminal: Callable[..., Terminal]) -> None:
    watched = terminal(f"box:{growing}", PATH=os.environ["PATH"])
    watched.wait_for("no step yet  0/4")
    write(growing, lines(run_dir)[0])
    watched.wait_for("mix_policy  1/4")
    os.write(watched.end, b"q")
    assert watched.wait_for_the_end() == 0


def test_ssh_that_fails_says_why(
    ssh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "box:nowhere: no such folder on box" in refused(capsys, "box:nowhere")
    assert "box:/: no run there" in refused(capsys, "box:/")
    (ssh / "fail").touch()
    assert "box:x: ssh failed: me@box: Permission denied (publickey). Try" in refused(capsys, "box:x")
    monkeypatch.setenv("PATH", str(ssh / "home"))
    assert "no ssh is installed" in refused(capsys, "box:x")


def test_a_connection_that_breaks_is_said(growing: Path, ssh: Path, terminal: Callable[..., Terminal]) -> None:
    watched = terminal(f"box:{growing}", PATH=os.environ["PATH"])
    watched.wait_for("no step yet  0/4")
    (child,) = map(int, Path(f"/proc/{watched.process.pid}/task/{watched.process.pid}/children").read_text().split())
    os.kill(child, signal.SIGKILL)
    assert watched.wait_for_the_end() == 2
    assert "ssh failed: it ended with status -9" in watched.shown.decode()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_following_fetches_what_is_new(run_dir: Path, growing: Path, ssh: Path, elsewhere: bool) -> None:
    whole = lines(run_dir)
    connection = RemoteFolder("box", str(growing)) if elsewhere else None
    folder: Folder = connection or LocalFolder(growing)
    run = FollowedRun(folder)

    def steps() -> list[int]:
        return [row["step"] for row in run.poll().rows]

    def fetched() -> int:
        """Bytes of metrics.jsonl that the next poll has to fetch."""
        tail = run._metrics
        piece = folder.fetch(tail.name, tail._identity, tail._offset, 1 << 20)
        return 0 if piece is None else len(piece.data)

    assert steps() == []
    write(growing, whole[0] + whole[1][:-1])
    assert steps() == [0]
    assert fetched() == 0
    with (growing / "metrics.jsonl").open("ab") as log:
        log.write(b"\n" + whole[2])
    assert fetched() == 1 + len(whole[2])
    assert steps() == [0, 1, 2]
    write(growing, whole[0])  # cut back
    assert steps() == [0]
    write(growing, whole[1] + whole[2])  # another file, no shorter
    assert steps() == [1, 2]
    os.truncate(growing / "metrics.jsonl", len(whole[1]))  # the same file, shorter
    assert steps() == [1]
    (growing / "metrics.jsonl").unlink()
    assert steps() == []
    # Of a long file its end, from the first whole line on.
    write(growing, b"".join(whole))
    piece = folder.fetch("metrics.jsonl", "", 0, 10)
    assert piece is not None
    assert (piece.start, piece.data) == (sum(map(len, whole)) - 10, whole[-1][-10:])
    if connection is not None:
        connection.close()


def test_the_end_of_a_long_log(run_dir: Path, growing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lines(run_dir)
    write(growing, b"".join(whole))
    monkeypatch.setitem(sys.modules["remix.tracking.follow"].MOST_BYTES, "metrics.jsonl", len(whole[-1]) + 10)
    state: RunState = FollowedRun(LocalFolder(growing)).poll()
    assert [row["step"] for row in state.rows] == [STEPS - 1]
    assert state.unreadable == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("box:runs/a", ("box", "runs/a")),
        ("me@box.example.org:/runs/a b", ("me@box.example.org", "/runs/a b")),
        ("me@[fe80::1%eth0]:~/a", ("me@[fe80::1%eth0]", "~/a")),
        ("box:", ("box", "")),
        ("runs/a", None),
        ("./box:runs", None),
        ("runs/a:b", None),
        ("-oProxyCommand=touch:x", None),
        ("me@-oProxyCommand=touch:x", None),
        ("box;touch x:y", None),
        ("box:a\nb", None),
    ],
)
def test_what_is_a_place_elsewhere(text: str, expected: tuple[str, str] | None) -> None:
    assert remote_place(text) == expected
