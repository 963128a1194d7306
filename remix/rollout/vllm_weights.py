"""How vLLM takes over a policy's weights: which they are, in process; and as files, in a server's workers.

A server's workers load this module as the home of their extension, by which it has registered its way of transfer
before they build their model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.inplace import reload_weights

BACKEND = "remix_files"
"""The name of the transfer by files, as `--weight-transfer-config` has it."""
EXTENSION = f"{__name__}.WorkerExtension"

NOT_TRAINED = re.compile(r"rotary_emb\.inv_freq$|^mtp\.")
"""Tensors that some checkpoints carry and no policy trains: old rotary buffers, multi-token prediction heads."""


class Expected:
    """The weights that a sync must bring: all of the checkpoint that an engine was built from, by name and shape."""

    def __init__(self, vllm_config: Any, model: nn.Module) -> None:
        """Reads headers; the values stay on disk."""
        loader = get_model_loader(vllm_config.load_config)
        found = {name: tensor.shape for name, tensor in loader.get_all_weights(vllm_config.model_config, model)}
        self.shapes = {name: shape for name, shape in found.items() if not NOT_TRAINED.search(name)}
        self.checkpoint: str = vllm_config.model_config.model
        self._head_is_tied = bool(tied_heads(model))

    def checked(self, shapes: Iterable[tuple[str, Sequence[int]]]) -> Iterator[str]:
        """The names of those to take over. Raises ValueError for an unknown, misshapen and, at the end, missing one."""
        missing = {name for name in self.shapes if not self._is_tied_head(name)}
        for name, shape in shapes:
            if self._is_tied_head(name):
                continue  # the embedding brings it
            if name not in self.shapes:
                near = difflib.get_close_matches(name, self.shapes, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"Weight sync: {name!r} is no weight of the checkpoint {self.checkpoint}.{hint}")
            if tuple(shape) != tuple(self.shapes[name]):
                raise ValueError(
                    f"Weight sync: {name!r} has shape {tuple(shape)}, "
                    f"in the checkpoint {self.checkpoint} it has {tuple(self.shapes[name])}."
                )
            missing.discard(name)
            yield name
        if missing:
            raise ValueError(
                f"Weight sync: {len(missing)} of {len(self.shapes)} weights of the checkpoint {self.checkpoint} "
                f"did not come, for example {', '.join(sorted(missing)[:5])}."
            )

    def _is_tied_head(self, name: str) -> bool:
        return self._head_is_tied and name.endswith("lm_head.weight")


def tied_heads(model: nn.Module) -> list[Any]:
    """Output heads that share their weight with an embedding."""
    layers = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [layer for layer in layers if isinstance(layer, ParallelLMHead)]
    return [head for head in heads if any(layer is not head and layer.weight is head.weight for layer in layers)]


def repack_tied_heads(model: nn.Module) -> None:
    for head in tied_heads(model):
        # Without a weight of its own to reload, it keeps on a CPU the packed copy that vLLM made of the old one.
        head.quant_method.process_weights_after_loading(head)


# --- in a server's workers ---


@dataclass
class NothingToInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Files need no rendezvous."""


@dataclass
class Files(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where the weights lie."""

    paths: list[str]
    """Of safetensors files, which hold all of them together."""


class FileTransfer(WeightTransferEngine[NothingToInit, Files]):  # type: ignore[misc]
    """Takes whole checkpoints out of files that trainer and server both see. A transfer over NCCL is another class
    beside this one, under another name."""

    init_info_cls = NothingToInit
    update_info_cls = Files
    supports_draft_weight_update = False

    _expected: Expected | None = None

    def init_transfer_engine(self, init_info: NothingToInit) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Changes nothing where the weights are not those of the checkpoint, which raises ValueError."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Files) -> None:
        self._expected = self._expected or Expected(self.vllm_config, self.model)
        try:
            names = list(self._expected.checked(_shapes(update_info.paths)))
        except FileNotFoundError:
            raise ValueError(
                "Weight sync: the server does not see the folder of the weights: set rollout.engine.transfer to one "
                "that trainer and servers see."
            ) from None
        # All at once: what was begun and not brought to its end would leave a mixture.
        weights = _tensors(update_info.paths, frozenset(names))
        reload_weights(self.vllm_config, self.model, weights, weights_path=None, is_checkpoint_format=True)
        repack_tied_heads(self.model)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _shapes(paths: Sequence[str]) -> Iterator[tuple[str, Sequence[int]]]:
    for path in paths:
        with safe_open(path, "pt") as opened:
            yield from ((name, opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 - no mapping


def _tensors(paths: Sequence[str], names: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in names:
                    # vLLM holds on to the tensors of a layer until the last of them has come.
                    yield name, opened.get_tensor(name).clone()


class WorkerExtension:
    """Adds nothing to vLLM's worker, but for having loaded this module."""


WeightTransferEngineFactory.register_engine(BACKEND, FileTransfer)
