"""The things that flow through a run, each frozen, each field with its shape and unit.

Shape suffixes: B sequences of a batch, S tokens of the longest prompt + response, T = S - 1 predicted tokens,
R tokens of one response. Position t of a [B, T] tensor speaks of the token `input_ids[:, t + 1]`.

Log-probs are named by the policy they belong to and never overwritten:
`sampler` (the inference engine), `behaviour` (the trainer's policy that sampled, π_{k-i}), `proximal` (π_k),
`reference` (the KL anchor π_base), `precedent` (π_{k-1}); plain `logprobs` are those of the policy in training, π_θ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Message = Mapping[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""

FinishReason = Literal["stop", "length"]
"""`stop`: the model ended its response itself; `length`: it was cut at the token limit (truncated)."""

Verdict = Literal["correct", "wrong", "no_answer", "timeout", "error"]
"""What the rewards found. `timeout` and `error` are a reward's own failures, counted apart from `wrong`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, as its task states it."""

    id: str
    """Unique within a run, for example "arithmetic/train/17"."""
    content: str | tuple[Message, ...]
    """What the model is asked: plain text, or a conversation for the chat template."""
    answer: str
    """The gold answer, in whatever form the task's reward expects."""
    task: str
    """Name of the task that it comes from."""
    token_ids: tuple[int, ...] = ()
    """The prompt as the model reads it, template included; empty until encoded."""
    images: tuple[str, ...] = ()
    """References of images, as `remix.tasks.images.open_image` opens them, in the order in which the model sees them.

    They stand before the text, or where the content says <image>.
    """
    solution: str = ""
    """A response to learn from by imitation; empty: the answer is one."""


@dataclass(frozen=True, slots=True)
class Score:
    """What the rewards say of one response."""

    value: float
    """The weighted sum of the parts: the reward that is maximised."""
    verdict: Verdict
    """Whether the answer is right, independent of the reward's weights."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Each reward's own value, unweighted, by name."""
    note: str = ""
    """Why it could not be scored; empty unless it failed."""

    @property
    def failed(self) -> bool:
        """A reward failed, not the answer: the value says nothing and is not trained on."""
        return self.verdict in ("timeout", "error")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Training needs top_p = 1 and top_k = 0, so that log-probs are those of the policy."""

    max_tokens: int
    """Most tokens in a response, the end-of-sequence token included."""
    temperature: float = 1.0
    """Divides the logits; 0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 = off."""


@dataclass(frozen=True, slots=True)
class Request:
    """One response asked of an engine."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Alone determines the draw: not the batch, not the order."""
    images: tuple[str, ...] = ()
    """The prompt's, whose places are in `prompt_ids` already."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One response, as an engine returns it."""

    response_ids: Tensor
    """[R] int64, the end-of-sequence token included where the model emitted it."""
    sampler_logprobs: Tensor
    """[R] float32, log-probs of the sampled tokens at the sampling temperature."""
    finish_reason: FinishReason


class Engine(Protocol):
    """What samples responses: transformers, vLLM, or anything else with these three methods."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the policy's weights, named as in its checkpoint. Engines that share the module ignore it."""

    def close(self) -> None:
        """Give back memory and processes."""


class RemoteEngine(Engine, Protocol):
    """An engine in processes of its own: another thread may call it while the trainer computes."""

    def abandon(self) -> None:
        """From any thread: the call under way ends soon, by Interrupted, as does each until the next sync."""


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One response with everything that is known of it. Fields that are None are not known yet."""

    prompt_ids: Tensor
    """[P] int64."""
    response_ids: Tensor
    """[R] int64."""
    sampler_logprobs: Tensor
    """[R] float32, by the inference engine."""
    policy_version: int
    """The training step whose starting policy sampled it; lag = current step - policy_version."""
    finish_reason: FinishReason
    seed: int
    text: str
    """The response decoded, special tokens left out."""
    score: Score | None = None
    advantage: Tensor | None = None
    """[R] float32, group-relative; None under GAE, where it is computed anew at every draw."""
    behaviour_logprobs: Tensor | None = None
    """[R] float32, by the trainer at `policy_version`."""
    reference_logprobs: Tensor | None = None
    """[R] float32, by the reference in force; computed once, valid until reincarnation."""
    precedent_logprobs: Tensor | None = None
    """[R] float32, by π_{k-1} of the step that sampled it; kept only where the KL is part of the reward."""
    images: tuple[str, ...] = ()
    """The prompt's; references, never pixels."""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """All responses to one prompt from one policy version. Kept, replayed and dropped as a whole."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def policy_version(self) -> int:
        return self.rollouts[0].policy_version

    @property
    def uniform(self) -> bool:
        """All rewards equal: group-relative advantages are 0, so the group carries no policy gradient."""
        values = [r.score.value for r in self.rollouts if r.score is not None and not r.score.failed]
        return not values or max(values) == min(values)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One rollout as one training step sees it: beside the rollout, what depends on the step."""

    rollout: Rollout
    policy_lag: int
    """Steps between the policy that sampled it and the one that trains on it; 0 = fresh."""
    advantages: Tensor
    """[R] float32."""
    proximal_logprobs: Tensor | None = None
    """[R] float32, by π_k; None until the first update's forward where that is what says them."""
    precedent_logprobs: Tensor | None = None
    """[R] float32, by π_{k-1}."""
    values: Tensor | None = None
    """[R] float32, by the critic as step k begins."""
    returns: Tensor | None = None
    """[R] float32, the critic's target."""

    @property
    def num_tokens(self) -> int:
        """Trained tokens: R."""
        return self.rollout.response_ids.numel()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples side by side, right-padded. Zero wherever `response_mask` is False."""

    input_ids: Tensor
    """[B, S] int64."""
    response_mask: Tensor
    """[B, T] bool, True = trained: a response token."""
    advantages: Tensor
    """[B, T] float32."""
    behaviour_logprobs: Tensor
    proximal_logprobs: Tensor
    sampler_logprobs: Tensor
    """[B, T] float32 each."""
    policy_lag: Tensor
    """[B] int64, in training steps."""
    reference_logprobs: Tensor | None = None
    precedent_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    """[B, T] float32 each."""
    multimodal: Mapping[str, Any] = field(default_factory=dict)
    """Opaque extra inputs of the model's forward (pixels), by argument; nothing but the model looks inside."""
    packed: Any | None = None
    """The same sequences in one row, opaque too; None: the model is given `input_ids`."""


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """A batch and what the models in training say of it."""

    batch: Batch
    logprobs: Tensor
    """[B, T] float32, with gradient."""
    entropy: Tensor
    """[B, T] float32, nats, over the whole vocabulary, with gradient."""
    values: Tensor | None = None
    """[B, T] float32, with gradient."""
    kl_reference: Tensor | None = None
    kl_precedent: Tensor | None = None
    """[B, T] float32 nats, exact over the vocabulary; only under `kl.estimator: full`."""


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """A scalar to differentiate and per-token diagnostics without gradient."""

    loss: Tensor
    """Scalar, already divided by the denominator of the whole optimiser step."""
    terms: Mapping[str, Tensor]
    """Scalar parts of the loss by name, same denominator, detached."""
    tokens: Mapping[str, Tensor]
    """Per-token diagnostics, [N] over the trained tokens, detached: log_ratio, lag, clipped, kl, entropy, ..."""
