"""The module in training: a language model and, under PPO, a critic, behind one forward.

One forward, since a wrapper for several processes must see every use of a trained parameter. Sequences come packed in
one row (`remix.models.packing`) or, where a model cannot have that, padded on the right, which a causal model does not
see, so that no attention mask is needed.
Shapes: B sequences, S tokens, T = S - 1 predictions, N trained tokens of the micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from remix.algorithms import Head, LogitRule, TokenStatistics, token_statistics
from remix.models.adapters import backbone_inputs, output_head
from remix.models.packing import Packed, packed_inputs

CHUNK_NUMBERS = {"cuda": 2**28}
"""[C, V] of logits that exist at a time, by device."""
CHUNK_NUMBERS_ELSEWHERE = 2**25
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class AnchorStates(NamedTuple):
    """What an anchor policy says of a micro-batch, short of the logits, for the exact KL over the vocabulary."""

    hidden: Tensor
    """[N, H]."""
    head: Head


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
        logits_chunk: int | None = None,
        autocast: torch.dtype | None = None,
        never: Sequence[int] = (),
    ) -> None:
        """`critic` is a backbone of its own for the value head; without it the head sits on the policy's.

        `logits_chunk`: tokens whose logits exist at a time; None: as many as `CHUNK_NUMBERS` are enough for.
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
        packed: Packed | None = None,
    ) -> PolicyOutput:
        """`multimodal`: further inputs of the model and the critic, by argument. `packed`: the same sequences in one
        row, to be computed in place of the padded ones."""
        with self.autocast(input_ids_BS.device):
            hidden_NH, labels_N = self._select(input_ids_BS, response_mask_BT, multimodal, packed)
            stats = self._statistics(hidden_NH, labels_N, temperature, anchors)
            values_N = None
            if with_values and self.value_head is not None:
                values_N = self._values(hidden_NH, input_ids_BS, response_mask_BT, multimodal, packed)

        def scatter(per_token_N: Tensor) -> Tensor:
            full = per_token_N.new_zeros(response_mask_BT.shape, dtype=torch.float32)
            return full.masked_scatter(response_mask_BT, per_token_N.float())

        return PolicyOutput(
            logprobs=scatter(stats.logprobs),
            entropy=scatter(stats.entropy),
            values=None if values_N is None else scatter(values_N),
            divergences=tuple(scatter(divergence) for divergence in stats.divergences),
        )

    def states(
        self,
        input_ids_BS: Tensor,
        response_mask_BT: Tensor,
        multimodal: Mapping[str, Tensor] = _NOTHING,
        packed: Packed | None = None,
    ) -> AnchorStates:
        """Hidden states and head of this policy, when it serves as an anchor."""
        with self.autocast(input_ids_BS.device):
            hidden_NH, _ = self._select(input_ids_BS, response_mask_BT, multimodal, packed)
        return AnchorStates(hidden_NH, self._head())

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

    def _head(self) -> Head:
        head = output_head(self._base().get_output_embeddings())
        return Head(head.weight, head.bias)

    @property
    def backbones(self) -> list[Any]:
        """What makes hidden states of tokens: the policy's, and the critic's where it has its own."""
        base = self._base()
        return [getattr(base, base.base_model_prefix), *([] if self.critic is None else [self.critic])]

    def _select(
        self, input_ids_BS: Tensor, mask_BT: Tensor, multimodal: Mapping[str, Tensor], packed: Packed | None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states [N, H] and the tokens [N] that follow them, at the masked positions only."""
        backbone = self.backbones[0]
        if packed is not None:
            hidden_LH = backbone(**packed_inputs(packed), use_cache=False, **multimodal)[0][0]
            return hidden_LH[packed.before], packed.labels
        inputs, ahead = backbone_inputs(self.lm, input_ids_BS)
        hidden_BSH = backbone(**inputs, use_cache=False, **multimodal)[0][:, ahead:]
        return hidden_BSH[:, :-1][mask_BT], input_ids_BS[:, 1:][mask_BT]

    def _values(
        self,
        hidden_NH: Tensor,
        input_ids_BS: Tensor,
        mask_BT: Tensor,
        multimodal: Mapping[str, Tensor],
        packed: Packed | None,
    ) -> Tensor:
        assert self.value_head is not None
        if self.critic is not None and packed is not None:
            hidden_NH = self.critic(**packed_inputs(packed), use_cache=False, **multimodal)[0][0][packed.before]
        elif self.critic is not None:
            hidden_BSH = self.critic(input_ids=input_ids_BS, use_cache=False, **multimodal)[0]
            hidden_NH = hidden_BSH[:, :-1][mask_BT]
        elif self.detach_value:
            hidden_NH = hidden_NH.detach()
        with torch.autocast(hidden_NH.device.type, enabled=False):  # bfloat16 would round values to 3 digits
            return self.value_head(hidden_NH.float()).squeeze(-1)  # type: ignore[no-any-return]

    def _statistics(
        self, hidden_NH: Tensor, labels_N: Tensor, temperature: float, anchors: tuple[AnchorStates, ...]
    ) -> TokenStatistics:
        head, config = self._head(), self._base().config.get_text_config()
        numbers = CHUNK_NUMBERS.get(hidden_NH.device.type, CHUNK_NUMBERS_ELSEWHERE)
        rule = LogitRule(
            temperature=temperature,
            softcap=getattr(config, "final_logit_softcapping", None),
            never=self.never,
            chunk=self.logits_chunk or max(1, numbers // len(head.weight)),
        )
        return token_statistics(hidden_NH, head, labels_N, rule, anchors)
