"""vLLM in a process of its own, whose death costs a restart and nothing else.

The trainer talks to it over the child's standard streams, so that nothing listens anywhere. A child that dies or
falls silent is started again, given the current weights and asked the same again; as a response depends on the call
and the weights alone, the answer is bit for bit what it would have been.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from remix.errors import Interrupted, TrainingError
from remix.rollout import frames
from remix.terminal import printable
from remix.types import Completion, Request, Sampling

START_SECONDS = 1800.0
"""How long a child may take to import vLLM and load the model, on a busy machine with a slow disk."""
CHUNK = 1 << 20
"""Bytes of one read or write."""
DAY = 86400.0
STDERR_KEPT = 1 << 14
"""Bytes of what the child printed last."""
LAST_WORDS = 2000
"""Characters of them that an error message quotes."""

Weights = Iterable[tuple[str, Tensor]]

_OF_THE_TRAINER = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)$")
"""Variables that make a process a rank of the trainer's group."""


class EngineProcess:
    """A `RemoteEngine`: `VLLMEngine` in a child process, one per rank.

    The child is killed with the trainer. An interruption of a call ends it too, without counting as a fault; it is
    started again when needed.
    """

    WORKER: ClassVar[str] = "remix.rollout.engine_worker"
    """The child's module."""

    def __init__(
        self,
        model_path: str,
        *,
        weights: Callable[[], Weights] | None,
        message: Callable[[str], None],
        device: torch.device,
        timeout: float = 1800.0,
        max_restarts: int = 3,
        **engine: Any,
    ) -> None:
        """Starts the child. Raises ValueError where vLLM refuses what is asked, TrainingError where it breaks.

        weights: the policy's current weights, as last handed to `sync`; a child that takes another's place gets them.
        None: a copy of what was handed is kept for it, so that the policy may change while another thread samples.
        message: is told of each restart.
        device: the rank's own; the child sees no other GPU.
        timeout: seconds that one call may take before the child counts as hung.
        max_restarts: faults that are mended; the next one is a TrainingError.
        engine: further arguments of `VLLMEngine`.
        """
        self.restarts = 0
        """Children that took the place of one that died or hung."""
        self._arguments = {"model_path": model_path, **engine}
        self._kept: dict[str, Tensor] | None = {} if weights is None else None
        self._weights = weights or (lambda: dict(self._kept or {}).items())
        self._abandoned = threading.Event()
        self._message = message
        self._timeout, self._max_restarts = timeout, max_restarts
        self._environment = child_environment(os.environ, device)
        self._synced = False
        self._child: _Child | None = None
        self._came_up = False
        # The kernel kills the child when the thread that started it ends, so that thread is one that stays.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="engine-starter")
        try:
            self._start()
        except _FaultError as fault:
            self._give_up(fault)
        except BaseException:
            self._end()
            raise

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order, as `VLLMEngine.generate`."""
        self._make_room()
        frame = frames.pack_requests(requests, sampling)

        def ask(child: _Child) -> frames.Message:
            if self._synced and not child.loaded:
                self._load(child, self._weights())
            return child.ask([frame], self._timeout)

        reply = self._call(ask, "sampling")
        if "error" in reply.plain:
            raise ValueError(reply.plain["error"])
        return frames.unpack_completions(reply)

    def sync(self, weights: Weights) -> None:
        """Takes over all weights, as `VLLMEngine.sync`, one by one, so that no second copy of all is made."""
        self._make_room()
        self._synced = True
        self._abandoned.clear()
        if self._kept is not None:
            self._kept.clear()  # first, or there would be two copies
            self._kept.update((name, tensor.detach().to("cpu", copy=True)) for name, tensor in weights)
            weights = self._kept.items()
        given = [weights]

        def ask(child: _Child) -> frames.Message:
            return self._load(child, given.pop() if given else self._weights())

        self._call(ask, "taking over weights")

    def abandon(self) -> None:
        """From any thread: the call under way ends soon, by Interrupted, as does each until the next sync."""
        self._abandoned.set()
        child = self._child
        if child is not None:
            child.kill()  # its pipes are closed by the thread that reads them

    def close(self) -> None:
        """Ends the child. Closing twice is fine."""
        if self._child is not None:
            self._child.dismiss()
        self._end()
        self._starter.shutdown()

    def _call(self, ask: Callable[[_Child], frames.Message], stage: str) -> frames.Message:
        """The answer of a child that is up, of as many as it takes."""
        while True:
            try:
                if self._abandoned.is_set():
                    raise Interrupted
                return ask(self._child or self._start())
            except _FaultError as fault:
                if not self._abandoned.is_set():
                    self._spend_restart(fault, stage)
            except BaseException:
                self._end()  # its answer would be taken for that to the next call
                raise

    def _make_room(self) -> None:
        """For a child that wakes up."""
        if self._arguments.get("sleep") and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _start(self) -> _Child:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # vLLM takes its share of the memory that is free
        starting = self._starter.submit(_Child, self.WORKER, self._environment)
        try:
            self._child = starting.result()
        except BaseException:
            starting.add_done_callback(_end_unwanted)
            raise
        if self._abandoned.is_set():  # just before there was a child to kill
            raise Interrupted
        reply = self._child.ask([frames.pack(self._arguments)], START_SECONDS)
        if "error" in reply.plain:
            self._end()
            if not self._came_up:
                raise ValueError(reply.plain["error"])
            raise TrainingError(f"the vLLM engine's process could not be started again: {reply.plain['error']}")
        self._came_up = self._child.came_up = True
        # On a GPU vLLM measures how large a cache there is room for; another size would make other batches.
        self._arguments["kv_blocks"] = reply.plain["kv_blocks"]
        return self._child

    def _load(self, child: _Child, weights: Weights) -> frames.Message:
        child.loaded = True
        reply = child.ask(_sync_frames(weights), self._timeout)
        if "error" in reply.plain:
            raise ValueError(reply.plain["error"])
        return reply

    def _spend_restart(self, fault: _FaultError, stage: str) -> None:
        broken = self._child is not None and not self._child.came_up and fault.by_itself
        if broken or self.restarts >= self._max_restarts:
            self._give_up(fault)
        self._end()
        self.restarts += 1
        self._message(
            f"the vLLM engine's process {fault} while {stage}: starting it again "
            f"({self.restarts} of {self._max_restarts} restarts), with the same weights and requests"
        )

    def _give_up(self, fault: _FaultError) -> NoReturn:
        words = self._child.last_words() if self._child is not None else ""
        after = f" after {self.restarts} restarts (rollout.engine.restarts)" if self.restarts else ""
        self._end()
        raise TrainingError(
            f"the vLLM engine's process {fault}{after}. If memory ran out, lower rollout.engine.memory_fraction, "
            "kv_cache_gib or rollout.max_tokens; if it was slow, raise rollout.engine.timeout; or use "
            f"rollout.engine.type: hf. {f'Its last words: {words}' if words else 'It left no last words.'}"
        ) from None

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


def child_environment(environment: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """Of a process that is no rank of the trainer's group, sees the rank's own GPU alone and talks to nobody else."""
    child = {name: value for name, value in environment.items() if not _OF_THE_TRAINER.match(name)}
    # Whatever lies in the working directory, the child imports this very package.
    child["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")]))
    child["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # kernels split their sums by it
    if sys.platform == "linux":
        child |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")  # the trainer's may span machines
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        child["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index].strip() if visible else str(index)
    return child


def _sync_frames(weights: Weights) -> Iterator[bytes]:
    yield frames.pack({"call": "sync"})
    for name, tensor in weights:
        yield frames.pack({"weight": name}, {"tensor": tensor})
    yield frames.pack({"weight": None})


def _end_unwanted(starting: Future[_Child]) -> None:
    if starting.exception() is None:
        starting.result().end()


class _FaultError(Exception):
    """The child died or hung; the message says how."""

    def __init__(self, how: str, *, by_itself: bool) -> None:
        super().__init__(how)
        self.by_itself = by_itself
        """It exited, as after an error, and was not killed."""


class _Child:
    """One process of `remix.rollout.engine_worker`. Nothing here blocks for longer than a call may take."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self.came_up = False
        self.loaded = False
        """It was sent weights; before, it holds those of the checkpoint."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C is for the trainer
        )
        self._pipes = [pipe for pipe in (self._process.stdin, self._process.stdout, self._process.stderr) if pipe]
        self._calls, self._replies, self._stderr = (pipe.fileno() for pipe in self._pipes)
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)
        self._words = b""
        self._silent = False

    def ask(self, call: Iterable[bytes], seconds: float) -> frames.Message:
        """Sends the frames of a call and waits for the answer. Raises _FaultError."""
        self._limit, self._deadline = seconds, time.monotonic() + seconds
        for frame in call:
            self._write(frames.LENGTH.pack(len(frame)))
            self._write(frame)
        (length,) = frames.LENGTH.unpack(self._read(frames.LENGTH.size))
        return frames.unpack(self._read(length))

    def dismiss(self) -> None:
        """Lets an idle child tidy up, if it does so soon."""
        self._pipes[0].close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)

    def kill(self) -> None:
        """At once, with whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """The same, with its pipes. What it printed is lost."""
        self.kill()
        self._process.wait()
        for pipe in self._pipes:
            pipe.close()

    def last_words(self) -> str:
        """The end of what it printed on stderr, safe to show."""
        while self._hear():
            pass
        words = printable(self._words.decode(errors="replace"))
        return re.sub(r"\nExtension modules: .*", "", words).strip()[-LAST_WORDS:]  # of the fault handler, a long list

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(self._calls, select.POLLOUT)
            try:
                rest = rest[os.write(self._calls, rest[:CHUNK]) :]
            except BrokenPipeError:
                raise self._dead() from None

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._replies, select.POLLIN)
            chunk = os.read(self._replies, min(CHUNK, size - len(data)))
            if not chunk:
                raise self._dead()
            data += chunk
        return bytes(data)

    def _wait(self, pipe: int, event: int) -> None:
        """Until it is ready. What the child prints meanwhile is taken away, or a full pipe would stop it."""
        while True:
            poll = select.poll()
            poll.register(pipe, event)
            if not self._silent:
                poll.register(self._stderr, select.POLLIN)
            left = self._deadline - time.monotonic()
            ready = dict(poll.poll(min(max(0.0, left), DAY) * 1000))
            if self._stderr in ready:
                self._hear()
            if pipe in ready:
                return
            if left <= 0:
                raise _FaultError(f"did not answer within {self._limit:g} s", by_itself=False)

    def _hear(self) -> bool:
        """Some of what it printed; False where there is no more for now."""
        try:
            chunk = os.read(self._stderr, CHUNK)
        except BlockingIOError:
            return False
        self._silent = not chunk
        self._words = (self._words + chunk)[-STDERR_KEPT:]
        return bool(chunk)

    def _dead(self) -> _FaultError:
        """How it ended, now that its pipes are closed."""
        try:
            code = self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            return _FaultError("closed its pipes", by_itself=True)
        if code < 0:
            return _FaultError(f"was ended by {signal.Signals(-code).name}", by_itself=False)
        return _FaultError(f"ended with exit status {code}", by_itself=True)
