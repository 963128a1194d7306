"""The optimiser of a run behind one face, whoever holds its parameters and moments.

The same under every backend: gradients are clipped by group, an update that is not finite leaves everything as it was,
and a checkpoint holds the moments of whole parameters in the order of the optimiser's groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from remix import checkpoint
from remix.models.parts import shape_of

CLIP_EPS = 1e-6
"""Of torch.nn.utils.clip_grad_norm_."""


class Stepper:
    """Of one process, DDP and FSDP2: a torch optimiser over the parameters themselves."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    def clip(self, max_norm: float | None) -> dict[str, float]:
        """The gradient norm of each group before clipping, by its name."""
        limit = float("inf") if max_norm is None else max_norm
        norms = ((of["name"], nn.utils.clip_grad_norm_(of["params"], limit)) for of in self.param_groups)
        return {name: float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for name, norm in norms}

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Neither weights nor moments change; the gradient is dropped."""
        self.optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Moments start anew."""
        self.optimizer.state.clear()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Of whole parameters, named by the position of their parameter, as `checkpoint.optimizer_tensors` does; one
        after the other. All ranks."""
        for name, value in checkpoint.optimizer_tensors(self.optimizer).items():
            yield name, value.full_tensor() if isinstance(value, DTensor) else value

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]

        def held(name: str, value: Tensor) -> Tensor:
            parameter = parameters[int(name.partition(".")[0])]
            if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
                return value
            moved = value.to(parameter.device)
            return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)

        checkpoint.load_optimizer(self.optimizer, {name: held(name, value) for name, value in tensors.items()})

    def take_over(self) -> None:
        """The weights were written to by others."""


class Piece(NamedTuple):
    """What this rank's optimiser holds of a parameter."""

    flat: Tensor
    """[·] float32: pieces of many parameters, one after the other; the key of their moments."""
    offset: int
    """Where in it the piece begins."""
    start: int
    """Where in the flattened parameter it begins."""
    size: int

    def within(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.size]

    def of(self, whole: Tensor) -> Tensor:
        return whole.flatten()[self.start : self.start + self.size]


class ZeroStepper(Stepper):
    """Of DeepSpeed's ZeRO-2 and ZeRO-3, whose optimiser holds float32 copies of this rank's pieces.

    Its own clipping, by one norm of all groups, is off.
    """

    def __init__(self, engine: Any, optimizer: Any, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        """`groups`: the parameters of the optimiser's groups before DeepSpeed put flat ones in their places."""
        super().__init__(optimizer)
        self._engine, self._zero = engine, engine.optimizer
        self._parameters = [parameter for group in groups for parameter in group]
        self._partitions_weights = hasattr(self._zero, "fp32_partitioned_groups_flat")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._zero.optimizer.param_groups  # type: ignore[no-any-return]

    def clip(self, max_norm: float | None) -> dict[str, float]:
        squares = torch.zeros(len(self.param_groups), dtype=torch.float64)
        for index, group in enumerate(self._group_of_flat):
            squares[group] += sum(float(gradient.float().square().sum()) for gradient in self._gradients(index))
        squares = squares.to(self._engine.device)
        torch.distributed.all_reduce(squares)
        norms: list[float] = squares.sqrt().tolist()
        for index, group in enumerate(self._group_of_flat):
            if max_norm is not None and norms[group] > max_norm:
                for gradient in self._gradients(index):
                    gradient.mul_(max_norm / (norms[group] + CLIP_EPS))
        return {group["name"]: norm for group, norm in zip(self.param_groups, norms, strict=True)}

    def step(self) -> None:
        self._engine.step()

    def skip(self) -> None:
        # What DeepSpeed itself does of a gradient that is not finite, is what is wanted.
        gradients = [gradient for index in range(len(self._flats)) for gradient in self._gradients(index)]
        for gradient in gradients:
            gradient.fill_(torch.nan)
        for key in getattr(self._zero, "norm_for_param_grads", {}):
            self._zero.norm_for_param_grads[key] = torch.tensor(torch.inf)
        self._engine.step()
        assert self._zero.overflow, "DeepSpeed took a step that is not finite"
        for gradient in gradients:  # what fills up the last rank's pieces is never written to again
            gradient.zero_()

    def forget(self) -> None:
        for state in self._states.values():
            for key, value in state.items():
                state[key] = value.zero_() if isinstance(value, Tensor) else 0

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        keys = sorted({key for flat in self._flats for key in self._states.get(flat, {})})
        for index, parameter in enumerate(self._parameters):
            piece = self._piece(parameter)
            for key in keys:
                whole = torch.zeros(shape_of(parameter).numel(), device=self._engine.device)
                if key == "step":
                    step = max(float(self._states[flat][key]) for flat in self._flats)
                    yield f"{index}.{key}", torch.tensor(step)
                    continue
                if piece is not None:
                    piece.of(whole).copy_(piece.within(self._states[piece.flat][key]))
                torch.distributed.all_reduce(whole)
                yield f"{index}.{key}", whole.view(shape_of(parameter))

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """`step` is one number for all."""
        for name, value in tensors.items():
            index, _, key = name.partition(".")
            if key == "step":
                for flat in self._flats:
                    self._states[flat][key] = value.clone() if self._is_torch else int(value)
                continue
            piece = self._piece(self._parameters[int(index)])
            if piece is not None:
                state = self._states[piece.flat]
                state.setdefault(key, torch.zeros_like(piece.flat))
                piece.within(state[key]).copy_(piece.of(value))

    def take_over(self) -> None:
        self._zero.refresh_fp32_params()

    # --- where DeepSpeed keeps what ---

    @property
    def _is_torch(self) -> bool:
        """Else it is DeepSpeed's own for offloaded moments, which counts steps by plain numbers."""
        return isinstance(self._zero.optimizer, torch.optim.AdamW)

    @property
    def _states(self) -> Any:
        return self._zero.optimizer.state

    @property
    def _flats(self) -> list[Tensor]:
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._partitions_weights else zero.single_partition_of_fp32_groups
        return list(flats)

    @property
    def _group_of_flat(self) -> list[int]:
        """Which of the optimiser's groups each belongs to."""
        if self._partitions_weights:
            return [self._zero.sub_group_to_group_id[index] for index in range(len(self._flats))]
        return list(range(len(self._flats)))

    def _gradients(self, index: int) -> Sequence[Tensor]:
        """Of a flat, this rank's, after the last backward of an optimiser step."""
        offloaded = self._zero.offload_optimizer if self._partitions_weights else self._zero.cpu_offload
        if offloaded:
            return [self._flats[index].grad]  # type: ignore[list-item]
        return self._zero.averaged_gradients[index]  # type: ignore[no-any-return]

    def _piece(self, parameter: Any) -> Piece | None:
        """None where all of it is with other ranks."""
        if not self._partitions_weights:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            of, at = mapping.lp_fragment_address, mapping.hp_fragment_address
            return Piece(self._flats[mapping.param_group_index], at.start, of.start, of.numel)
        index, offset, count = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = torch.distributed.get_rank(parameter.ds_process_group) * count
        count = min(count, parameter.ds_numel - start)
        return Piece(self._flats[index], offset, start, count) if count > 0 else None
