"""Agreement with PEFT: real adapters of linear, Conv1D and embedding layers, merged by PEFT and by the equations."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import peft.utils.merge_utils as merge_utils
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from remix.merging import lora
from remix.merging.methods import dare_linear, dare_ties, task_arithmetic, ties

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")

WEIGHTS = [0.7, 1.3, -0.4]
ALPHAS = [8, 3, 16]
NAMES = ["first_one", "second_one", "third_one"]
SEEDS = [101, 102, 103]
TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}


class Tiny(nn.Module):
    """One layer of each kind that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv1d = Conv1D(12, 8)
        self.proj = nn.Linear(12, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.conv1d(self.table(ids)))


def adapted(
    ranks: tuple[int, ...] = (4, 4, 4), targets: tuple[str, ...] = ("table", "conv1d", "proj"), **options
) -> nn.Module:
    """A PEFT model with three random adapters, the second rsLoRA."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = None
        for index, (name, rank, alpha) in enumerate(zip(NAMES, ranks, ALPHAS, strict=True)):
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,
                target_modules=list(targets),
                use_rslora=index == 1,
                fan_in_fan_out=targets == ("conv1d",),
                **options,
            )
            if model is None:
                model = get_peft_model(Tiny(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        for key, parameter in model.named_parameters():
            if "lora_magnitude" in key:
                parameter.data.mul_(1 + torch.rand_like(parameter))
            elif "lora_" in key:
                parameter.data.normal_(std=0.2)
    return model


def layers(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Every adapted layer, and whether its weight is [in, out]."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            yield module, bool(module.lora_embedding_A) or bool(getattr(module, "fan_in_fan_out", False))


def factors(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data
    return layer.lora_A[name].weight.data, layer.lora_B[name].weight.data


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws from the global generator; here each task's draw starts from its own seed."""
    real, calls = merge_utils.prune, iter(range(10**6))

    def seeded(*args, **kwargs):
        torch.manual_seed(SEEDS[next(calls) % len(SEEDS)])
        return real(*args, **kwargs)

    monkeypatch.setattr(merge_utils, "prune", seeded)


OURS = {
    "linear": lambda base, tasks, weights, density, elect: task_arithmetic(base, tasks, weights),
    "magnitude_prune": lambda base, tasks, weights, density, elect: task_arithmetic(
        base, tasks, weights, density=density
    ),
    "ties": lambda base, tasks, weights, density, elect: ties(base, tasks, weights, density=density, elect=elect),
    "dare_linear": lambda base, tasks, weights, density, elect: dare_linear(
        base, tasks, weights, seeds=SEEDS, density=density
    ),
    "dare_ties": lambda base, tasks, weights, density, elect: dare_ties(
        base, tasks, weights, seeds=SEEDS, density=density, elect=elect
    ),
}
GRID = [
    (kind, density, elect)
    for kind in OURS
    for density in ((0.3, 0.62) if kind != "linear" else (1.0,))
    for elect in (("total", "frequency") if kind.endswith("ties") else ("total",))
]


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(("kind", "density", "elect"), GRID)
def test_factors_merge_as_in_peft(kind, density, elect):
    model = adapted()
    model.base_model.add_weighted_adapter(
        NAMES, WEIGHTS, "merged_one", combination_type=kind, density=density, majority_sign_method=elect
    )
    seen = 0
    for layer, _ in layers(model):
        scalings = [layer.scaling[name] for name in NAMES]
        for index, side in enumerate("AB"):
            tasks = [factors(layer, name)[index] for name in NAMES]
            weights = lora.factor_weights(WEIGHTS, scalings, side)
            ours = OURS[kind](torch.zeros_like(tasks[0]), tasks, weights, density, elect)
            torch.testing.assert_close(ours, factors(layer, "merged_one")[index], **TOLERANCE)
            seen += 1
        assert layer.scaling["merged_one"] == 1.0
    assert seen == 6


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(("kind", "density", "elect"), GRID)
def test_deltas_merge_as_in_peft(kind, density, elect):
    model = adapted(ranks=(4, 2, 3))
    name = "svd" if kind == "linear" else f"{kind}_svd"
    model.base_model.add_weighted_adapter(
        NAMES, WEIGHTS, "merged_one", combination_type=name, density=density, majority_sign_method=elect, svd_rank=5
    )
    assert len(list(layers(model))) == 3
    for layer, transposed in layers(model):
        tasks = [lora.delta(*factors(layer, name), layer.scaling[name], fan_in_fan_out=transposed) for name in NAMES]
        for task, adapter in zip(tasks, NAMES, strict=True):
            torch.testing.assert_close(task, layer.get_delta_weight(adapter), **TOLERANCE)
        merged = OURS[kind](torch.zeros_like(tasks[0]), tasks, WEIGHTS, density, elect)
        a, b, energy = lora.refactor(merged.T if transposed else merged, 5)
        theirs = layer.get_delta_weight("merged_one")
        torch.testing.assert_close(lora.delta(a, b, 1.0, fan_in_fan_out=transposed), theirs, **TOLERANCE)
        left = (theirs - merged).square().sum() / merged.square().sum()
        assert energy == pytest.approx(1 - left.item(), abs=1e-5)


def test_side_by_side_as_in_peft():
    model = adapted(ranks=(4, 2, 3))
    model.base_model.add_weighted_adapter(NAMES, WEIGHTS, "merged_one", combination_type="cat")
    for layer, _ in layers(model):
        pairs = [factors(layer, name) for name in NAMES]
        ours = lora.concatenated(
            [a for a, _ in pairs], [b for _, b in pairs], WEIGHTS, [layer.scaling[name] for name in NAMES]
        )
        for mine, theirs in zip(ours, factors(layer, "merged_one"), strict=True):
            torch.testing.assert_close(mine, theirs, **TOLERANCE)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 3)])
def test_scalings_are_pefts(ranks):
    for layer, _ in layers(adapted(ranks)):
        for index, (name, rank, alpha) in enumerate(zip(NAMES, ranks, ALPHAS, strict=True)):
            assert layer.scaling[name] == lora.lora_scaling(rank, alpha, rslora=index == 1)


@pytest.mark.parametrize("target", ["table", "conv1d", "proj"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_an_adapter_adds_is_what_peft_merges(target, dora):
    model = adapted(targets=(target,), use_dora=dora)
    for name in NAMES:
        layer, transposed = next(layers(model))
        weight = layer.get_base_layer().weight.data.clone()
        a, b = factors(layer, name)
        if dora:
            magnitude = layer.lora_magnitude_vector[name].weight.data
            ours = lora.dora_delta(weight, a, b, layer.scaling[name], magnitude, fan_in_fan_out=transposed)
        else:
            ours = lora.delta(a, b, layer.scaling[name], fan_in_fan_out=transposed)
        merged = copy.deepcopy(model)
        merged.set_adapter(name)
        theirs = getattr(merged.merge_and_unload(), target).weight.data
        torch.testing.assert_close(weight + ours, theirs, **TOLERANCE)
