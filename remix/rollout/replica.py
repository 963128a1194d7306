"""One vLLM server as a run sees it: what it serves, its weights' version, and responses, over HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
import torch

from remix.rollout.serve import ABOUT, KEY, NEVER
from remix.types import Completion, FinishReason, Request, Sampling

CONNECT_SECONDS = 10.0
"""For a connection, and for answers that need no computing."""
FIRST_PAUSE = 0.25
"""Seconds before a request is sent again; each further pause is twice as long."""
_NO_LOGPROB = -9999.0
"""What vLLM's server says where a log-prob is no number, or minus infinity."""
_REFUSED = re.compile(r"Weight sync: .*?(?=', please check the stack trace|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run needs of a server."""

    model: str
    config: Mapping[str, Any]
    """See `remix.rollout.serve.served`."""
    tokenizer: str
    dtype: str
    max_model_len: int


class DownError(Exception):
    """The server is gone, hangs or breaks; the message says how."""


class WrongKeyError(DownError):
    """It wants another key."""


class StrangerError(DownError):
    """It is no server of `remix.rollout.serve`."""


class Replica:
    """The address of a server, asked through a client that belongs to the event loop of the moment."""

    def __init__(self, url: str, *, timeout: float, retries: int) -> None:
        """timeout: seconds that what the server computes may take. retries: of a request that fails."""
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._retries = retries

    async def about(self, http: httpx.AsyncClient) -> dict[str, Any]:
        """See `remix.rollout.serve.ABOUT`. Raises DownError."""
        answer: dict[str, Any] = await self._ask(http, "GET", ABOUT, seconds=CONNECT_SECONDS)
        if "config" not in answer:
            raise StrangerError("answers something else")
        return answer

    async def version(self, http: httpx.AsyncClient, *, patient: bool = True) -> str:
        """Of the weights that it holds."""
        retries = self._retries if patient else 0
        answer = await self._ask(http, "GET", "/weight_info", seconds=CONNECT_SECONDS, retries=retries)
        return str(answer["weight_version"])

    async def load(self, http: httpx.AsyncClient, paths: Sequence[str], version: str) -> None:
        """Takes the weights out of these files. Whatever it is at is dropped. Raises ValueError where they are not
        those of its model, and it keeps what it had."""
        await self._ask(http, "POST", "/pause?mode=abort")
        try:
            await self._ask(http, "POST", "/start_weight_update")
            await self._ask(http, "POST", "/update_weights", {"update_info": {"paths": list(paths)}})
            await self._ask(http, "POST", "/finish_weight_update", {"weight_version": version})
            # Cached blocks were computed from other weights.
            if not (await self._ask(http, "POST", "/reset_prefix_cache"))["success"]:
                raise DownError("keeps a cache of other weights")
        finally:
            await self._ask(http, "POST", "/resume")
        found = await self.version(http)
        if found != version:
            raise DownError(f"holds weights {found} after a sync of {version}: does another run use it too?")

    async def respond(
        self,
        http: httpx.AsyncClient,
        request: Request,
        sampling: Sampling,
        *,
        version: str,
        eos_token_ids: Sequence[int],
        never: Sequence[int],
    ) -> Completion:
        """Raises DownError also where other weights than `version` had a part in it."""
        params = {
            "seed": request.seed % 2**63,  # vLLM takes -1 to mean no seed
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "ignore_eos": True,
            "stop_token_ids": list(eos_token_ids),
            "logprobs": 0,  # the sampled token's only
            "detokenize": False,
            "logit_bias": dict.fromkeys(map(str, never), NEVER) or None,
        }
        body = {"token_ids": list(request.prompt_ids), "sampling_params": params}
        answer = await self._ask(http, "POST", "/inference/v1/generate", body)
        (choice,) = answer["choices"]
        found = [span["version"] for span in choice["weight_versions"] or ()]
        if found != [version]:
            raise DownError(f"sampled from weights {', '.join(found)}, not {version}: does another run use it too?")
        return _completion(choice)

    async def _ask(
        self,
        http: httpx.AsyncClient,
        method: str,
        path: str,
        body: Any = None,
        *,
        seconds: float | None = None,
        retries: int | None = None,
    ) -> Any:
        """The answer to a request that may be made twice. Raises DownError."""
        seconds, retries = seconds or self._timeout, self._retries if retries is None else retries
        limits = httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None)
        for attempt in range(retries + 1):
            if attempt:
                await anyio.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                response = await http.request(method, self.url + path, json=body, timeout=limits)
            except httpx.ReadTimeout:
                raise DownError(f"did not answer within {seconds:g} s") from None
            except (httpx.TransportError, httpx.InvalidURL) as error:
                how = f"does not answer ({str(error) or type(error).__name__})"
                continue
            if response.status_code == 200:
                return _plain(response)
            said = _message(response)
            how = f"answers {response.status_code} ({said})"
            if response.status_code in _FOR_GOOD:
                raise _FOR_GOOD[response.status_code](how)
            refused = _REFUSED.search(said)
            if refused:
                raise ValueError(refused[0])
        raise DownError(how)


_FOR_GOOD = {401: WrongKeyError, 404: StrangerError, 405: StrangerError}


def _plain(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {}


def _message(response: httpx.Response) -> str:
    plain = _plain(response)
    error = plain.get("error") if isinstance(plain, dict) else None
    return str(error.get("message") if isinstance(error, dict) else error or response.reason_phrase)


def _completion(choice: dict[str, Any]) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise DownError(f"ended a response with {choice['finish_reason']!r}: does another run use it too?")
    reason: FinishReason = choice["finish_reason"]
    logprobs = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]], dtype=torch.float32)
    return Completion(
        response_ids=torch.tensor(choice["token_ids"], dtype=torch.int64),
        sampler_logprobs=logprobs.masked_fill(logprobs == _NO_LOGPROB, float("nan")),
        finish_reason=reason,
    )


def problem(url: str, about: dict[str, Any] | DownError, wanted: Wanted) -> str | None:
    """What is wrong with a server, with the remedy."""
    port = re.search(r":(\d+)/*$", url)
    start = f"python -m remix.rollout.serve {wanted.model} --port {port[1] if port else 'PORT'} --dtype {wanted.dtype}"
    if isinstance(about, WrongKeyError):
        return f"has another key: set {KEY} to the one that the server was started with"
    if isinstance(about, StrangerError):
        return f"is no server of remix.rollout.serve ({about}): start one there with `{start}`, or take it out"
    if isinstance(about, DownError):
        return f"{about}: start a server there with `{start}`, or take it out"
    theirs, ours = about["config"], wanted.config
    odd = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if odd:
        return (
            f"serves another model: {odd[0]} is {theirs.get(odd[0])!r}, of {wanted.model} it is "
            f"{ours.get(odd[0])!r}. Start it with `{start}`"
        )
    if about["tokenizer"] != wanted.tokenizer:
        return f"serves a model with another tokenizer than {wanted.model} has: start it with `{start}`"
    if about["dtype"] != wanted.dtype:
        return f"computes in {about['dtype']}, model.dtype is {wanted.dtype}: start it with `{start}`"
    if about["max_model_len"] < wanted.max_model_len:
        return (
            f"holds {about['max_model_len']} tokens of a prompt and its response, the run may need "
            f"{wanted.max_model_len}: start it with --max-model-len {wanted.max_model_len} or more"
        )
    return None
