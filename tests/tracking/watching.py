"""What the tests of `remix watch` share: its terminal, and the folder of a run as it grows."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from remix import cli
from tests.tiny import ROOT

STEPS = 4


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
