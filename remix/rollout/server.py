"""vLLM as servers: prompts are dealt out over all that answer, and each is handed the weights after every update.

A response depends on its request and the weights: whichever server answers, the same tokens come, and log-probs that
differ by rounding alone, as batches do. So the prompts of a server that is gone go to the others. What a server holds
has a version; one that holds another than the policy's is not asked, and its answer would not be taken.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import IO, Any, TypeVar

import anyio
import httpx
from anyio.from_thread import start_blocking_portal
from torch import Tensor

from remix.durable import locked
from remix.errors import Interrupted, TrainingError
from remix.rollout import frames
from remix.rollout.launch import OwnServers
from remix.rollout.limits import check_fits
from remix.rollout.process import START_SECONDS
from remix.rollout.replica import DownError, Replica, Wanted, problem
from remix.types import Completion, Request, Sampling

A = TypeVar("A")
CONNECTIONS = 768
"""At a time, to all servers together: more would be more files than a process may have open."""
CHUNK = 1 << 30
"""Bytes of weights that are gathered before they are written to a file."""
UNSYNCED = "default"
"""What vLLM calls the weights that a server began with."""
WAIT_SECONDS = 1.0
"""Between two looks for a server that is being started again."""

_FOLDER, _LOCK = "remix-weights-", ".lock"


def alone(value: A) -> list[A]:
    """What all ranks have, where there is one."""
    return [value]


class ServerEngine:
    """A `RemoteEngine`: `remix.rollout.serve` in processes of its own. All ranks sync together, each samples its share.

    `generate` may run in another thread than the trainer's; a sync waits for its end.

    urls: of the servers, the same on every rank.
    key: that they ask for.
    max_model_len: most tokens of a prompt and its response together.
    eos_token_ids: tokens that end a response.
    never: tokens that are not drawn.
    timeout, retries, transfer: see the recipe.
    own: the run started them and starts them again.
    message: is told which servers are left out, and which are back.
    gather: one value of every rank. The first rank alone hands over weights.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        never: Sequence[int] = (),
        timeout: float = 600.0,
        retries: int = 3,
        transfer: str | None = None,
        own: bool = False,
        message: Callable[[str], None],
        gather: Callable[[Any], list[Any]] = alone,
        is_main: bool = True,
    ) -> None:
        self._replicas = [Replica(url, timeout=timeout, retries=retries) for url in urls]
        self._headers = {"Authorization": f"Bearer {key}"}
        self._max_model_len = max_model_len
        self._eos_token_ids, self._never = tuple(eos_token_ids), tuple(never)
        self._own, self._message = own, message
        self._gather, self._is_main = gather, is_main
        self._out: dict[str, str] = {}
        """Servers that are left out, and why."""
        self._version = UNSYNCED
        self._name = gather(secrets.token_hex(4))[0]
        """Sets this run's versions apart from those of another at the same servers."""
        self._syncs = 0
        self._turn = threading.Lock()
        """Held by a call: no weights change under a response."""
        self._abandoned = threading.Event()
        self._asked: Future[Any] | None = None
        """What `generate` waits for."""
        self._loading = threading.Lock()
        """Held by who hands weights over; guards the next two."""
        self._paths: list[str] = []
        self._held = UNSYNCED
        self._folder: Path | None = None
        self._lock: IO[str] | None = None
        if is_main:
            self._folder, self._lock = _folder(transfer)
        self.servers: OwnServers | None = None
        """Those that this rank started. It closes them with itself."""

    def check(self, wanted: Wanted) -> None:
        """Raises ValueError where a server does not answer, or is not what the run needs."""

        async def abouts(http: httpx.AsyncClient) -> list[dict[str, Any] | DownError]:
            return await _each(self._replicas, lambda replica: _or_down(replica.about(http)))

        for replica, about in zip(self._replicas, self._run(abouts), strict=True):
            wrong = problem(replica.url, about, wanted)
            if wrong:
                raise ValueError(f"rollout.engine.urls: {replica.url} {wrong}")

    def answers(self, url: str) -> bool:
        """Whether the server there is up."""

        async def up(http: httpx.AsyncClient) -> bool:
            return not isinstance(await _or_down(self._at(url).version(http, patient=False)), DownError)

        return self._run(up)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order. Under temperature 0 log-probs are those at temperature 1."""
        check_fits(requests, sampling, self._max_model_len)
        if any(request.images for request in requests):
            raise ValueError("Servers take prompts without images: set rollout.engine.type to vllm or hf.")
        found: dict[int, Completion] = {}

        async def round_(http: httpx.AsyncClient) -> None:
            """All that is left, over all that answer."""
            live = await self._live(http)
            left = [index for index in range(len(requests)) if index not in found]
            limit = max(1, CONNECTIONS // len(live))
            async with anyio.create_task_group() as group:
                for i, replica in enumerate(live):
                    # Neighbours are of one prompt, which a server computes once.
                    share = left[len(left) * i // len(live) : len(left) * (i + 1) // len(live)]
                    group.start_soon(self._ask, http, replica, share, requests, sampling, found, limit)

        with self._turn:
            while len(found) < len(requests):
                self._run(round_, abandonable=True)
        return [found[index] for index in range(len(requests))]

    def abandon(self) -> None:
        """From any thread: the call under way ends soon, by Interrupted, as does each until the next sync."""
        self._abandoned.set()
        if self._asked is not None:
            self._asked.cancel()

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hands all weights to all servers, named and shaped as in their checkpoint.

        A server that does not take them is left out; it is tried again at the next sync. Raises ValueError where the
        weights are not those of the model; the servers go on with those that they had.
        """
        with self._turn:
            self._abandoned.clear()
            self._gather("")  # once here, no rank samples
            version = f"{self._name}-{self._syncs + 1}"
            error: ValueError | TrainingError | None = None
            if self._is_main:
                try:
                    self._hand_over(weights, version)
                except (ValueError, TrainingError) as raised:
                    error = raised
            else:
                deque(weights, maxlen=0)  # where they are sharded, all ranks together make each whole
            error = self._gather(error)[0]
            if error is not None:
                raise error
            self._version, self._syncs = version, self._syncs + 1

    def revive(self, url: str) -> bool:
        """Gives a server that was started again the current weights; False where it does not take them yet."""

        async def load(http: httpx.AsyncClient) -> bool:
            replica = self._at(url)
            try:
                await replica.version(http, patient=False)
                if self._held != UNSYNCED:
                    await replica.load(http, self._paths, self._held)
            except DownError:
                return False
            return True

        with self._loading:
            return self._run(load)

    def close(self) -> None:
        """Ends the servers that the run started. Closing twice is fine."""
        if self.servers is not None:
            self.servers.close()
        if self._folder is not None and self._lock is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.close()

    async def _ask(
        self,
        http: httpx.AsyncClient,
        replica: Replica,
        share: Sequence[int],
        requests: Sequence[Request],
        sampling: Sampling,
        found: dict[int, Completion],
        limit: int,
    ) -> None:
        """One server for its share; what it does not answer stays out of `found`."""
        limiter, version = anyio.CapacityLimiter(limit), self._version

        async def one(index: int) -> None:
            async with limiter:
                found[index] = await replica.respond(
                    http,
                    requests[index],
                    sampling,
                    version=version,
                    eos_token_ids=self._eos_token_ids,
                    never=self._never,
                )

        try:
            async with anyio.create_task_group() as group:
                for index in share:
                    group.start_soon(one, index)
        except* DownError as downs:
            self._leave_out(replica, downs.exceptions[0])

    async def _live(self, http: httpx.AsyncClient) -> list[Replica]:
        """The servers that hold the policy's weights. Raises TrainingError where there is none to hope for."""
        for _ in range(int(START_SECONDS / WAIT_SECONDS)):
            versions = await _each(
                self._replicas,
                lambda replica: _or_down(replica.version(http, patient=replica.url not in self._out)),
            )
            for replica, version in zip(self._replicas, versions, strict=True):
                if version == self._version:
                    if self._out.pop(replica.url, None):
                        self._message(f"the vLLM server {replica.url} is back")
                else:
                    self._leave_out(replica, version if isinstance(version, DownError) else f"holds weights {version}")
            live = [replica for replica in self._replicas if replica.url not in self._out]
            if live:
                return live
            if not self._own or (self.servers is not None and not self.servers.hopeful):
                break
            await anyio.sleep(WAIT_SECONDS)
        whys = "; ".join(f"{url} {why}" for url, why in self._out.items())
        raise TrainingError(
            f"no vLLM server is left ({whys}). Start them again, then go on from the last checkpoint with --resume; or "
            "use rollout.engine.type: hf. If they were slow, raise rollout.engine.timeout"
        )

    def _leave_out(self, replica: Replica, why: Exception | str) -> None:
        if replica.url not in self._out:
            self._message(f"the vLLM server {replica.url} {why}: left out, its prompts go to the others")
            if self.servers is not None and isinstance(why, DownError):
                self.servers.end(replica.url)  # it may hang
        self._out[replica.url] = str(why)

    def _hand_over(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        with self._loading:
            paths: list[str] = []
            try:
                self._write(weights, version, paths)
                self._run(self._load_all, paths, version)
            except BaseException:
                _remove(paths)
                raise
            before, self._paths, self._held = self._paths, paths, version
        _remove(before)

    async def _load_all(self, http: httpx.AsyncClient, paths: Sequence[str], version: str) -> None:
        async def load(replica: Replica) -> DownError | ValueError | None:
            try:
                return await _or_down(replica.load(http, paths, version))
            except ValueError as error:
                return error

        for replica, error in zip(self._replicas, await _each(self._replicas, load), strict=True):
            if isinstance(error, ValueError):
                raise error
            if error is not None:
                self._leave_out(replica, error)

    def _write(self, weights: Iterable[tuple[str, Tensor]], version: str, paths: list[str]) -> None:
        """To files of about `CHUNK` bytes, which `paths` comes to name."""
        folder, chunk, size = self._folder, dict[str, Tensor](), 0
        assert folder is not None

        def flush() -> None:
            path = folder / f"{version}-{len(paths)}.safetensors"
            paths.append(str(path))
            path.write_bytes(frames.pack({}, chunk))
            chunk.clear()

        try:
            for name, tensor in weights:
                chunk[name] = tensor.detach().to("cpu", copy=True)  # it may change when the next is asked for
                size += tensor.nbytes
                if size >= CHUNK:
                    flush()
                    size = 0
            flush()
        except OSError as error:
            raise TrainingError(
                f"the weights could not be written to {self._folder} ({error.strerror}): set rollout.engine.transfer "
                "to a folder with room for them, which trainer and servers see"
            ) from error

    def _at(self, url: str) -> Replica:
        return next(replica for replica in self._replicas if replica.url == url)

    def _run(self, work: Callable[..., Awaitable[A]], *arguments: Any, abandonable: bool = False) -> A:
        """With a client, in a thread of its own: what a signal handler raises would be lost in an event loop."""

        async def with_client() -> A:
            limits = httpx.Limits(max_connections=CONNECTIONS + len(self._replicas))
            # No proxies of the environment: their keepers would read the key.
            async with httpx.AsyncClient(headers=self._headers, limits=limits, trust_env=False) as http:
                return await work(http, *arguments)

        with start_blocking_portal() as portal:
            task = portal.start_task_soon(with_client)
            if abandonable:
                self._asked = task
                if self._abandoned.is_set():  # just before there was a task to cancel
                    task.cancel()
            try:
                return task.result()
            except CancelledError:
                raise Interrupted from None


async def _each(replicas: Sequence[Replica], ask: Callable[[Replica], Awaitable[A]]) -> list[A]:
    """All at the same time."""
    found: dict[str, A] = {}

    async def one(replica: Replica) -> None:
        found[replica.url] = await ask(replica)

    async with anyio.create_task_group() as group:
        for replica in replicas:
            group.start_soon(one, replica)
    return [found[replica.url] for replica in replicas]


async def _or_down(answer: Awaitable[A]) -> A | DownError:
    try:
        return await answer
    except DownError as error:
        return error


def _folder(transfer: str | None) -> tuple[Path, IO[str]]:
    """A folder of this run's own, and the lock that it has as long as the run lives. Raises ValueError where there can
    be none. Those that runs left behind in shared memory, which were killed, are removed."""
    parent = Path(transfer or frames.SHARED_MEMORY or gettempdir())
    if transfer is None:
        _clear(parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(prefix=_FOLDER, dir=parent))
        if transfer is not None:
            folder.chmod(0o755)  # servers of another user read it too
    except OSError as error:
        raise ValueError(
            f"rollout.engine.transfer {parent}: cannot be written to ({error.strerror}): name a folder that trainer "
            "and servers see"
        ) from error
    lock = locked(folder / _LOCK)
    assert lock is not None
    return folder, lock


def _clear(parent: Path) -> None:
    for path in parent.glob(f"{_FOLDER}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # another user's
            lock = locked(path)
            if lock is not None:
                shutil.rmtree(path.parent)
                lock.close()


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)
