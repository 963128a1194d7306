"""Whole parameters and this rank's parts of them; with several ranks in tests/training/test_backends.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from remix.models.parts import Hollow, is_shared_out, part, part_of, put, settle, standing_in, whole


def a_module() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    return module


@pytest.fixture(params=["plain", "fsdp2"])
def made(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Hollow, nn.Module]]:
    """A module, shared out or not, its hollow copy, and the same once more."""
    module, twin = a_module(), a_module()
    hollow = Hollow(module)
    if request.param == "plain":
        yield module, hollow, twin
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(module[0])
        fully_shard(module)
        yield module, hollow, twin
    finally:
        torch.distributed.destroy_process_group()


X = torch.arange(6.0).view(2, 3)


@torch.no_grad()
def test_another_stands_in_and_goes(made: tuple[nn.Module, Hollow, nn.Module]) -> None:
    module, _, twin = made
    expected = twin(X)
    assert torch.equal(module(X), expected)
    settle(module)
    parts = {name: 2 * part(parameter) for name, parameter in module.named_parameters() if "weight" in name}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "weight" in name:
                parameter.mul_(2)
    with standing_in(module, parts):
        assert torch.equal(module(X), twin(X)), "also right after a forward that has gathered the parameters"
    assert torch.equal(module(X), expected)


@torch.no_grad()
def test_a_hollow_copy_is_filled_and_emptied(made: tuple[nn.Module, Hollow, nn.Module]) -> None:
    module, hollow, twin = made
    assert sum(parameter.numel() for parameter in hollow.copy.parameters()) == 0
    module(X)
    with hollow.filled() as filled:
        assert torch.equal(filled(X), twin(X))
    with hollow.filled([hollow.copy[0]]) as filled:
        assert torch.equal(filled[0](X), twin[0](X))
        assert filled[2].weight.numel() == 0
    assert sum(parameter.numel() for parameter in hollow.copy.parameters()) == 0


@torch.no_grad()
def test_what_is_done_to_the_copy_comes_back(made: tuple[nn.Module, Hollow, nn.Module]) -> None:
    module, hollow, twin = made
    with hollow.filled([hollow.copy[0]]) as filled:
        filled[0].weight.data = filled[0].weight * 3
        hollow.put_back()
    twin[0].weight.mul_(3)
    assert torch.equal(module(X), twin(X))


@torch.no_grad()
def test_whole_and_part_are_inverse(made: tuple[nn.Module, Hollow, nn.Module]) -> None:
    module, _, twin = made
    for (name, parameter), original in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert is_shared_out(parameter) == isinstance(parameter, DTensor)
        assert torch.equal(whole(parameter), original), name
        assert torch.equal(whole(parameter, part_of(parameter, original + 1)), original + 1)
        put(parameter, original + 2)
        assert torch.equal(whole(parameter), original + 2)
