"""The module in training: a language model and, under PPO, a critic, behind one forward.

One forward, since a wrapper for several processes must see every use of a trained parameter. No attention mask:
sequences are padded on the right, where a causal model cannot see it, and attention without a mask is faster.
Shapes: B sequences, S tokens, T = S - 1 predictions, N trained tokens of the micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from remix.algorithms import entropy as entropy_of
from remix.algorithms import kl_full
from remix.models.adapters import backbone_inputs, output_head

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class AnchorStates(NamedTuple):
    """What an anchor policy says of a micro-batch, short of the logits, for the exact KL over the vocabulary."""

    hidden: Tensor
    """[N, H]."""
    head: Tensor
    """[V, H]."""


class PolicyOutput(NamedTuple):
    """Zero wherever the response mask is False."""

    logprobs: Tensor
    """[B, T] float32, of the tokens that follow, at the sampling temperature."""
    entropy: Tensor
    """[B, T] float32 nats."""
    values: Tensor | None
    """[B, T] float32, the critic's value of the state before each token."""
    divergences: tuple[Tensor, ...]
    """[B, T] float32 nats, exact KL to each anchor that was given."""


class ActorCritic(nn.Module):
    """`lm` is a transformers model, with or without a PEFT adapter in it."""

    def __init__(
        self,
        lm: Any,
        *,
        value_head: nn.Linear | None = None,
        critic: nn.Module | None = None,
        detach_value: bool = False,
        logits_chunk: int = 2048,
        autocast: torch.dtype | None = None,
        never: Sequence[int] = (),
    ) -> None:
        """`critic` is a backbone of its own for the value head; without it the head sits on the policy's.

        `never`: tokens that the policy has no probability for, such as those that hold an image's place.
        """
        super().__init__()
        self.lm = lm
        self.value_head = value_head
        self.critic = critic
        self.detach_value = detach_value
        self.logits_chunk = logits_chunk
        self.autocast_dtype = autocast
        self.never = tuple(never)

    def forward(
        self,
        input_ids_BS: Tensor,
        response_mask_BT: Tensor,
        temperature: float,
        anchors: tuple[AnchorStates, ...] = (),
        with_values: bool = True,
        multimodal: Mapping[str, Tensor] = _NOTHING,
    ) -> PolicyOutput:
        """`multimodal`: further inputs of the model and the critic, by argument."""
        with self.autocast(input_ids_BS.device):
            hidden_NH, labels_N = self._select(input_ids_BS, response_mask_BT, multimodal)
            stats = self._token_stats(hidden_NH, labels_N, temperature, anchors)
            values_N = None
            if with_values and self.value_head is not None:
                values_N = self._values(hidden_NH, input_ids_BS, response_mask_BT, multimodal)

        def scatter(per_token_N: Tensor) -> Tensor:
            full = per_token_N.new_zeros(response_mask_BT.shape, dtype=torch.float32)
            return full.masked_scatter(response_mask_BT, per_token_N.float())

        logprobs, entropy, *divergences = (scatter(stat) for stat in stats)
        return PolicyOutput(logprobs, entropy, None if values_N is None else scatter(values_N), tuple(divergences))

    def states(
        self, input_ids_BS: Tensor, response_mask_BT: Tensor, multimodal: Mapping[str, Tensor] = _NOTHING
    ) -> AnchorStates:
        """Hidden states and head of this policy, when it serves as an anchor."""
        with self.autocast(input_ids_BS.device):
            hidden_NH, _ = self._select(input_ids_BS, response_mask_BT, multimodal)
        return AnchorStates(hidden_NH, self._head().weight)

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the blocks that FSDP gathers one after the other."""
        return sorted(self._base()._no_split_modules or ())

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a response; a model may have several."""
        eos = self.lm.generation_config.eos_token_id
        return tuple(eos) if isinstance(eos, list | tuple) else (eos,)

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def _base(self) -> Any:
        """The transformers model itself, an adapter's layers inside it."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def _head(self) -> nn.Linear:
        return output_head(self._base().get_output_embeddings())

    def _select(self, input_ids_BS: Tensor, mask_BT: Tensor, multimodal: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Final hidden states [N, H] and the tokens [N] that follow them, at the masked positions only."""
        base = self._base()
        backbone = getattr(base, base.base_model_prefix)
        inputs, ahead = backbone_inputs(self.lm, input_ids_BS)
        hidden_BSH = backbone(**inputs, use_cache=False, **multimodal)[0][:, ahead:]
        return hidden_BSH[:, :-1][mask_BT], input_ids_BS[:, 1:][mask_BT]

    def _values(
        self, hidden_NH: Tensor, input_ids_BS: Tensor, mask_BT: Tensor, multimodal: Mapping[str, Tensor]
    ) -> Tensor:
        assert self.value_head is not None
        if self.critic is not None:
            hidden_BSH = self.critic(input_ids=input_ids_BS, use_cache=False, **multimodal)[0]
            hidden_NH = hidden_BSH[:, :-1][mask_BT]
        elif self.detach_value:
            hidden_NH = hidden_NH.detach()
        with torch.autocast(hidden_NH.device.type, enabled=False):  # bfloat16 would round values to 3 digits
            return self.value_head(hidden_NH.float()).squeeze(-1)  # type: ignore[no-any-return]

    def _token_stats(
        self, hidden_NH: Tensor, labels_N: Tensor, temperature: float, anchors: tuple[AnchorStates, ...]
    ) -> list[Tensor]:
        """[N] log-prob, entropy, and KL to each anchor. Logits exist for one chunk of tokens at a time."""
        head, softcap = self._head(), getattr(self._base().config.get_text_config(), "final_logit_softcapping", None)

        def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            logits = nn.functional.linear(hidden, weight, bias).float()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if self.never:
                logits = logits.index_fill(-1, torch.tensor(self.never, device=logits.device), -torch.inf)
            return logits / temperature

        def of_chunk(hidden: Tensor, labels: Tensor, *anchor_hidden: Tensor) -> tuple[Tensor, ...]:
            logits = logits_of(hidden, head.weight, head.bias)
            logprobs = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
            divergences = (
                kl_full(logits, logits_of(states, anchor.head, head.bias))
                for states, anchor in zip(anchor_hidden, anchors, strict=True)
            )
            return logprobs, entropy_of(logits), *divergences

        if hidden_NH.shape[0] <= self.logits_chunk:
            return list(of_chunk(hidden_NH, labels_N, *(anchor.hidden for anchor in anchors)))
        chunks = zip(
            *(tensor.split(self.logits_chunk) for tensor in (hidden_NH, labels_N, *(a.hidden for a in anchors))),
            strict=True,
        )
        parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        return [torch.cat(part) for part in zip(*parts, strict=True)]
