"""Reward functions that fail on some responses, by what the response says."""

from __future__ import annotations

import os
import signal
import time

from remix.types import Prompt


def length(prompt: Prompt, response: str) -> float:
    """Varies, so that groups have gradients."""
    return len(response) / 24


def _is_unlucky(prompt: Prompt) -> bool:
    """One prompt in four or so, the same in every run."""
    return sum(map(ord, prompt.id)) % 4 == 0


def hangs(prompt: Prompt, response: str) -> float:
    if _is_unlucky(prompt) and len(response) % 2:
        time.sleep(3600)
    return length(prompt, response)


def dies(prompt: Prompt, response: str) -> float:
    if _is_unlucky(prompt) and len(response) % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return length(prompt, response)


def raises(prompt: Prompt, response: str) -> float:
    if _is_unlucky(prompt):
        raise KeyError("no such answer")
    return length(prompt, response)


def nan(prompt: Prompt, response: str) -> float:
    return float("nan") if _is_unlucky(prompt) else length(prompt, response)


def always_raises(prompt: Prompt, response: str) -> float:
    raise RuntimeError("the judge is down \x1b[31m")
