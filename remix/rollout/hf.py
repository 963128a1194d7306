"""Rollouts by transformers' `generate` on the trainer's own module: no second copy of the weights, no sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from remix.models.adapters import generation_inputs, has_virtual_tokens
from remix.models.vision import Vision
from remix.rollout.hf_cache import fill, roomy_cache
from remix.types import Completion, Request, Sampling

ROUND = 32
"""Tokens after which responses that have ended are taken out of a batch."""


class SeededSampler(LogitsProcessor):  # type: ignore[misc]
    """Draws each sequence's next token from that sequence's own random numbers.

    `generate` has one random stream for a whole batch, so a response would depend on its neighbours. Here token t of
    a request is the inverse of the cumulative distribution at the t-th uniform number of its own seed; the choice is
    handed back as the only finite score, for greedy search to pick up. Log-probs of the choices are kept.
    """

    def __init__(
        self, seeds: Sequence[int], sampling: Sampling, device: torch.device, never: Sequence[int] = ()
    ) -> None:
        """`never`: tokens without a probability."""
        self.sampling = sampling
        self.never = list(never)
        draws = [np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_tokens) for seed in seeds]
        self.uniforms_BR = torch.from_numpy(np.stack(draws)).to(device)
        self.logprobs: list[Tensor] = []

    def go_on_with(self, rows: Tensor, used: int) -> None:
        """Of the sequences these alone, which have had `used` more tokens."""
        self.uniforms_BR = self.uniforms_BR[rows, used:]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logprobs)
        scores[:, self.never] = -torch.inf
        # Greedy log-probs are those at temperature 1: at 0 they would all be 0.
        logprobs_BV = (scores.float() / (self.sampling.temperature or 1.0)).log_softmax(-1)
        if self.sampling.temperature == 0:
            chosen_B = logprobs_BV.argmax(-1)
        else:
            # In float64: over a large vocabulary a float32 sum is off by more than the rarest tokens weigh.
            cumulative_BV = self._truncated(logprobs_BV).double().exp_().cumsum(-1)
            threshold_B1 = self.uniforms_BR[:, step, None] * cumulative_BV[:, -1:]
            chosen_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(-1)
            chosen_B = chosen_B.clamp(max=scores.shape[-1] - 1)
        self.logprobs.append(logprobs_BV.gather(-1, chosen_B[:, None]).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen_B[:, None], 0.0)

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

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        completions: dict[int, Completion] = {}
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        training = self.lm.training
        self.lm.eval()
        try:
            for start in range(0, len(by_length), self.batch_size):
                indices = by_length[start : start + self.batch_size]
                batch = self._generate([requests[i] for i in indices], sampling)
                completions.update(zip(indices, batch, strict=True))
        finally:
            self.lm.train(training)
        return [completions[i] for i in range(len(requests))]

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to do: the module is the trainer's own."""

    def close(self) -> None:
        """Nothing to give back."""

    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        width = max(len(request.prompt_ids) for request in requests)
        ids = torch.full((len(requests), width), self.pad_id)
        mask = torch.zeros(len(requests), width, dtype=torch.long)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        sampler = SeededSampler([request.seed for request in requests], sampling, self.device, self.never)
        ids, mask = ids.to(self.device), mask.to(self.device)
        with self.autocast():
            cache = None if self.vision is not None or has_virtual_tokens(self.lm) else roomy_cache(self.lm.config)
            if cache is None:
                return self._in_one_go(requests, ids, mask, sampler, sampling.max_tokens)
            base = self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm
            fill(getattr(base, base.base_model_prefix), cache, ids, mask)
            return self._in_rounds(ids, mask, cache, sampler, sampling.max_tokens)

    def _in_one_go(
        self, requests: Sequence[Request], ids: Tensor, mask: Tensor, sampler: SeededSampler, max_tokens: int
    ) -> list[Completion]:
        prompts = [(request.prompt_ids, request.images) for request in requests]
        seen = {} if self.vision is None else self.vision.inputs(prompts, ids.shape[1], on_the_left=True)
        lm, inputs, old = generation_inputs(self.lm, ids, mask)
        inputs |= {name: tensor.to(self.device) for name, tensor in seen.items()}
        answer = self._call(lm, inputs, sampler, max_tokens)
        tokens_BR, logprobs_BR = answer[:, old:].cpu(), torch.stack(sampler.logprobs, -1).cpu()
        return [self._completion(*row) for row in zip(tokens_BR, logprobs_BR, strict=True)]

    def _in_rounds(
        self, ids: Tensor, mask: Tensor, cache: Any, sampler: SeededSampler, max_tokens: int
    ) -> list[Completion]:
        """A few tokens at a time; responses that have ended are not computed further."""
        done: dict[int, Completion] = {}
        rows, width, left = torch.arange(len(ids), device=self.device), ids.shape[1], max_tokens
        logprobs = torch.empty(len(ids), 0, device=self.device)
        while left:
            asked, sampler.logprobs = min(left, ROUND), []
            inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
            ids = self._call(self.lm, inputs, sampler, asked)
            logprobs = torch.cat([logprobs, torch.stack(sampler.logprobs, -1)], -1)
            new = len(sampler.logprobs)
            left -= new
            ended = torch.isin(ids[:, -new:], torch.tensor(sorted(self.eos_ids), device=self.device)).any(-1)
            if not left:
                ended[:] = True
            for at in ended.nonzero()[:, 0].tolist():
                done[int(rows[at])] = self._completion(ids[at, width:].cpu(), logprobs[at].cpu())
            kept = (~ended).nonzero()[:, 0]
            if not len(kept):
                break
            rows, ids, logprobs = rows[kept], ids[kept], logprobs[kept]
            mask = torch.cat([mask[kept], mask.new_ones(len(kept), new)], -1)
            sampler.go_on_with(kept, new)
            if len(kept) < len(ended):
                cache.batch_select_indices(kept)
        return [done[row] for row in range(len(done))]

    def _call(self, lm: Any, inputs: dict[str, Any], sampler: SeededSampler, max_tokens: int) -> Tensor:
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.pad_id,
            eos_token_id=sorted(self.eos_ids),
        )
        answer: Tensor = lm.generate(
            **inputs, generation_config=config, logits_processor=LogitsProcessorList([sampler])
        )
        return answer

    def _completion(self, tokens_R: Tensor, logprobs_R: Tensor) -> Completion:
        ends = [i for i, token in enumerate(tokens_R.tolist()) if token in self.eos_ids]
        length = ends[0] + 1 if ends else len(tokens_R)
        return Completion(tokens_R[:length].clone(), logprobs_R[:length].clone(), "stop" if ends else "length")
