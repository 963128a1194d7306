"""The folder of a run on another machine, read through the system's `ssh`: it needs nothing there but a POSIX shell."""

from __future__ import annotations

import re
import secrets
import shlex
import subprocess
import tempfile
from pathlib import Path

from remix.terminal import showable
from remix.tracking.follow import Piece

_PLACE = re.compile(
    r"(?P<host>(?:[\w.+-]+@)?(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|\w[\w.-]*)):(?P<path>[^\n]*)", re.ASCII | re.DOTALL
)
_OPTIONS = ("-T", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=10")

# Answers one request a line. Each answer ends with a line that no file can hold, since it is made up for the
# connection: a file that is cut back while it is read is shorter than was said. Neither `!` nor a backslash in it: the
# login shell over there, which takes the quotes off, may be any.
_SCRIPT = """\
mark=$2; set -f; unset CDPATH; echo "$mark"; \
if cd -- "$1" 2>/dev/null; then echo ready; else echo missing; fi; \
while read -r name identity offset most; do \
if [ -f "$name" ] && [ -r "$name" ]; then \
set -- $(ls -i "$name") $(wc -c <"$name"); start=0; \
if [ "$1" = "$identity" ] && [ "$3" -ge "$offset" ]; then start=$offset; \
elif [ "$3" -gt "$most" ]; then start=$(($3 - most)); fi; \
echo "$1 $start $(($(date +%s) - $(date -r "$name" +%s)))"; tail -c "+$((start + 1))" "$name"; \
else echo none; fi; echo; echo "$mark"; done"""


def remote_place(text: str) -> tuple[str, str] | None:
    """Host and path of `[user@]host:path`; None for what is a local path: it exists, or has a / before its first :."""
    found = None if Path(text).exists() else _PLACE.fullmatch(text)
    return None if found is None else (found["host"], found["path"])


class RemoteFolder:
    """A connection. Raises ValueError where there is no such folder, ConnectionError where ssh fails."""

    def __init__(self, host: str, path: str) -> None:
        self.name = f"{host}:{path}"
        self._mark = secrets.token_hex(16).encode()
        # Relative to the home directory there, as with scp; a ~ within quotes would be a name.
        path = path.removeprefix("~/") or "."
        words = ["sh", "-c", _SCRIPT, "remix-watch", path if path.startswith("/") else f"./{path}", self._mark.decode()]
        # Not a pipe: a connection that ssh shares with later ones would keep it open after this one is over.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = ["ssh", *_OPTIONS, "--", host.replace("[", "").replace("]", ""), shlex.join(words)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        except FileNotFoundError:
            raise ValueError(f"{self.name} is on another machine, and no ssh is installed on this one") from None
        self._unread = b""
        self._read_to(self._mark + b"\n")  # what comes before it is what the login shell has to say
        if self._read_to(b"\n") != b"ready":
            self.close()
            raise ValueError(f"{self.name}: no such folder on {host}")

    def fetch(self, name: str, identity: str, offset: int, most: int) -> Piece | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{name} {identity or '-'} {offset} {most}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        head, _, data = self._read_to(b"\n" + self._mark + b"\n").partition(b"\n")
        if head == b"none":
            return None
        inode, start, age = head.decode("ascii", "replace").split(" ")
        return Piece(inode, int(start), data, max(float(age), 0.0))

    def close(self) -> None:
        """Ends ssh, and with it what runs over there."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _read_to(self, end: bytes) -> bytes:
        assert self._process.stdout is not None
        searched = 0
        while (found := self._unread.find(end, searched)) < 0:
            searched = max(len(self._unread) - len(end), 0)
            more = self._process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
            if not more:
                raise self._failure()
            self._unread += more
        answer, self._unread = self._unread[:found], self._unread[found + len(end) :]
        return answer

    def _failure(self) -> ConnectionError:
        status = self._process.wait()
        self._errors.seek(0)
        lines = showable(self._errors.read().decode(errors="replace")).split("\n")
        said = next((line.strip(" .") for line in reversed(lines) if line.strip()), f"it ended with status {status}")
        return ConnectionError(f"{self.name}: ssh failed: {said}. Try plain `ssh` to the same host first")
