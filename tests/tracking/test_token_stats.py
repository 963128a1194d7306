"""Sums per lag, by hand, and that they add up however a step is split."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from remix.tracking import token_stats
from remix.tracking.token_stats import TokenStats


def tokens(
    ratios: Sequence[float],
    lags: Sequence[int],
    clipped: Sequence[bool] | None = None,
    **others: Sequence[float],
) -> dict[str, Tensor]:
    count = len(ratios)
    zero = torch.zeros(count)
    return {
        "log_ratio": torch.tensor(ratios, dtype=torch.float32).log(),
        "lag": torch.tensor(lags),
        "clipped": torch.tensor(clipped or [False] * count),
        "entropy": zero,
        "update_kl": zero,
    } | {name: torch.tensor(values, dtype=torch.float32) for name, values in others.items()}


def stats_of(*parts: dict[str, Tensor]) -> TokenStats:
    stats = TokenStats()
    for part in parts:
        stats.add(part)
    return stats


def test_by_hand() -> None:
    metrics = stats_of(
        tokens(
            [1.0, 1.0, 2.0, 0.5, 0.5],
            [0, 0, 1, 1, 1],
            [False, True, True, False, False],
            entropy=[1.0, 2.0, 3.0, 4.0, 5.0],
            update_kl=[0.0, 0.0, 0.1, 0.2, 0.4],
            kl_reference=[0.3, 0.1, 0.5, 1.0, 2.0],
            kl_precedent=[0.0, 0.0, 0.0, 0.0, 5.0],
        )
    ).metrics()
    assert metrics == pytest.approx(
        {
            "tokens/trained": 5,
            "entropy": 15 / 5,
            "policy_lag/mean": 3 / 5,
            # Weighted by the ratio, whose sum is 5: (.3 + .1 + 2 * .5 + .5 * 1 + .5 * 2) / 5 = 2.9 / 5
            "kl/reference": 0.58,
            "kl/precedent": 2.5 / 5,
            # (2 * .1 + .5 * .2 + .5 * .4) / 5
            "kl/update": 0.1,
            "ratio/mean": 5 / 5,
            # 5^2 / (5 * (1 + 1 + 4 + .25 + .25)) = 25 / 32.5
            "ess": 25 / 32.5,
            "clip_fraction": 2 / 5,
            "ratio/mean/lag=0": 1.0,
            "ess/lag=0": 1.0,
            "clip_fraction/lag=0": 1 / 2,
            "tokens/lag=0": 2,
            "ratio/p05/lag=0": 1.0,
            "ratio/p50/lag=0": 1.0,
            "ratio/p95/lag=0": 1.0,
            "ratio/mean/lag=1": 3 / 3,
            # 3^2 / (3 * 4.5)
            "ess/lag=1": 2 / 3,
            "clip_fraction/lag=1": 1 / 3,
            "tokens/lag=1": 3,
            "ratio/p05/lag=1": 0.5,
            "ratio/p50/lag=1": 0.5,
            # Place 1 + int(.95 * 2) = 2 of .5, .5, 2
            "ratio/p95/lag=1": 0.5,
        },
        rel=1e-6,
    )


def test_quantiles_are_order_statistics() -> None:
    # 1..101: place 1 + int(q * 100) holds 6, 51, 96.
    values = [float(i) for i in range(101, 0, -1)]
    metrics = stats_of(tokens(values, [3] * 101)).metrics()
    found = [metrics[f"ratio/{label}/lag=3"] for label in ("p05", "p50", "p95")]
    assert found == pytest.approx([6, 51, 96], rel=1e-6)


def test_the_weighted_kl_is_unbiased_for_the_policy_in_training() -> None:
    """Two actions. The behaviour b = (1/2, 1/2) sampled, the policy is p = (.8, .2), the anchor q = (.5, .5)."""
    p, q = (0.8, 0.2), (0.5, 0.5)
    exact = sum(a * math.log(a / c) for a, c in zip(p, q, strict=True))
    k1 = [math.log(a / c) for a, c in zip(p, q, strict=True)]
    # Each action once, as b has it: the ratios 1.6 and .4 sum to 2.
    metrics = stats_of(tokens([1.6, 0.4], [1, 1], kl_reference=k1)).metrics()
    assert metrics["kl/reference"] == pytest.approx(exact, rel=1e-6)
    assert exact != pytest.approx(sum(k1) / 2, rel=0.1), "without weights it is another number"


def test_a_far_token_carries_all_the_weight() -> None:
    # The ratio's limit: e^20 against 1 and 1; ess -> 1/3.
    metrics = stats_of(tokens([math.exp(20), 1.0, 1.0], [2, 2, 2])).metrics()
    assert metrics["ess"] == pytest.approx(1 / 3, rel=1e-5)
    assert metrics["ratio/mean"] == pytest.approx((math.exp(20) + 2) / 3, rel=1e-5)


def batch(seed: int, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "log_ratio": 0.3 * torch.randn(count, generator=generator),
        "lag": torch.randint(0, 3, (count,), generator=generator),
        "clipped": torch.rand(count, generator=generator) < 0.2,
        "entropy": torch.rand(count, generator=generator),
        "update_kl": torch.rand(count, generator=generator),
        "kl_reference": torch.rand(count, generator=generator),
    }


def test_ranks_and_microbatches_add_up_to_one_pass() -> None:
    parts = [batch(seed, count) for seed, count in enumerate((7, 1, 40, 13))]
    whole = stats_of({name: torch.cat([part[name] for part in parts]) for name in parts[0]}).metrics()
    assert stats_of(*parts).metrics() == pytest.approx(whole, rel=1e-12)
    ranks = [stats_of(parts[0], parts[3]), stats_of(parts[1]), stats_of(parts[2]), TokenStats()]
    merged = TokenStats.merge(rank.sampled() for rank in ranks)
    assert merged.metrics() == pytest.approx(whole, rel=1e-12)
    assert {name for name in whole if "lag=" not in name} == {
        "tokens/trained",
        "entropy",
        "policy_lag/mean",
        "kl/reference",
        "kl/update",
        "ratio/mean",
        "ess",
        "clip_fraction",
    }
    assert sum("lag=" in name for name in whole) == 7 * 3


def test_what_travels_is_small_and_keeps_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stats, "SAMPLE_SIZE", 100)
    # 1001 ratios 1..1001 at lag 1: every ceil(1001 / 100) = 11th is kept, 1, 12, ..., 1 + 11 * 90 = 991: 91 of them.
    big = stats_of(tokens([float(i) for i in range(1, 1002)], [1] * 1001), tokens([1.0], [0]))
    small = big.sampled()
    (kept,) = small.ratios[1]
    assert kept.tolist() == pytest.approx([1.0 + 11 * i for i in range(91)], rel=1e-5)
    assert len(pickle.dumps(kept)) < 91 * 4 + 1000
    assert [len(part) for part in small.ratios[0]] == [1]
    a, b = big.metrics(), small.metrics()
    quantiles = {name for name in a if "/p" in name and name.startswith("ratio/")}
    assert len(quantiles) == 6
    assert {name: a[name] for name in a.keys() - quantiles} == {name: b[name] for name in b.keys() - quantiles}
    # Place 1 + int(.5 * 90) = 46 of the sample: 1 + 11 * 45; of all, place 501.
    assert b["ratio/p50/lag=1"] == pytest.approx(496, rel=1e-5)
    assert a["ratio/p50/lag=1"] == pytest.approx(501, rel=1e-5)


def test_nothing_was_trained_on() -> None:
    assert TokenStats().metrics() == {}
    assert TokenStats.merge([TokenStats(), TokenStats()]).metrics() == {}
