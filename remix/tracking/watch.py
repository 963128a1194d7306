"""`remix watch`: a run seen from outside, live in a terminal, or once."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from remix.tracking.follow import Folder, FollowedRun, RunState

# Nothing heavy up here: `remix --help` answers at once.

POLL_SECONDS = 1.0
KEY_SECONDS = 0.25


def add_watch(commands: Any) -> None:
    watch = commands.add_parser(
        "watch",
        usage="remix watch [--once] RUN_DIR | [user@]host:RUN_DIR",
        help="a live view of a run, here or on another machine",
        description="Shows how a run goes, from its files: reward, pass@1, KL, ratios by lag, seconds by stage, a "
        "completion. Of a run on another machine by ssh, with its configuration and keys. Ends with the run, with q "
        "or with Ctrl-C.",
    )
    watch.set_defaults(command=_watch)
    watch.add_argument("run_dir", metavar="RUN_DIR", help="its folder; host:path for one on another machine")
    watch.add_argument("--once", action="store_true", help="print it as it is now and end, as without a terminal")


def _watch(args: argparse.Namespace, *_: Any) -> int:
    from rich.console import Console

    from remix.tracking.follow import FollowedRun
    from remix.tracking.watch_view import RunView

    console = Console(markup=False, emoji=False, highlight=False)
    try:
        with _opened(args.run_dir) as folder:
            run = FollowedRun(folder)
            state = run.poll()
            if not (args.once or state.finished) and console.is_interactive:
                state = _live(run, state, console)
    except KeyboardInterrupt:
        return 130
    console.print(RunView(state))
    return 0


@contextmanager
def _opened(place: str) -> Iterator[Folder]:
    from remix.tracking.follow import LocalFolder
    from remix.tracking.remote import RemoteFolder, remote_place

    elsewhere = remote_place(place)
    if elsewhere is None:
        yield LocalFolder(Path(place))
        return
    remote = RemoteFolder(*elsewhere)
    try:
        yield remote
    finally:
        remote.close()


def _live(run: FollowedRun, state: RunState, console: Any) -> RunState:
    """Until the run ends or the person leaves; returns what was last shown. Raises what reading raises."""
    from rich.live import Live

    from remix.tracking.watch_view import RunView

    # Reading waits for disks and networks, which keys and the display do not.
    follower = _Follower(run, state)

    def view() -> RunView:
        return RunView(follower.state, console.height)

    live = Live(get_renderable=view, console=console, screen=True, refresh_per_second=4)
    try:
        with _leaving_by_signals(), _keys() as key, live:
            while not follower.over.is_set():
                if "q" in key().lower():
                    return follower.state
    except KeyboardInterrupt:  # ssh hears it too, whose end is no error then
        return follower.state
    finally:
        follower.left.set()
    if follower.error is not None:
        raise follower.error
    return follower.state


class _Follower(threading.Thread):
    def __init__(self, run: FollowedRun, state: RunState) -> None:
        super().__init__(daemon=True)
        self.state = state
        self.error: Exception | None = None
        self.left, self.over = threading.Event(), threading.Event()
        self._run = run
        self.start()

    def run(self) -> None:
        try:
            while not self.state.finished and not self.left.wait(POLL_SECONDS):
                self.state = self._run.poll()
        except Exception as error:  # raised again where somebody hears it
            self.error = error
        self.over.set()


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """What is typed, asked for again and again; each time waits a moment for it."""
    if not sys.stdin.isatty():

        def nothing() -> str:
            time.sleep(KEY_SECONDS)
            return ""

        yield nothing
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()

    def typed() -> str:
        if not select.select([terminal], [], [], KEY_SECONDS)[0]:
            return ""
        return os.read(terminal, 1024).decode(errors="ignore") or "q"  # nothing to read: the terminal is gone

    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield typed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextmanager
def _leaving_by_signals() -> Iterator[None]:
    """SIGTERM too gives the terminal back as it was."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
