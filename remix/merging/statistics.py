"""What weighs parents against each other beside their weights, from the rollouts that each of them sampled.

T predicted tokens of a response, V vocabulary, N tokens (or patches of pictures) at a layer, I its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from remix.config import ModelConfig
from remix.merging.base import Base
from remix.merging.parents import Parent
from remix.models import shards
from remix.models.adapters import with_saved_adapter
from remix.models.loading import load_lm, load_processor, load_tokenizer, placeholder_ids
from remix.models.vision import Vision
from remix.replay import logged_steps, read_shards
from remix.types import Rollout

Kind = Literal["fisher", "gram"]


@dataclass(frozen=True)
class Statistics:
    """On disk, read by the tensor."""

    parents: tuple[shards.Shards, ...]

    def tensor(self, parent: int, name: str) -> Tensor | None:
        """None where there is none: Gram matrices belong to linear layers, and some tensors are no parameters."""
        own = self.parents[parent]
        return own.tensor(name) if name in own.specs else None


def own_rollouts(run_dir: str, count: int) -> list[Rollout]:
    """The newest of a run, which its last policy sampled or nearly so. Raises ValueError where there are none."""
    found: list[Rollout] = []
    for paths in reversed(logged_steps(Path(run_dir)).values()):
        groups = read_shards(paths)
        found += [rollout for group in groups for rollout in group.rollouts if len(rollout.response_ids)]
        if len(found) >= count:
            break
    if not found:
        raise ValueError(f"rollouts {run_dir}: no rollouts/step=*.parquet with responses there; name a run directory")
    return found[:count]


def check(kind: Kind, base: Base, parents: Sequence[Parent], rollouts: Sequence[Sequence[Rollout]]) -> None:
    """Raises ValueError where these statistics cannot be had of these parents; loads no weights."""
    for parent, own in zip(parents, rollouts, strict=True):
        for tensor in sorted(base.naming.fused.keys() & parent.touched):
            if kind == "fisher" or len(base.weights.specs[tensor].shape) == 2:
                raise ValueError(
                    f"{parent.path} changes {tensor}, which transformers makes part of {base.naming.fused[tensor]}, as "
                    "it does with a layer's experts: no statistics are taken of such tensors; choose a method that "
                    "needs none (remix merge --list), or adapters on other layers"
                )
        load_processor(_config(base, parent), needed=any(rollout.images for rollout in own))


def compute(
    kind: Kind,
    base: Base,
    parents: Sequence[Parent],
    rollouts: Sequence[Sequence[Rollout]],
    tensors: frozenset[str],
    folder: Path,
    progress: Callable[[int, str], None],
) -> Statistics:
    """Writes those of every parent to a file of `folder`, one parent after the other; each is loaded whole."""
    parameters = {parameter: tensor for parameter, tensor in base.naming.tensors.items() if tensor in tensors}
    for index, (parent, own) in enumerate(zip(parents, rollouts, strict=True)):
        lm, reading = _load(base, parent)
        most, rows = max(int(r.response_ids.max()) for r in own), lm.get_input_embeddings().weight.shape[0]
        if most >= rows:
            raise ValueError(
                f"rollouts of {parent.path}: token {most} is not one of its {rows}: of another model's run"
            )
        steps = _counted(own, lambda: progress(1, f"{kind} of {parent.path}"))  # noqa: B023 - used up in this round
        statistic = diagonal_fisher if kind == "fisher" else input_grams
        found = statistic(lm, steps, parameters, reading)
        shards.save(folder / f"{index}.safetensors", found)
    return Statistics(tuple(shards.Shards(folder, (f"{index}.safetensors",)) for index in range(len(parents))))


Reading = Callable[[Rollout], dict[str, Tensor]]
"""What a model's forward is called with on a rollout: token ids, pictures beside them."""


def diagonal_fisher(
    lm: Any, rollouts: Iterator[Rollout], parameters: Mapping[str, str], reading: Reading
) -> dict[str, Tensor]:
    """F = 1/n Σ_y (∂ log π(y) / ∂θ)², y ~ π. Merging models with Fisher-weighted averaging (arXiv 2111.09832), eq. 3.

    By tensor; `parameters`: those of the module that are wanted, each with its tensor's name.
    """
    lm.requires_grad_(False)
    own = dict(lm.named_parameters(remove_duplicate=False))  # a checkpoint holds buffers too
    wanted = {tensor: own[name].requires_grad_(True) for name, tensor in parameters.items() if name in own}
    squares = {tensor: torch.zeros_like(parameter, dtype=torch.float32) for tensor, parameter in wanted.items()}
    count = 0
    for rollout in rollouts:
        logprob = _sequence_logprob(lm, rollout, reading)
        for tensor, gradient in zip(wanted, torch.autograd.grad(logprob, list(wanted.values()), allow_unused=True),
                                    strict=True):  # fmt: skip
            if gradient is not None:  # a layer that neither text nor picture reaches
                squares[tensor].add_(gradient.float().square())
        count += 1
    return {tensor: square / count for tensor, square in squares.items()}


@torch.no_grad()
def input_grams(
    lm: Any, rollouts: Iterator[Rollout], parameters: Mapping[str, str], reading: Reading
) -> dict[str, Tensor]:
    """G = 1/N Σ x·xᵀ over the inputs x of each linear layer. RegMean (arXiv 2212.09849), eq. 2, per token.

    By tensor, [I, I]; `parameters` as above.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(tensor: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_NI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[tensor] = sums.get(tensor, 0.0) + x_NI.T @ x_NI
            counts[tensor] = counts.get(tensor, 0) + len(x_NI)

        return add

    with ExitStack() as stack:
        for name, module in lm.named_modules():
            tensor = parameters.get(f"{name}.weight")
            if tensor is not None and isinstance(module, nn.Linear):
                handle = module.register_forward_pre_hook(hook(tensor))
                stack.callback(handle.remove)
        for rollout in rollouts:
            lm(**reading(rollout), use_cache=False)
    return {tensor: total / counts[tensor] for tensor, total in sums.items()}


def _sequence_logprob(lm: Any, rollout: Rollout, reading: Reading) -> Tensor:
    logits_TV = lm(**reading(rollout), use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
    never = torch.tensor(placeholder_ids(lm.config), dtype=torch.int64)
    logprobs_TV = logits_TV.index_fill(-1, never, -torch.inf).log_softmax(-1)
    logprob: Tensor = logprobs_TV.gather(-1, rollout.response_ids[:, None]).sum()
    return logprob


def _config(base: Base, parent: Parent) -> ModelConfig:
    return ModelConfig(path=str(parent.folder if parent.kind == "model" else base.folder))


def _load(base: Base, parent: Parent) -> tuple[Any, Reading]:
    config = _config(base, parent)
    processor = load_processor(config, needed=False)
    lm = load_lm(config, load_tokenizer(config, processor), torch.float32)
    lm = (lm if parent.kind == "model" else with_saved_adapter(lm, parent.folder)).eval()
    vision = None if processor is None else Vision(processor, lm)

    def reading(rollout: Rollout) -> dict[str, Tensor]:
        ids_S = torch.cat([rollout.prompt_ids, rollout.response_ids])
        shown = [(rollout.prompt_ids.tolist(), rollout.images)]
        return {"input_ids": ids_S[None]} | ({} if vision is None else vision.inputs(shown, len(ids_S)))

    return lm, reading


def _counted(rollouts: Sequence[Rollout], done: Callable[[], None]) -> Iterator[Rollout]:
    for rollout in rollouts:
        yield rollout
        done()
