"""Rollouts by transformers on the trainer's own module: no second copy of the weights, no sync."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from remix.models.adapters import generation_inputs, has_virtual_tokens
from remix.models.vision import Vision
from remix.rollout.hf_cache import keeps_keys_and_values
from remix.rollout.hf_decode import decode, padded_on_the_left
from remix.types import Completion, Request, Sampling

TRIED = 4
"""Tokens by which it is seen whether a model can do without `generate`."""
TOLERANCE = {False: 1e-3, True: 0.1}
"""Most that a log-prob may differ then, in nats, by whether it is computed in less than float32."""


class SeededSampler(LogitsProcessor):  # type: ignore[misc]
    """Draws each sequence's next token from that sequence's own random numbers.

    `generate` has one random stream for a whole batch, so a response would depend on its neighbours. Here token t of
    a request is the inverse of the cumulative distribution at the t-th uniform number of its own seed. Called by
    `generate` it hands the choice back as the only finite score, for greedy search to pick up, and keeps the log-prob.
    """

    def __init__(
        self, seeds: Sequence[int], sampling: Sampling, device: torch.device, never: Sequence[int] = ()
    ) -> None:
        """`never`: tokens without a probability."""
        self.sampling = sampling
        self.never = list(never)
        # One more, for a response that has all its tokens and is still in a batch.
        draws = [np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_tokens + 1) for seed in seeds]
        self.uniforms_BR = torch.from_numpy(np.stack(draws)).to(device)
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen_B, logprobs_B = self.draw(scores, slice(None), len(self.logprobs))
        self.logprobs.append(logprobs_B)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen_B[:, None], 0.0)

    def draw(self, logits_BV: Tensor, rows: Tensor | slice, length: Tensor | int) -> tuple[Tensor, Tensor]:
        """The next token and its log-prob of the sequences in these rows, which have so many tokens."""
        if self.never:
            logits_BV[:, self.never] = -torch.inf
        # Greedy log-probs are those at temperature 1: at 0 they would all be 0.
        logprobs_BV = (logits_BV.float() / (self.sampling.temperature or 1.0)).log_softmax(-1)
        if self.sampling.temperature == 0:
            chosen_B = logprobs_BV.argmax(-1)
        else:
            # In float64: over a large vocabulary a float32 sum is off by more than the rarest tokens weigh.
            cumulative_BV = self._truncated(logprobs_BV).double().exp_().cumsum(-1)
            threshold_B1 = self.uniforms_BR[rows, length, None] * cumulative_BV[:, -1:]
            chosen_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(-1)
            chosen_B = chosen_B.clamp(max=logits_BV.shape[-1] - 1)
        return chosen_B, logprobs_BV.gather(-1, chosen_B[:, None]).squeeze(-1)

    def _truncated(self, logprobs_BV: Tensor) -> Tensor:
        """-inf outside top-k and the nucleus."""
        top_k, top_p = self.sampling.top_k, self.sampling.top_p
        if not top_k and top_p == 1.0:
            return logprobs_BV
        ordered_BV, order_BV = logprobs_BV.sort(-1, descending=True)
        before_BV = ordered_BV.exp().cumsum(-1) - ordered_BV.exp()
        outside_BV = before_BV >= top_p
        if top_k:
            outside_BV[:, top_k:] = True
        return torch.full_like(logprobs_BV, -torch.inf).scatter(
            -1, order_BV, ordered_BV.masked_fill(outside_BV, -torch.inf)
        )


class HFEngine:
    """`Engine` over a transformers model, adapter included. `autocast` is the trainer's, so that both agree."""

    def __init__(
        self,
        lm: Any,
        *,
        eos_token_ids: Sequence[int],
        batch_size: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        never: Sequence[int] = (),
        vision: Vision | None = None,
    ) -> None:
        """`never`: tokens that are not drawn; `vision`: what a vision-language model reads images by."""
        self.lm = lm
        self.never, self.vision = never, vision
        self.batch_size = batch_size
        self.device = device
        self.autocast = autocast
        self.eos_ids = frozenset(eos_token_ids)
        self.pad_id: int = lm.generation_config.pad_token_id
        self._base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        self._tried: dict[bool, bool] = {}
        """By whether there were images."""

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        if not requests:
            return []
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        by_length = [requests[i] for i in order]
        training = self.lm.training
        self.lm.eval()
        try:
            with self.autocast():
                completions = self._completions(by_length, sampling)
        finally:
            self.lm.train(training)
        return [completions[place] for place in np.argsort(order)]

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to do: the module is the trainer's own."""

    def close(self) -> None:
        """Nothing to give back."""

    def _completions(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        longest = max(len(request.prompt_ids) for request in requests) + sampling.max_tokens
        if self._decodes(requests, longest):
            batches = [self._decoded(requests, sampling)]
        else:
            parts = [requests[at : at + self.batch_size] for at in range(0, len(requests), self.batch_size)]
            batches = [self._generated(part, sampling) for part in parts]
        rows = (zip(tokens_BR.cpu(), logprobs_BR.cpu(), strict=True) for tokens_BR, logprobs_BR in batches)
        return [self._completion(*row) for row in chain.from_iterable(rows)]

    def _decoded(self, requests: Sequence[Request], sampling: Sampling) -> tuple[Tensor, Tensor]:
        sampler = SeededSampler([request.seed for request in requests], sampling, self.device, self.never)
        ends = torch.tensor(sorted(self.eos_ids), dtype=torch.long, device=self.device)
        return decode(
            self._base,
            requests,
            sampler.draw,
            batch_size=self.batch_size,
            max_tokens=sampling.max_tokens,
            ends=ends,
            pad=self.pad_id,
            further=self._seen,
        )

    def _generated(self, requests: Sequence[Request], sampling: Sampling) -> tuple[Tensor, Tensor]:
        """By transformers' own loop, which takes every model."""
        ids, mask = padded_on_the_left([request.prompt_ids for request in requests], self.pad_id)
        sampler = SeededSampler([request.seed for request in requests], sampling, self.device, self.never)
        lm, inputs, old = generation_inputs(self.lm, ids.to(self.device), mask.to(self.device))
        inputs |= {name: tensor.to(self.device) for name, tensor in self._seen(requests, ids.shape[1]).items()}
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.pad_id,
            eos_token_id=sorted(self.eos_ids),
        )
        answer = lm.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([sampler]))
        return answer[:, old:], torch.stack(sampler.logprobs, -1)

    def _seen(self, requests: Sequence[Request], width: int, *, on_the_left: bool = True) -> dict[str, Tensor]:
        """What a vision-language model is given beside the tokens."""
        prompts = [(request.prompt_ids, request.images) for request in requests]
        return {} if self.vision is None else self.vision.inputs(prompts, width, on_the_left=on_the_left)

    def _decodes(self, requests: Sequence[Request], longest: int) -> bool:
        """Whether the model has, by `decode`, the log-probs of its plain forward: tried on some of what is asked first,
        with images and without."""
        if has_virtual_tokens(self.lm) or not keeps_keys_and_values(self._base, longest):
            return False
        pictured = any(request.images for request in requests)
        if pictured not in self._tried:
            rounds = torch.is_autocast_enabled(self.device.type) or self._base.dtype != torch.float32
            self._tried[pictured] = self._off_by(requests) <= TOLERANCE[rounds]
        return self._tried[pictured]

    def _off_by(self, requests: Sequence[Request]) -> float:
        """The most that log-probs differ, in nats."""
        by_length = sorted(requests, key=lambda request: (bool(request.images), len(request.prompt_ids)))
        tried = [by_length[0], by_length[-1], replace(by_length[-1], seed=by_length[-1].seed + 1)]
        try:
            tokens_BR, logprobs_BR = self._decoded(tried, Sampling(TRIED))
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
            return math.inf  # whatever a family makes of inputs that it was not made for
        worst = 0.0
        for request, tokens_R, logprobs_R in zip(tried, tokens_BR, logprobs_BR, strict=True):
            found = self._completion(tokens_R, logprobs_R)
            ids_1S = torch.cat([torch.tensor(request.prompt_ids, device=self.device), found.response_ids])[None]
            seen = self._seen([request], ids_1S.shape[1], on_the_left=False)
            seen = {name: tensor.to(self.device) for name, tensor in seen.items()}
            logits_RV = self._base(input_ids=ids_1S, use_cache=True, **seen).logits[0, len(request.prompt_ids) - 1 : -1]
            logits_RV[:, list(self.never)] = -torch.inf
            plain_R = logits_RV.float().log_softmax(-1).gather(-1, found.response_ids[:, None])[:, 0]
            worst = max(worst, (plain_R - found.sampler_logprobs).abs().max().item())
        return worst

    def _completion(self, tokens_R: Tensor, logprobs_R: Tensor) -> Completion:
        ends = [i for i, token in enumerate(tokens_R.tolist()) if token in self.eos_ids]
        length = ends[0] + 1 if ends else len(tokens_R)
        return Completion(tokens_R[:length].clone(), logprobs_R[:length].clone(), "stop" if ends else "length")
