"""The equations: pure torch, one function each, per token and without reduction until `aggregate`."""

from remix.algorithms.advantages import (
    dr_grpo_advantage,
    gae,
    group_relative_advantage,
    rloo_advantage,
    vtrace_gae,
    whiten,
)
from remix.algorithms.divergences import entropy, importance_weighted, kl_convex, kl_estimate, kl_full
from remix.algorithms.losses import (
    aggregate,
    cispo,
    clipped_surrogate,
    clipped_value_loss,
    gspo,
    is_clipped,
    mix_ppg,
    negative_log_likelihood,
)
from remix.algorithms.ratios import (
    LOG_RATIO_LIMIT,
    effective_sample_size,
    importance_ratio,
    log_ratio,
    sequence_log_ratio,
    truncated_importance_weight,
)
from remix.algorithms.schedules import lambda_decay, overlong_penalty
from remix.algorithms.vocabulary import Head, LogitRule, TokenStatistics, token_statistics

__all__ = [
    "LOG_RATIO_LIMIT",
    "Head",
    "LogitRule",
    "TokenStatistics",
    "aggregate",
    "cispo",
    "clipped_surrogate",
    "clipped_value_loss",
    "dr_grpo_advantage",
    "effective_sample_size",
    "entropy",
    "gae",
    "group_relative_advantage",
    "gspo",
    "importance_ratio",
    "importance_weighted",
    "is_clipped",
    "kl_convex",
    "kl_estimate",
    "kl_full",
    "lambda_decay",
    "log_ratio",
    "mix_ppg",
    "negative_log_likelihood",
    "overlong_penalty",
    "rloo_advantage",
    "sequence_log_ratio",
    "token_statistics",
    "truncated_importance_weight",
    "vtrace_gae",
    "whiten",
]
