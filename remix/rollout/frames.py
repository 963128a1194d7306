"""Messages between a trainer and its engine's process: JSON and tensors as safetensors bytes, never pickle."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from remix.types import Completion, Request, Sampling

SHARED_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where weights lie on their way; None = wherever temporary files do."""

LENGTH = struct.Struct("<Q")
"""Stands before every frame: the number of its bytes."""


class Message(NamedTuple):
    """One frame."""

    plain: Any
    """What JSON can say."""
    tensors: Mapping[str, Tensor]
    """On the CPU."""


def pack(plain: Any, tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """The frame of a message, without its length. Tensors may lie anywhere, in any layout."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
    packed: bytes = save(on_cpu, {"plain": json.dumps(plain)})
    return packed


def unpack(frame: bytes) -> Message:
    (header,) = LENGTH.unpack_from(frame)  # safetensors' own: it hands out tensors, but metadata only of files
    metadata = json.loads(frame[LENGTH.size : LENGTH.size + header])["__metadata__"]
    return Message(json.loads(metadata["plain"]), load(frame))


def write(stream: BinaryIO, frame: bytes) -> None:
    stream.write(LENGTH.pack(len(frame)))
    stream.write(frame)
    stream.flush()


def read(stream: BinaryIO) -> Message | None:
    """The next message; None where the other side has hung up."""
    length = stream.read(LENGTH.size)
    if len(length) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(length)
    frame = stream.read(size)
    return unpack(frame) if len(frame) == size else None


# --- requests one way, completions the other ---


def pack_requests(requests: Sequence[Request], sampling: Sampling) -> bytes:
    prompts = [request.prompt_ids for request in requests]
    plain = {
        "call": "generate",
        "lengths": [len(prompt) for prompt in prompts],
        "seeds": [request.seed for request in requests],
        "images": [request.images for request in requests],
        "sampling": asdict(sampling),
    }
    ids = [token for prompt in prompts for token in prompt]
    return pack(plain, {"ids": torch.tensor(ids, dtype=torch.int64)})


def unpack_requests(message: Message) -> tuple[list[Request], Sampling]:
    plain = message.plain
    prompts = message.tensors["ids"].split(plain["lengths"])
    requests = [
        Request(tuple(ids.tolist()), seed, tuple(images))
        for ids, seed, images in zip(prompts, plain["seeds"], plain["images"], strict=True)
    ]
    return requests, Sampling(**plain["sampling"])


def pack_completions(completions: Sequence[Completion]) -> bytes:
    plain = {
        "lengths": [len(completion.response_ids) for completion in completions],
        "reasons": [completion.finish_reason for completion in completions],
    }
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *(c.response_ids for c in completions)])
    logprobs = torch.cat([torch.empty(0), *(c.sampler_logprobs for c in completions)])
    return pack(plain, {"ids": ids, "logprobs": logprobs})


def unpack_completions(message: Message) -> list[Completion]:
    plain, tensors = message
    ids, logprobs = (tensors[name].split(plain["lengths"]) for name in ("ids", "logprobs"))
    # Copies, not views: one response that is kept must not hold the memory of all.
    return [Completion(i.clone(), p.clone(), r) for i, p, r in zip(ids, logprobs, plain["reasons"], strict=True)]
