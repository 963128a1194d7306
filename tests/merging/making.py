"""Parents of merges, made by PEFT and transformers alone, and what these say a merge is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from remix import cli


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"],
                         "task_type": "CAUSAL_LM", **changes})  # fmt: skip


def make_adapter(
    base: Path, folder: Path, config: Any, *, seed: int, auto: Any = AutoModelForCausalLM, by: float = 0.3
) -> Path:
    """A trained adapter, as far as a merge can tell: every weight of it is far from where it began."""
    lm = get_peft_model(auto.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (parameter for parameter in lm.parameters() if parameter.requires_grad):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += by * noise * (parameter.detach().abs().mean() + 0.1)
    lm.save_pretrained(folder)
    return folder


def make_model(base: Path, folder: Path, *, seed: int, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """The base, every weight of it moved a little."""
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lm.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    lm.to(dtype).save_pretrained(folder, **saving)
    return folder


def merged_by_peft(base: Path, adapter: Path, auto: Any = AutoModelForCausalLM) -> dict[str, Tensor]:
    lm = PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32), adapter).merge_and_unload()
    return {name: tensor.clone() for name, tensor in lm.state_dict().items()}


def state_of(folder: Path, adapter: Path | None = None, auto: Any = AutoModelForCausalLM) -> dict[str, Tensor]:
    """As from_pretrained reads it."""
    if adapter is not None:
        return merged_by_peft(folder, adapter, auto)
    return dict(auto.from_pretrained(folder, dtype=torch.float32).state_dict())


def stored(folder: Path) -> dict[str, Tensor]:
    """As it lies on the disk."""
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def remix_merge(
    out: Path, base: Path, method: str, parents: list[Path], *options: str, kind: str = "--adapters"
) -> int:
    words = ["merge", "--base", str(base), kind, *map(str, parents), "--method", method, "--out", str(out)]
    return cli.main([*words, *options])


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=lambda text, at=name: f"{at}: {text}")


def assert_identical(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """To the bit: equality takes 0 and -0 for the same."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name
