"""A run on another machine, through ssh, and what is fetched of its files."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from remix.tracking.follow import Folder, FollowedRun, LocalFolder, RunState
from remix.tracking.remote import RemoteFolder, remote_place
from tests.tracking.watching import STEPS, Terminal, lines, refused, seen, write


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
