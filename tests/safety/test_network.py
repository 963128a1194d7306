"""Who is spoken to: nobody under HF_HUB_OFFLINE=1. Who can speak to a run: nobody from another machine."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from remix.config import dump_recipe
from remix.training.distributed import stay_on_this_machine
from tests.tiny import ROOT, tiny_recipe

WATCHED = """
import json, sys
log = open({log!r}, "a", buffering=1)
def watch(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        place = args[0] if event in ("socket.getaddrinfo", "socket.gethostbyname") else args[1]
        log.write(json.dumps([event, place], default=repr) + "\\n")
sys.addaudithook(watch)
"""
"""Writes down every address that a process binds, reaches out to or asks for."""

PLACES = {"socket.connect", "socket.bind", "socket.sendto"}


@dataclass
class Done:
    stdout: str
    stderr: str
    listeners: set[tuple[str, str]]
    """Seen at any time beyond loopback: (address, command) of the process itself and its descendants."""


def watched(log: Path, *commands: Sequence[str], **environment: str) -> Done:
    """Commands [module, word, ...] one after the other in a process of their own; it prints their exit codes last."""
    log.touch()
    code = f"""{WATCHED.format(log=str(log))}
from importlib import import_module
print([import_module(module).main(words) for module, *words in {[list(command) for command in commands]!r}])
"""
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            stdout=out,
            stderr=err,
        )
        listeners = set[tuple[str, str]]()
        while process.poll() is None:
            listeners |= beyond_loopback(process.pid)
            time.sleep(0.1)
    return Done(log.with_suffix(".out").read_text(), log.with_suffix(".err").read_text(), listeners)


def outside(log: Path) -> list[list[object]]:
    """The events that lead beyond this machine."""
    return [event for event in map(json.loads, log.read_text().splitlines()) if not is_inside(*event)]


def is_inside(event: str, place: object) -> bool:
    """A path (a socket of this machine), a netlink address, or loopback by number or name."""
    host = place[0] if event in PLACES and isinstance(place, list) else place
    if event in PLACES and not isinstance(place, list):
        return True
    if not isinstance(host, str):
        return isinstance(host, int)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def test_the_watch_sees(tmp_path: Path) -> None:
    code = """
import socket
socket.socket().bind(("127.0.0.1", 0))
socket.socket().bind(("", 0))
for host in ("93.184.216.34", "example.com"):
    try:
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b"", (host, 9))
    except OSError:
        pass
try:
    socket.getaddrinfo("huggingface.co", 443)
except OSError:
    pass
"""
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", WATCHED.format(log=str(log)) + code], check=True)
    seen = [(event, place[0] if isinstance(place, list) else place) for event, place in outside(log)]
    assert ("socket.bind", "") in seen
    assert ("socket.sendto", "93.184.216.34") in seen
    assert ("socket.getaddrinfo", "huggingface.co") in seen
    assert not any(place == "127.0.0.1" for _, place in seen)


def test_a_run_and_an_evaluation_speak_to_nobody_and_listen_to_nobody(tiny_model: Path, tmp_path: Path) -> None:
    """The math grader's processes included."""
    changes = {
        "rewards": [{"type": "math"}, {"type": "length", "free_tokens": 1, "max_tokens": 24}],
        "log": {"trackers": ["tensorboard"]},
    }
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe(tiny_model, tmp_path / "run", changes)))
    evaluation = ["eval", "--model", str(tmp_path / "run" / "final"), "--benchmarks", "arithmetic", "--limit", "8"]
    done = watched(
        tmp_path / "log",
        ["remix.train", str(tmp_path / "recipe.yaml")],
        ["remix.cli", *evaluation, "--engine", "hf", "--out", str(tmp_path / "eval")],
    )
    assert done.stdout.splitlines()[-1] == "[0, 0]", done.stderr
    assert outside(tmp_path / "log") == []
    assert done.listeners == set()


def test_what_was_not_fetched_before_is_missed_at_once(tiny_model: Path, tmp_path: Path) -> None:
    commands = []
    for name, changes in {
        "model": {"model": {"path": "owner/nowhere"}},
        "data": {"tasks": [{"type": "hub", "path": "owner/nowhere"}]},
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_recipe(tiny_recipe(tiny_model, tmp_path / "run", changes)))
        commands.append(["remix.train", str(path)])
    done = watched(tmp_path / "log", *commands, HF_HOME=str(tmp_path / "empty"))
    assert done.stdout.splitlines()[-1] == "[2, 2]"
    model, data = done.stderr.splitlines()
    assert model.startswith("error: model owner/nowhere: no such directory, and not fetched from the hub before")
    assert data.startswith("error: the data set 'owner/nowhere' (name None, split train) cannot be loaded")
    assert "OfflineModeIsEnabled" in data
    assert outside(tmp_path / "log") == []


# --- who listens --------------------------------------------------------------------------------------------------


def family(process: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found, before = {process}, set[int]()
    while found != before:
        before = set(found)
        found |= {child for child, parent in parents.items() if parent in before}
    return found


def listening(process: int) -> set[tuple[str, str]]:
    """(address, command) of every TCP socket on which a process or a descendant of it listens."""
    owners: dict[str, str] = {}
    for member in family(process):
        folder = Path("/proc") / str(member)
        with suppress(OSError):
            command = (folder / "cmdline").read_text().replace("\0", " ")
            owners.update((os.readlink(fd), command) for fd in (folder / "fd").iterdir())
    return {
        (address, owners[f"socket:[{inode}]"]) for address, inode in tcp_listeners() if f"socket:[{inode}]" in owners
    }


def tcp_listeners() -> Iterator[tuple[str, str]]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            (
                _,
                local,
                _,
                state,
                *_,
            ) = line.split()[:4]
            if state == "0A":
                words = bytes.fromhex(local.split(":")[0])
                # The kernel writes each 32-bit word in the machine's own order.
                address = b"".join(
                    words[i : i + 4][:: 1 if sys.byteorder == "big" else -1] for i in range(0, len(words), 4)
                )
                yield str(ipaddress.ip_address(address)), line.split()[9]


def beyond_loopback(process: int) -> set[tuple[str, str]]:
    return {(host, owner) for host, owner in listening(process) if not ipaddress.ip_address(host).is_loopback}


def test_the_search_for_listeners_finds_them() -> None:
    code = "import socket, time; s = socket.create_server(('{}', 0)); print(flush=True); time.sleep(60)"
    for host in ("127.0.0.1", "0.0.0.0"):
        process = subprocess.Popen(
            [sys.executable, "-c", code.format(host)], stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert {address for address, _ in listening(process.pid)} == {host}
            assert {address for address, _ in listening(os.getpid())} >= {host}
            assert len(beyond_loopback(process.pid)) == (host == "0.0.0.0")
        finally:
            process.kill()
            process.wait()


def test_ranks_of_one_machine_speak_over_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "")  # so that they are put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    stay_on_this_machine()
    assert [os.environ.get(name) for name in names] == [None, None]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")  # the user's own choice
    stay_on_this_machine()
    assert [os.environ.get(name) for name in names] == ["lo", "eth1"]
