"""Your own function as a reward, in processes of its own: it may hang, raise or die without taking the run along."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from remix.config import PythonReward
from remix.rewards.base import Part, shortened
from remix.rewards.workers import START_SECONDS, Lost, Reply, StartError, WorkerPool, WorkerSpec
from remix.types import Prompt


class Python:
    """Calls function(prompt, response), with `prompt` a remix.types.Prompt.

    Raises ValueError where the function cannot be loaded.
    """

    def __init__(self, config: PythonReward) -> None:
        self._name = config.function
        spec = WorkerSpec(
            module="remix.rewards.python_worker",
            arguments=(config.function, json.dumps(sys.path)),
            name=f"the process of the reward function '{config.function}'",
            by_hand=f"{sys.executable} -c 'import {config.function.partition(':')[0]}'",
            timeout=config.timeout,
            start_seconds=max(START_SECONDS, config.timeout),
        )
        self._pool = WorkerPool(spec, config.workers)
        try:
            self._pool.start()
        except StartError as error:
            raise ValueError(str(error)) from None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        requests = [(_plain(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
        replies = self._pool.map(requests)
        return [self._part(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]

    def close(self) -> None:
        self._pool.close()

    def _part(self, prompt: Prompt, reply: Reply | Lost) -> Part:
        if isinstance(reply, Lost):
            note = f"the reward function {self._name} did not score prompt '{shortened(prompt.id)}': {reply.reason}"
            return Part(0.0, reply.verdict, note)
        value, problem = reply
        return Part(0.0, "error", problem) if value is None else Part(value)


def _plain(prompt: Prompt) -> dict[str, Any]:
    """The prompt's fields as JSON holds them."""
    plain = {field.name: getattr(prompt, field.name) for field in fields(prompt)}
    if not isinstance(prompt.content, str):
        plain["content"] = [dict(turn) for turn in prompt.content]
    return plain
