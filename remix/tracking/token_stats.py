"""What the updates of a step did to its tokens, per policy lag: sums that add up over micro-batches and ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SAMPLE_SIZE = 16384
"""Ratios kept per lag and rank for the quantiles; means, clip fractions and sample sizes are of all tokens."""

DIVERGENCES = {"kl_reference": "kl/reference", "kl_precedent": "kl/precedent", "update_kl": "kl/update"}
"""Per-token estimates and the names of their means."""

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


class TokenStats:
    """Accumulates `LossOutput.tokens`. Rank-local until `merge`."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.ratios: defaultdict[int, list[Tensor]] = defaultdict(list)

    def add(self, tokens: Mapping[str, Tensor]) -> None:
        """[N] tensors of one micro-batch. Without `log_ratio` (demonstrations) there is no other policy to compare."""
        lags, compared = tokens["lag"], "log_ratio" in tokens
        ratio = tokens["log_ratio"].double().exp() if compared else torch.ones(lags.shape, dtype=torch.float64)
        self.sums["tokens"] += ratio.numel()
        self.sums["lag"] += lags.sum().item()
        self.sums["entropy"] += tokens["entropy"].double().sum().item()
        self.sums["weight"] += ratio.sum().item()
        for name in DIVERGENCES:
            if name in tokens:
                self.sums[name] += (ratio * tokens[name].double()).sum().item()
        for lag in lags.unique().tolist() if compared else ():
            of_lag = lags == lag
            self.sums[f"n/{lag}"] += int(of_lag.sum())
            self.sums[f"w/{lag}"] += ratio[of_lag].sum().item()
            self.sums[f"w2/{lag}"] += ratio[of_lag].square().sum().item()
            self.sums[f"clipped/{lag}"] += tokens["clipped"][of_lag].sum().item()
            self.ratios[lag].append(ratio[of_lag].float())

    def sampled(self) -> TokenStats:
        """The same sums with at most SAMPLE_SIZE ratios a lag, evenly spaced: what travels between ranks."""
        small = TokenStats()
        small.sums.update(self.sums)
        for lag, parts in self.ratios.items():
            ratios = torch.cat(parts)
            # A copy: pickling a view would send all of them.
            small.ratios[lag] = [ratios[:: max(1, -(-ratios.numel() // SAMPLE_SIZE))].clone()]
        return small

    @staticmethod
    def merge(stats: Iterable[TokenStats]) -> TokenStats:
        merged = TokenStats()
        for part in stats:
            for name, value in part.sums.items():
                merged.sums[name] += value
            for lag, ratios in part.ratios.items():
                merged.ratios[lag] += ratios
        return merged

    def metrics(self) -> dict[str, float]:
        """KL, entropy and lag over all tokens; ratio, clip fraction and effective sample size per lag and over all.

        Every KL is that of the policy in training: estimates on its predecessors' tokens are weighted by the
        importance ratio.
        """
        count = self.sums["tokens"]
        if not count:
            return {}
        metrics = {
            "tokens/trained": count,
            "entropy": self.sums["entropy"] / count,
            "policy_lag/mean": self.sums["lag"] / count,
        }
        for name, label in DIVERGENCES.items():
            if name in self.sums:
                metrics[label] = self.sums[name] / self.sums["weight"]
        lags = sorted(self.ratios)
        if not lags:
            return metrics
        weight, square = (sum(self.sums[f"{name}/{lag}"] for lag in lags) for name in ("w", "w2"))
        metrics["ratio/mean"] = weight / count
        metrics["ess"] = weight**2 / (count * square)
        metrics["clip_fraction"] = sum(self.sums[f"clipped/{lag}"] for lag in lags) / count
        for lag in lags:
            number, suffix = self.sums[f"n/{lag}"], f"lag={lag}"
            metrics[f"ratio/mean/{suffix}"] = self.sums[f"w/{lag}"] / number
            metrics[f"ess/{suffix}"] = self.sums[f"w/{lag}"] ** 2 / (number * self.sums[f"w2/{lag}"])
            metrics[f"clip_fraction/{suffix}"] = self.sums[f"clipped/{lag}"] / number
            metrics[f"tokens/{suffix}"] = number
            ratios = torch.cat(self.ratios[lag])
            for label, quantile in QUANTILES.items():
                # kthvalue, since torch.quantile refuses more than 2^24 numbers
                metrics[f"ratio/{label}/{suffix}"] = ratios.kthvalue(
                    1 + int(quantile * (len(ratios) - 1))
                ).values.item()
        return metrics
