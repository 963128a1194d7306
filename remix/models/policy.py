"""The policy in training and the policies that anchor it.

An anchor is a snapshot of the trained parameters: all of them under full fine-tuning, the adapter's alone under an
adapter. The first one is the policy as the run begins: the base model under a fresh LoRA (B = 0), (IA)³ or `layers`,
not so under virtual tokens, nor where the run goes on from a saved adapter. Log-probs under an anchor are one
functional call of the one module, so no second model is ever built, whatever kind of adapter is in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from remix.models.actor_critic import ActorCritic, AnchorStates, PolicyOutput
from remix.models.packing import Packed, families, pack, packed_microbatches
from remix.models.vision import Vision
from remix.types import Batch, Rollout

Snapshot = dict[str, Tensor]
"""Trained policy parameters by their name in ActorCritic, detached, never written to."""


class TokenScores(NamedTuple):
    """What the policy says of one response."""

    logprobs: Tensor
    """[R] float32."""
    values: Tensor | None
    """[R] float32."""


class Policy:
    """The trained module, unwrapped, with its tokenizer and its anchors."""

    def __init__(
        self,
        module: ActorCritic,
        tokenizer: Any,
        *,
        device: torch.device,
        temperature: float,
        vision: Vision | None = None,
    ) -> None:
        """`vision`: what a vision-language model reads images by."""
        self.module = module
        self.tokenizer = tokenizer
        self.vision = vision
        self.device = device
        self.temperature = temperature
        """Of sampling; the trainer's logits are divided by it too, or its log-probs would be another policy's."""
        self.reference: Snapshot | None = None
        self.precedent: Snapshot | None = None
        self._at_step_start: Snapshot | None = None
        self.packs = False
        """Whether sequences are packed in one row; see `remix.models.packing`."""

    @property
    def reader(self) -> Any:
        """What makes the model's inputs of text and images; whoever is given the model needs it too."""
        return self.tokenizer if self.vision is None else self.vision.processor

    # --- anchors ---

    def snapshot(self) -> Snapshot:
        """A copy of the trained policy parameters in main memory."""
        return {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and name.startswith("lm.")
        }

    def begin_step(self, *, keep_precedent: bool) -> None:
        """Shifts the precedent: what was the policy as the last step began is now π_{k-1}."""
        if keep_precedent:
            now = self.snapshot()
            self.precedent, self._at_step_start = self._at_step_start or now, now

    @property
    def next_precedent(self) -> Snapshot | None:
        """What `begin_step` will make the precedent; part of a checkpoint."""
        return self._at_step_start

    @next_precedent.setter
    def next_precedent(self, snapshot: Snapshot | None) -> None:
        self._at_step_start = snapshot

    def load(self, snapshot: Snapshot) -> None:
        """The policy becomes what it was when the snapshot was taken."""
        own = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, tensor in snapshot.items():
                own[name].copy_(tensor)

    # --- checkpoints ---

    def weights(self, *, with_base: bool) -> dict[str, Tensor]:
        """All trained parameters, the critic's included; with the frozen ones too where they were changed."""
        return {
            name: parameter.detach()
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad or with_base
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raises ValueError where names or shapes are not those of this module."""
        own = dict(self.module.named_parameters())
        trained = {name for name, parameter in own.items() if parameter.requires_grad}
        odd = sorted(trained - weights.keys()) or sorted(weights.keys() - own.keys())
        odd = odd or [name for name, tensor in weights.items() if tensor.shape != own[name].shape]
        if odd:
            raise ValueError(
                f"the checkpoint does not fit the recipe's model: {odd[0]} and {len(odd) - 1} more are missing, "
                "unknown or of another shape; resume with the recipe that the run was started with"
            )
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)

    # --- what the policy says ---

    @torch.no_grad()
    def score(
        self,
        rollouts: Sequence[Rollout],
        *,
        tokens_per_microbatch: int,
        anchor: Snapshot | None = None,
        with_values: bool = False,
    ) -> list[TokenScores]:
        """Log-probs of each response under the policy or an anchor, and the critic's values, in order."""
        self.module.eval()
        scores: list[TokenScores | None] = [None] * len(rollouts)
        weights = self._on_device(anchor)
        for indices in self.microbatches(rollouts, tokens_per_microbatch):
            chosen = [rollouts[i] for i in indices]
            inputs = tuple(tensor.to(self.device) for tensor in token_tensors(chosen))
            arguments = (*inputs, self.temperature, (), with_values, self.multimodal(chosen), self.packed(chosen))
            output: PolicyOutput = (
                functional_call(self.module, weights, arguments) if weights else self.module(*arguments)
            )
            for row, index in enumerate(indices):
                start = len(rollouts[index].prompt_ids) - 1
                span = slice(start, start + len(rollouts[index].response_ids))
                # Copies, not views: what is kept or sent of one response must not hold its whole micro-batch.
                values = None if output.values is None else output.values[row, span].to("cpu", copy=True)
                scores[index] = TokenScores(output.logprobs[row, span].to("cpu", copy=True), values)
        return [score for score in scores if score is not None]

    @torch.no_grad()
    def anchor_states(self, batch: Batch, anchor: Snapshot) -> AnchorStates:
        """Hidden states and head of an anchor on a micro-batch, for the exact KL."""
        inputs = (batch.input_ids, batch.response_mask, batch.multimodal, batch.packed)
        training = self.module.training
        self.module.eval()  # dropout would make the anchor another policy
        states: AnchorStates = functional_call(_States(self.module), self._on_device(anchor, "module."), inputs)
        self.module.train(training)
        return states

    # --- its inputs ---

    def microbatches(self, rollouts: Sequence[Rollout], max_tokens: int) -> list[list[int]]:
        """Indices of what one forward takes: at most `max_tokens` tokens, padding included where there is some."""
        if self.packs:
            return list(packed_microbatches(rollouts, max_tokens))
        return list(microbatches([len(r.prompt_ids) + len(r.response_ids) for r in rollouts], max_tokens))

    def packed(self, rollouts: Sequence[Rollout]) -> Packed | None:
        return pack(rollouts).to(self.device) if self.packs else None

    def multimodal(self, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        """The further inputs of the model's forward on these sequences, packed or padded as the policy has them."""
        if self.vision is None:
            return {}
        shown = [rollouts[family[0]] for family in families(rollouts)] if self.packs else rollouts
        prompts = [(rollout.prompt_ids.tolist(), rollout.images) for rollout in shown]
        width = max(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in shown)
        return {name: tensor.to(self.device) for name, tensor in self.vision.inputs(prompts, width).items()}

    def _on_device(self, anchor: Snapshot | None, prefix: str = "") -> Snapshot:
        return {prefix + name: tensor.to(self.device) for name, tensor in (anchor or {}).items()}


class _States(torch.nn.Module):
    """`ActorCritic.states` as a forward, which is all that functional_call calls."""

    def __init__(self, module: ActorCritic) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> AnchorStates:
        return self.module.states(*inputs)


def microbatches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in groups whose padded size, count x longest, stays within `max_tokens`; longest first.

    A sequence longer than the budget comes alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def token_tensors(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """input_ids [B, S] and response_mask [B, S - 1], right-padded with token 0."""
    lengths = [(len(r.prompt_ids), len(r.response_ids)) for r in rollouts]
    width = max(prompt + response for prompt, response in lengths)
    ids_BS = torch.zeros(len(rollouts), width, dtype=torch.long)
    response_BT = torch.zeros(len(rollouts), width - 1, dtype=torch.bool)
    for row, (rollout, (prompt, response)) in enumerate(zip(rollouts, lengths, strict=True)):
        ids_BS[row, : prompt + response] = torch.cat([rollout.prompt_ids, rollout.response_ids])
        response_BT[row, prompt - 1 : prompt - 1 + response] = True
    return ids_BS, response_BT
