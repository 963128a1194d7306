"""A vLLM server that takes over weights as a run trains them:

    REMIX_ENGINE_KEY=... python -m remix.rollout.serve MODEL --port 8000 [options] [options of vLLM's own server]

It answers on loopback unless --host says otherwise, whoever has the key, and only what a run asks of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from remix.models import files

KEY = "REMIX_ENGINE_KEY"
"""The environment variable that holds the key, of server and run."""
ABOUT = "/remix"
"""Where a server says what it serves."""
PATHS = {
    "/health",
    "/inference/v1/generate",
    "/pause",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
    "/weight_info",
}
"""What a run asks for. vLLM's development mode has more, among them calls of any method of its workers."""
NEVER = -100.0
"""What vLLM adds to the logit of a token that is not drawn; it allows no more. e^-100 is nothing beside 1."""
CPU_BATCHED_TOKENS = 4096
"""Most tokens of one forward pass on a CPU; a whole prompt has to fit."""
_PR_SET_CHILD_SUBREAPER = 36
"""Of <linux/prctl.h>."""
_SERVED = "REMIX_SERVED"
"""The environment variable by which the program tells its web application what `ABOUT` says of the model's files."""
_UNSAID = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Keys of a model's configuration that say nothing of its shape."""

Send = Callable[[dict[str, Any]], Awaitable[None]]
"""Of ASGI, the interface of Python's web servers."""


def main(arguments: Sequence[str] | None = None) -> int:
    options, of_vllm = _parser().parse_known_args(arguments)
    if options.parent is not None:
        own = sys.argv[1:] if arguments is None else list(arguments)
        return _guarded([word for word in own if not word.startswith("--parent=")], options.parent)
    try:
        if not os.environ.get(KEY, "").strip():
            raise ValueError(f"set {KEY} to a secret of yours, and to the same where the run is started")
        if find_spec("vllm") is None:
            raise ValueError("vLLM is not installed; run `bash scripts/setup.sh vllm`")
        check_free(options.host, options.port, "--port")
        folder = files.find(options.model, options.revision, files.MODEL_FILES, "MODEL")
        files.check_weights(folder)
    except ValueError as error:
        print(f"remix.rollout.serve: {error}", file=sys.stderr)
        return 2
    os.environ[_SERVED] = json.dumps(served(folder))
    _serve(options, folder, of_vllm)
    return 0


def served(folder: Path) -> dict[str, Any]:
    """What tells one model from another, short of the weights, which a sync replaces."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return {
        "config": {key: value for key, value in config.items() if key not in _UNSAID},
        "tokenizer": files.fingerprint(folder, files.TOKENIZER_FILES)["sha256"],
    }


def check_free(host: str, port: int, key: str) -> None:
    """Raises ValueError where a server cannot listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"{key} {port}: cannot listen there on {host} ({error.strerror}): choose another port, or end what has "
                "it"
            ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m remix.rollout.serve", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub id or directory: the model.path of the run")
    add("--port", type=int, required=True)
    add("--host", default="127.0.0.1", help="who may connect; beyond loopback the key travels in the clear")
    add("--revision", help="branch, tag or commit of a model from the hub")
    add("--trust-remote-code", action="store_true")
    add("--max-model-len", type=int, help="most tokens of a prompt and its response (default: the model's)")
    add("--dtype", default="auto", help="the model.dtype of the run")
    add("--tensor-parallel", type=int, default=1, help="GPUs of this server")
    add("--memory-fraction", type=float, default=0.9, help="of a GPU")
    add("--kv-cache-gib", type=float, default=0.25, help="on a machine without a GPU")
    add("--enforce-eager", action="store_true", help="no CUDA graphs and no compilation")
    add("--seed", type=int, default=0)
    add("--parent", type=int, help=argparse.SUPPRESS)  # the process that this one is not to outlive
    return parser


def _guarded(arguments: Sequence[str], parent: int) -> int:
    """The server as a child in a process group of its own, all of which ends with the parent, also a killed one."""
    if sys.platform == "linux":  # the children of the server come to this process when it dies, to be buried
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    command = [sys.executable, "-P", "-m", "remix.rollout.serve", *arguments]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    try:
        while child.poll() is None and os.getppid() == parent:
            time.sleep(0.3)
        return child.returncode or 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # vLLM's own processes may outlive the one that is gone
        with contextlib.suppress(ChildProcessError):
            while os.wait():
                pass


def _serve(options: argparse.Namespace, folder: Path, of_vllm: Sequence[str]) -> None:
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # where weights are taken over; `Door` stands before it
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # of the group of its workers, which are on this machine
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or all servers of a machine would share its first core
    }.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    from remix.rollout.vllm_weights import BACKEND, EXTENSION

    words = [
        f"--host={options.host}",
        f"--port={options.port}",
        f"--model={folder}",
        f"--dtype={options.dtype}",
        f"--seed={options.seed}",
        f"--tensor-parallel-size={options.tensor_parallel}",
        "--load-format=safetensors",
        "--tokens-only",  # token ids in, token ids out
        "--logprobs-mode=processed_logprobs",  # at the sampling temperature
        f"--worker-extension-cls={EXTENSION}",
        f"--weight-transfer-config={json.dumps({'backend': BACKEND})}",
        "--middleware=remix.rollout.serve.Door",
        "--disable-fastapi-docs",
        "--disable-uvicorn-access-log",
    ]
    if options.max_model_len is not None:
        words.append(f"--max-model-len={options.max_model_len}")
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    if current_platform.is_cpu():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it compiles for longer than it saves
        batched = max(options.max_model_len or 0, CPU_BATCHED_TOKENS)
        words += [
            "--enforce-eager",
            f"--kv-cache-memory-bytes={int(options.kv_cache_gib * 2**30)}",
            # Between two chunks of a prompt vLLM turns a seeded generator back, which one of a CPU cannot do.
            "--no-enable-chunked-prefill",
            f"--max-num-batched-tokens={batched}",
        ]
        if options.tensor_parallel == 1:
            # Or vLLM would give the one worker a process of its own, which polls for its calls.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            words.append("--distributed-executor-backend=uni")
    else:
        words.append(f"--gpu-memory-utilization={options.memory_fraction}")
        words += ["--enforce-eager"] * options.enforce_eager
    sys.argv = ["vllm", *words, *of_vllm]
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


class Door:
    """Lets in who has the key, and to nothing but `PATHS`. vLLM's own key guards no path of its development mode."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._key = os.environ[KEY].strip().encode()

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            return  # a websocket, which is closed without an answer
        elif not self._has_key(dict(scope["headers"]).get(b"authorization", b"")):
            await _reply(send, 401, {"error": {"message": f"no, or not the right, {KEY}"}})
        elif scope["path"] == ABOUT:
            await _reply(send, 200, _about(scope["app"].state))
        elif scope["path"] in PATHS:
            await self._app(scope, receive, send)
        else:
            await _reply(send, 404, {"error": {"message": "not served"}})

    def _has_key(self, header: bytes) -> bool:
        return hmac.compare_digest(header, b"Bearer " + self._key)


def _about(state: Any) -> dict[str, Any]:
    model = state.vllm_config.model_config
    return {
        **json.loads(os.environ[_SERVED]),
        "max_model_len": model.max_model_len,
        "dtype": str(model.dtype).removeprefix("torch."),
        "logprobs_mode": str(model.logprobs_mode),
    }


async def _reply(send: Send, status: int, plain: dict[str, Any]) -> None:
    body = json.dumps(plain).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    sys.exit(main())
