"""Images as a model reads them: from references to the further inputs of its forward, whatever its family.

What a processor gives beside token ids and mask is of two kinds. Inputs with a value for each token (token_type_ids,
mm_token_type_ids) follow from the token ids; the others (pixels, sizes, grids) are of the images, one image after the
other along the first dimension. Pixels are computed where they are needed and kept for a short while only.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remix.errors import first_line
from remix.tasks.images import open_image

KEPT_BYTES = 256 << 20
"""Of images' inputs, the latest used."""
OF_TEXT = ("input_ids", "attention_mask")

Shown = tuple[Sequence[int], tuple[str, ...]]
"""Token ids of a prompt and the references of its images."""


class Vision:
    """A model's processor, and what is known of it after one look at a blank image."""

    def __init__(self, processor: Any, lm: Any) -> None:
        """`lm`: the transformers model. Raises ValueError where the processor has nothing for its forward."""
        self.processor = processor
        lm = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        taken = inspect.signature(getattr(lm, lm.base_model_prefix).forward).parameters
        blank = self._processed([np.zeros((64, 64, 3), np.uint8)])
        ids = blank["input_ids"]
        further = {name: value for name, value in blank.items() if name in taken and name not in OF_TEXT}
        types = {name: value for name, value in further.items() if value.shape == ids.shape}
        self._of_images = further.keys() - types.keys()
        if not self._of_images:
            raise ValueError(_REFUSED.format(processor=type(processor).__name__, why="it makes nothing of an image"))
        self._types = {
            name: dict(zip(ids[0].tolist(), value[0].tolist(), strict=True)) for name, value in types.items()
        }
        """By input and token id; 0 for the tokens of text."""
        self._of_responses = {name: _of_generated(lm, name, value) for name, value in types.items()}
        self._kept: OrderedDict[tuple[str, ...], dict[str, Tensor]] = OrderedDict()
        self._kept_bytes = 0

    @property
    def has_token_types(self) -> bool:
        """Whether the model is told of each token what it is."""
        return bool(self._types)

    def inputs(self, prompts: Sequence[Shown], width: int, *, on_the_left: bool = False) -> dict[str, Tensor]:
        """The further inputs, by argument, for sequences of `width` tokens that begin with these prompts.

        Responses and padding follow them, or under `on_the_left` padding stands before them and nothing follows.
        """
        found = {}
        for name, of_token in self._types.items():
            found[name] = torch.full((len(prompts), width), 0 if on_the_left else self._of_responses[name])
            for row, (token_ids, _) in zip(found[name], prompts, strict=True):
                start = width - len(token_ids) if on_the_left else 0
                row[start : start + len(token_ids)] = torch.tensor([of_token.get(int(i), 0) for i in token_ids])
        shown = [self._of(images) for _, images in prompts if images]
        for name in sorted(self._of_images) if shown else ():
            found[name] = _one_after_the_other([one[name] for one in shown])
        return found

    def _of(self, images: tuple[str, ...]) -> dict[str, Tensor]:
        """The inputs that are of these images; kept, since the responses of a group share them."""
        if images not in self._kept:
            processed = self._processed([open_image(reference) for reference in images])
            self._kept[images] = {name: processed[name] for name in self._of_images}
            self._kept_bytes += _bytes(self._kept[images])
        self._kept.move_to_end(images)
        while len(self._kept) > 1 and self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= _bytes(self._kept.popitem(last=False)[1])
        return self._kept[images]

    def _processed(self, images: list[Any]) -> dict[str, Tensor]:
        try:
            text = str(self.processor.image_token) * len(images)
            return dict(self.processor(text=[text], images=[images], return_tensors="pt"))
        except (AttributeError, TypeError, ValueError, ImportError) as error:
            raise ValueError(_REFUSED.format(processor=type(self.processor).__name__, why=first_line(error))) from error


class Places:
    """The places of images within token ids, as one token or few each, the way an engine wants them that expands them
    by itself."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._lengths: dict[str, tuple[list[int], list[int]]] = {}

    def unexpanded(self, token_ids: Sequence[int], images: Sequence[str]) -> list[int]:
        """Token ids with the placeholders of the prompt's text in the images' places. Raises ValueError."""
        left, found = list(token_ids), list[int]()
        for image in images:
            expanded, placeholder = self._of(image)
            start = next((i for i in range(len(left)) if left[i : i + len(expanded)] == expanded), None)
            if start is None:
                raise ValueError(
                    f"the processor {type(self.processor).__name__} puts an image in its place in a way that the vLLM "
                    "engine is not told of: sample with transformers (rollout.engine.type: hf)"
                )
            found += [*left[:start], *placeholder]
            left = left[start + len(expanded) :]
        return found + left

    def _of(self, image: str) -> tuple[list[int], list[int]]:
        """What stands for it in the token ids, and what for its placeholder."""
        if image not in self._lengths:
            text = str(self.processor.image_token)
            plain = {"add_special_tokens": False}
            seen = self.processor(text=[text], images=[[open_image(image)]], **plain)["input_ids"][0]
            placeholder = self.processor.tokenizer([text], **plain)["input_ids"][0]
            self._lengths[image] = [int(token) for token in seen], list(placeholder)
        return self._lengths[image]


def check_vllm(model: str) -> None:
    """Raises ValueError where vLLM cannot be asked about images, though it may be installed."""
    if find_spec("torchvision") is None:
        raise ValueError(
            f"model {model}: vLLM's vision-language models need torchvision, which is not installed (a CPU set-up "
            "leaves it out, since its registry builds need CUDA): sample with transformers "
            "(rollout.engine.type: hf, or --engine hf)"
        )


_REFUSED = (
    "the processor {processor} reads no images ({why}); the model needs one of image and text together, as "
    "AutoProcessor loads it from the model's folder (processor_config.json or preprocessor_config.json)"
)


def _of_generated(lm: Any, name: str, of_prompt: Tensor) -> int:
    """The value that the model itself gives to a token which it generates."""
    return int(lm._update_model_kwargs_for_generation({}, {name: of_prompt})[name][0, -1])


def _one_after_the_other(tensors: Sequence[Tensor]) -> Tensor:
    """Along the first dimension; smaller ones filled up with zeros, as processors do within a batch of theirs."""
    size = [max(lengths) for lengths in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = [tensor.new_zeros(len(tensor), *size) for tensor in tensors]
    for whole, tensor in zip(filled, tensors, strict=True):
        whole[tuple(slice(length) for length in tensor.shape)] = tensor
    return torch.cat(filled)


def _bytes(inputs: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in inputs.values())
