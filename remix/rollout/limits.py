"""What every engine with a fixed context refuses."""

from __future__ import annotations

from collections.abc import Sequence

from remix.types import Request, Sampling


def check_fits(requests: Sequence[Request], sampling: Sampling, max_model_len: int) -> None:
    """Raises ValueError where a prompt and its response may have more tokens together than the engine holds."""
    longest = max((len(request.prompt_ids) for request in requests), default=0)
    if longest > max_model_len - sampling.max_tokens:
        raise ValueError(
            f"A prompt has {longest} tokens, and {sampling.max_tokens} are to follow, but the engine holds "
            f"{max_model_len} in all. Raise prompt.max_tokens or rollout.max_tokens, "
            f"which set it, to {longest + sampling.max_tokens} together, or leave long prompts out."
        )
