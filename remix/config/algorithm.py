"""The objective, the phases of a run, and what happens between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from remix.config.block import Block, Fraction
from remix.config.model import SeparateCritic, SharedCritic


class GRPOAdvantage(Block):
    """GRPO: a reward less the mean of its group, divided by the group's standard deviation."""

    type: Literal["grpo"] = "grpo"


class DrGRPOAdvantage(Block):
    """GRPO without division by the group's standard deviation."""

    type: Literal["dr_grpo"] = "dr_grpo"


class RLOOAdvantage(Block):
    """RLOO: a reward less the mean of the others of its group."""

    type: Literal["rloo"] = "rloo"


class GAEAdvantage(Block):
    """PPO: a critic's values and generalised advantage estimation."""

    type: Literal["gae"] = "gae"
    gamma: Fraction = 1.0
    """γ: discount of a token."""
    gae_lambda: Fraction = 1.0
    """λ of GAE: 1 = all rewards to come, less variance below it and more bias."""
    whiten: bool = True
    """Advantages of a batch to mean 0, standard deviation 1."""
    vtrace_cap: Annotated[float, Field(ge=1.0)] | None = None
    """c̄: V-trace's weights min(c̄, ρ) in the GAE of replayed tokens; null = off."""
    value_weight: NonNegativeFloat = 0.5
    """Of the value loss beside the policy's."""
    value_clip: PositiveFloat | None = 0.2
    """How far a value may move in a training step before its loss stops pulling; null = any."""
    critic: Annotated[SharedCritic | SeparateCritic, Field(discriminator="type")] = SharedCritic()
    """What estimates the values."""


AdvantageConfig = Annotated[GRPOAdvantage | DrGRPOAdvantage | RLOOAdvantage | GAEAdvantage, Field(discriminator="type")]


class ObjectiveConfig(Block):
    """The policy's loss of a token, and how tokens are summed up."""

    type: Literal["mix_ppg", "gspo", "cispo", "sft"] = "mix_ppg"
    """mix_ppg is PPO's and GRPO's clipped surrogate on fresh rollouts. sft imitates each prompt's solution, or answer,
    in place of sampling: a rollout is then a demonstration, and clip range and advantages are without effect."""
    clip_low: PositiveFloat = 0.2
    """ε below: ratios are clipped to [ρ - clip_low, ρ + clip_high]. ρ is the ratio of the policy with which the step
    begins to the one that sampled: 1 for fresh rollouts."""
    clip_high: PositiveFloat = 0.2
    """ε above; larger than clip_low is DAPO's clip-higher."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """token: the mean of all tokens of an optimiser step. sequence: the mean over responses of their means.
    constant: the sum divided by responses times `constant` (Dr. GRPO)."""
    constant: PositiveFloat | None = None
    """Denominator per sequence under `aggregate: constant`; default `rollout.max_tokens`."""
    entropy_weight: float = 1e-3
    """c of the entropy bonus; below 0 it is a penalty."""
    sampler_weight_cap: PositiveFloat | None = 2.0
    """c of the truncated weight min(π_{k-i}/μ, c) against sampler mismatch; null = off.
    Always off when the engine is the trainer's own module."""


class LambdaSchedule(Block):
    """λ(t) = max(start - drop·ceil(max(t - hold, 0) / every), floor). A fixed λ is drop: 0."""

    start: Fraction = 1.0
    """λ at first."""
    hold: NonNegativeInt = 50
    """Training steps before it falls."""
    every: PositiveInt = 10
    """Training steps from one fall to the next."""
    drop: Fraction = 0.1
    """How much it falls each time."""
    floor: Fraction = 0.5
    """Where it stays."""


class KLConfig(Block):
    """The KL penalty: β·(λ·KL(π‖reference) + (1 - λ)·KL(π‖precedent)). The reference is the model that training
    began from, after a reincarnation the policy of that moment; the precedent is the policy a training step ago."""

    weight: NonNegativeFloat = 1e-3
    """β; 0 = no KL term, and no forward pass for it."""
    estimator: Literal["k1", "k2", "k3", "full"] = "k3"
    """k1, k2, k3: from the sampled token alone. full: exact, over the vocabulary, for which the anchors' logits are
    computed in every update."""
    place: Literal["loss", "reward"] = "loss"
    """loss: a term of the loss. reward: taken off the reward, as measured when the rollout was sampled."""
    importance_weighted: Literal["replayed", "all", "none"] = "replayed"
    """Which tokens' estimates are weighted by the importance ratio, its gradient included."""
    lambda_schedule: LambdaSchedule | None = None
    """λ weighs the reference, 1 - λ the precedent policy. null: the reference alone, λ = 1."""

    @property
    def uses_precedent(self) -> bool:
        schedule = self.lambda_schedule
        return (
            self.weight > 0
            and schedule is not None
            and (schedule.start < 1 or (schedule.drop > 0 and schedule.floor < 1))
        )


class StepsTrigger(Block):
    """After so many steps of the phase."""

    type: Literal["steps"] = "steps"
    after: PositiveInt
    """Training steps."""


class RolloutsTrigger(Block):
    """After so many rollouts generated in the phase."""

    type: Literal["rollouts"] = "rollouts"
    after: PositiveInt
    """Rollouts."""


class RewardPlateauTrigger(Block):
    """The mean reward of the last `window` steps is not `min_gain` above that of the `window` before."""

    type: Literal["reward_plateau"] = "reward_plateau"
    window: PositiveInt = 10
    """Steps of either mean."""
    min_gain: float = 0.01
    """In units of the reward."""


class LengthDropTrigger(Block):
    """The mean response length falls below `fraction` of that of the phase's first steps."""

    type: Literal["length_drop"] = "length_drop"
    fraction: Fraction = 0.5
    """Of the first length."""
    window: PositiveInt = 5
    """Steps of either mean."""


class KLBudgetTrigger(Block):
    """The KL divergence to the reference exceeds so many nats per token."""

    type: Literal["kl_budget"] = "kl_budget"
    nats: PositiveFloat
    """The budget."""


Trigger = Annotated[
    StepsTrigger | RolloutsTrigger | RewardPlateauTrigger | LengthDropTrigger | KLBudgetTrigger,
    Field(discriminator="type"),
]


class PhaseBlock(Block):
    utd_ratio: PositiveInt = 1
    """m: passes of optimiser updates over the batch."""
    until: tuple[Trigger, ...] = ()
    """The phase ends, and the policy reincarnates, as soon as one of these fires. The last phase has none."""


class OnPolicyPhase(PhaseBlock):
    """Every rollout of the batch is fresh."""

    type: Literal["on_policy"] = "on_policy"

    @property
    def off_policy_fraction(self) -> float:
        return 0.0

    @property
    def window(self) -> int:
        return 0


class MixPolicyPhase(PhaseBlock):
    """A share of the batch is drawn from replay."""

    type: Literal["mix_policy"] = "mix_policy"
    utd_ratio: PositiveInt = 2
    off_policy_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.4
    """p: the share of the batch that is drawn from replay, in whole prompts."""
    window: PositiveInt = 2
    """N: of how many past policies replay may use rollouts; one a training step."""
    lag_distribution: Literal["uniform", "geometric", "age"] = "uniform"
    """ν: how lags are drawn: all alike, halving with each step of age, or in proportion to 1/age."""


PhaseConfig = Annotated[OnPolicyPhase | MixPolicyPhase, Field(discriminator="type")]


class ReincarnationConfig(Block):
    """What happens where one phase ends and the next begins, besides reference ← policy."""

    empty_replay: bool = True
    """Forget the rollouts of the phase that ends."""
    reset_optimizer: bool = True
    """The optimiser's moments start anew."""
    reset_critic: bool = False
    """True: the value head starts from zero again; a backbone of its own is kept."""
    restart_lambda: bool = True
    """λ's clock starts anew."""
    lora: Literal["snapshot", "merge"] = "snapshot"
    """snapshot: the reference is a frozen copy of the adapter. merge: fold it into the base, start a fresh one."""
