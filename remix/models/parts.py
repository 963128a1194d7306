"""What this rank holds of a parameter, and the whole of it.

One process and DDP hold whole parameters, and so does ZeRO-2, which shares out gradients and moments alone. Under FSDP2
a parameter is a DTensor, under ZeRO-3 an empty tensor with a flat piece of it beside. All else asks here; where it says
"all ranks", every rank has to ask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def settle(module: nn.Module) -> None:
    """Lets go of what a forward has gathered, so that the parameters are the shared-out ones again."""
    for part_of_it in module.modules():
        if isinstance(part_of_it, FSDPModule):
            part_of_it.reshard()
    zero = next((p._z3_optimizer for p in module.parameters() if hasattr(p, "_z3_optimizer")), None)  # type: ignore[attr-defined]
    if zero is not None:
        zero.parameter_offload.partition_all_parameters()


def is_shared_out(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


def shape_of(parameter: Tensor) -> torch.Size:
    """Of the whole."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def part(parameter: Tensor) -> Tensor:
    """What this rank holds; what is written to it is written to the parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter).data


def whole(parameter: Tensor, of: Tensor | None = None) -> Tensor:
    """The parameter as it is, or as it was when its parts were `of`. All ranks."""
    held = part(parameter) if of is None else of
    if isinstance(parameter, DTensor):
        shared = DTensor.from_local(
            held.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return shared.full_tensor()
    if not hasattr(parameter, "ds_tensor"):
        return held
    flat = held.to(parameter.device).contiguous()
    group: Any = parameter.ds_process_group  # type: ignore[attr-defined]
    pieces = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(pieces, flat, group)
    return torch.cat(pieces)[: shape_of(parameter).numel()].view(shape_of(parameter))


def part_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part, if the whole parameter were this tensor."""
    if isinstance(parameter, DTensor):
        moved = tensor.to(parameter.device)
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    if not hasattr(parameter, "ds_tensor"):
        return tensor
    piece: Tensor = parameter.ds_tensor.data
    start = torch.distributed.get_rank(parameter.ds_process_group) * piece.numel()  # type: ignore[attr-defined]
    mine = tensor.flatten()[start : start + piece.numel()]
    return torch.cat([mine, mine.new_zeros(piece.numel() - mine.numel())]).view(piece.shape)


@torch.no_grad()
def put(parameter: Tensor, tensor: Tensor) -> None:
    """The parameter becomes this tensor, the whole of it."""
    part(parameter).copy_(part_of(parameter, tensor))


@contextmanager
def standing_in(module: nn.Module, parts: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters of these names are others meanwhile, of which this rank holds these parts."""
    settle(module)
    own = dict(module.named_parameters())
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, other in parts.items():
                parameter = own[name]
                if isinstance(parameter, DTensor):  # FSDP2 gathers from the memory that it has made
                    kept[name] = parameter.to_local().clone()
                    parameter.to_local().copy_(other)
                else:
                    held = getattr(parameter, "ds_tensor", parameter)
                    kept[name] = held.data
                    held.data = other.to(held.device)
        yield
    finally:
        settle(module)
        with torch.no_grad():
            for name, before in kept.items():
                parameter = own[name]
                if isinstance(parameter, DTensor):
                    parameter.to_local().copy_(before)
                else:
                    getattr(parameter, "ds_tensor", parameter).data = before


Holding = Callable[[Sequence[nn.Module]], AbstractContextManager[Any]]
"""Modules whose weights are whole meanwhile, as `Hollow.filled` makes them."""


def at_hand(_: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """Where they are whole all the time."""
    return nullcontext()


class Hollow:
    """A copy of a module without weights of its own, to be filled for what needs them whole: sampling, merging, saving.

    A copy, since hooks of FSDP2 and ZeRO-3 on the module itself would gather at every use, which not all ranks make
    equally often. Made before the module is shared out.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        memo: dict[int, Any] = {}
        self._names: dict[nn.Parameter, str] = {}
        for name, parameter in module.named_parameters():
            empty = nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=False)
            memo[id(parameter)], self._names[empty] = empty, name
        self.copy: Any = copy.deepcopy(module, memo)

    @contextmanager
    def filled(self, parts: Sequence[nn.Module] = (), device: torch.device | None = None) -> Iterator[Any]:
        """The copy with whole weights, or these modules of it alone. All ranks. `device`: where, if not where they are.

        What is written to it in between is lost; see `put_back`.
        """
        settle(self.module)
        own = dict(self.module.named_parameters())
        chosen = {parameter for of in (parts or (self.copy,)) for parameter in of.parameters()}
        try:
            for parameter, name in self._names.items():
                if parameter in chosen:
                    tensor = whole(own[name]).detach()
                    parameter.data = tensor if device is None else tensor.to(device)
            yield self.copy
        finally:
            for parameter in chosen:
                parameter.data = torch.empty(0, dtype=parameter.dtype)

    def put_back(self) -> None:
        """What the filled copy holds now is what the module becomes."""
        own = dict(self.module.named_parameters())
        for parameter, name in self._names.items():
            if parameter.numel():
                put(own[name], parameter.data)
