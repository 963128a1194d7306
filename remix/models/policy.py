"""The policy in training and the policies that anchor it.

An anchor is a snapshot of the trained parameters: all of them under full fine-tuning, the adapter's alone under an
adapter. The first one is the policy as the run begins: the base model under a fresh LoRA (B = 0), (IA)³ or `layers`,
not so under virtual tokens, nor where the run goes on from a saved adapter. For a forward under an anchor the snapshot
stands in for the parameters of the one module, so no second model is ever built, whatever kind of adapter is in use.

Where processes share out parameters, each one's snapshot holds its own parts; `models.parts` knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from remix.algorithms import Head
from remix.models.actor_critic import ActorCritic, AnchorStates, PolicyOutput
from remix.models.adapters import engine_weights
from remix.models.packing import Packed, families, pack, packed_microbatches
from remix.models.parts import Hollow, part, part_of, put, settle, shape_of, standing_in, whole
from remix.models.vision import Vision
from remix.types import Batch, Rollout

Snapshot = dict[str, Tensor]
"""This rank's parts of the trained policy parameters by their name in ActorCritic, detached, never written to."""


class Ranks(Protocol):
    """The other processes, where a forward needs them all."""

    def most(self, count: int, stage: str) -> int:
        """How many forwards each makes where this one has `count` to make."""

    def waiting(self, stage: str) -> AbstractContextManager[None]:
        """What needs the other ranks."""


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
        self._ranks: Ranks | None = None
        self._hollow: Hollow | None = None
        self._written: Callable[[], None] = lambda: None
        self.packs = False
        """Whether sequences are packed in one row; see `remix.models.packing`."""
        self.flex = False
        """Whether FlexAttention attends to such a row."""

    def share_out(self, ranks: Ranks, hollow: Hollow | None, written: Callable[[], None]) -> None:
        """The module now belongs to a backend. `hollow`: a copy of the language model, where its parameters are shared
        out; `written`: told whenever weights were written to."""
        self._ranks, self._hollow, self._written = ranks, hollow, written

    @property
    def drops_out(self) -> bool:
        """Whether a forward in training is not the policy's own."""
        layers = any(layer.p > 0 for layer in self.module.modules() if isinstance(layer, nn.Dropout))
        return layers or getattr(self.module.lm.config.get_text_config(), "attention_dropout", 0.0) > 0

    @property
    def reader(self) -> Any:
        """What makes the model's inputs of text and images; whoever is given the model needs it too."""
        return self.tokenizer if self.vision is None else self.vision.processor

    # --- anchors ---

    def snapshot(self) -> Snapshot:
        """A copy of the trained policy parameters in main memory."""
        return {
            name: part(parameter).detach().to("cpu", copy=True)
            for name, parameter in self._own().items()
            if parameter.requires_grad and name.startswith("lm.")
        }

    def whole_snapshot(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        """Its parameters whole, one after the other. All ranks."""
        own = self._own()
        return ((name, whole(own[name], held)) for name, held in snapshot.items())

    def own_snapshot(self, tensors: Mapping[str, Tensor]) -> Snapshot:
        """A snapshot of whole parameters."""
        own = self._own()
        return {name: part_of(own[name], tensor).to("cpu", copy=True) for name, tensor in tensors.items()}

    @contextmanager
    def acting_as(self, anchor: Snapshot | None) -> Iterator[None]:
        """The policy is meanwhile what it was when the snapshot was taken; None: what it is."""
        if anchor is None:
            yield
        else:
            with standing_in(self.module, anchor):
                yield

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
        own = self._own()
        with torch.no_grad():
            for name, tensor in snapshot.items():
                part(own[name]).copy_(tensor)
        self._written()

    def reset_value_head(self) -> None:
        """The critic's value of every state is 0 again."""
        head = self.module.value_head
        assert head is not None
        settle(self.module)
        with torch.no_grad():
            for parameter in (head.weight, head.bias):
                part(parameter).zero_()
        self._written()

    def _own(self) -> dict[str, nn.Parameter]:
        settle(self.module)
        return dict(self.module.named_parameters())

    # --- whole weights ---

    @contextmanager
    def whole_lm(self, device: torch.device | None = None) -> Iterator[Any]:
        """The language model with whole weights: itself, or a copy that is filled meanwhile. All ranks."""
        if self._hollow is None or self._ranks is None:
            yield self.module.lm
            return
        with ExitStack() as stack:
            with self._ranks.waiting("the gathering of weights"):
                lm = stack.enter_context(self._hollow.filled(device=device))
            yield lm

    @property
    def sampled_lm(self) -> Any:
        """What samples from the trainer's own weights: to be asked within `whole_lm`."""
        return self.module.lm if self._hollow is None else self._hollow.copy

    def engine_weights(self, engine: Any) -> Iterator[tuple[str, Tensor]]:
        """What an engine is handed when the policy has changed, gathered layer by layer. All ranks."""
        if self._hollow is None:
            return engine_weights(self.module.lm, engine)
        return engine_weights(self._hollow.copy, engine, self._hollow.filled)

    @contextmanager
    def changing_lm(self) -> Iterator[Any]:
        """The same; what is done to its weights is done to the policy. All ranks."""
        with self.whole_lm() as lm:
            yield lm
            if self._hollow is not None:
                self._hollow.put_back()
        self._written()

    def weights(self, *, with_base: bool) -> dict[str, Tensor]:
        """All trained parameters, the critic's included; with the frozen ones too where they were changed."""
        return dict(self.each_weight(with_base=with_base))

    def each_weight(self, *, with_base: bool) -> Iterator[tuple[str, Tensor]]:
        """The same, one after the other. All ranks."""
        for name, parameter in self._own().items():
            if parameter.requires_grad or with_base:
                yield name, whole(parameter).detach()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raises ValueError where names or shapes are not those of this module."""
        own = self._own()
        trained = {name for name, parameter in own.items() if parameter.requires_grad}
        odd = sorted(trained - weights.keys()) or sorted(weights.keys() - own.keys())
        odd = odd or [name for name, tensor in weights.items() if tensor.shape != shape_of(own[name])]
        if odd:
            raise ValueError(
                f"the checkpoint does not fit the recipe's model: {odd[0]} and {len(odd) - 1} more are missing, "
                "unknown or of another shape; resume with the recipe that the run was started with"
            )
        for name, tensor in weights.items():
            put(own[name], tensor)
        self._written()

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
        groups = self._in_step(self.microbatches(rollouts, tokens_per_microbatch))
        with self.acting_as(anchor):
            for indices in groups:
                chosen = [rollouts[i] for i in indices] or [NOBODY]
                inputs = tuple(tensor.to(self.device) for tensor in token_tensors(chosen))
                output: PolicyOutput = self._together(
                    *inputs, self.temperature, (), with_values, self.multimodal(chosen), self.packed(chosen)
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
        with self.acting_as(anchor):
            states = self.module.states(*inputs)
            # Not the parameter itself, which will be the policy's again; a frozen one stays what it is.
            weight, bias = states.head
            head = Head(weight.detach(), None if bias is None else bias.detach())
            states = AnchorStates(states.hidden, head)
        self.module.train(training)
        return states

    # --- its inputs ---

    def microbatches(self, rollouts: Sequence[Rollout], max_tokens: int) -> list[list[int]]:
        """Indices of what one forward takes: at most `max_tokens` tokens, padding included where there is some."""
        if self.packs:
            return list(packed_microbatches(rollouts, max_tokens))
        return list(microbatches([len(r.prompt_ids) + len(r.response_ids) for r in rollouts], max_tokens))

    def packed(self, rollouts: Sequence[Rollout]) -> Packed | None:
        return pack(rollouts).to(self.device, masked=self.flex) if self.packs else None

    def multimodal(self, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        """The further inputs of the model's forward on these sequences, packed or padded as the policy has them."""
        if self.vision is None:
            return {}
        shown = [rollouts[family[0]] for family in families(rollouts)] if self.packs else rollouts
        prompts = [(rollout.prompt_ids.tolist(), rollout.images) for rollout in shown]
        width = max(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in shown)
        return {name: tensor.to(self.device) for name, tensor in self.vision.inputs(prompts, width).items()}

    def _in_step(self, groups: list[list[int]]) -> list[list[int]]:
        """As many micro-batches as every rank has to make; those to make up the number are empty."""
        count = len(groups) if self._ranks is None or self._hollow is None else self._ranks.most(len(groups), _SCORING)
        return groups + [[] for _ in range(count - len(groups))]

    def _together(self, *arguments: Any) -> Any:
        if self._ranks is None or self._hollow is None:
            return self.module(*arguments)
        with self._ranks.waiting(_SCORING):
            return self.module(*arguments)


_SCORING = "the log-probs of the anchors"
NOBODY = Rollout(
    prompt_ids=torch.zeros(1, dtype=torch.long),
    response_ids=torch.zeros(1, dtype=torch.long),
    sampler_logprobs=torch.zeros(1),
    policy_version=-1,
    finish_reason="length",
    seed=0,
    text="",
)
"""What a rank is asked about that has nothing to ask, where all have to."""


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
