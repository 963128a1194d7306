"""PEFT's adapters on a model: made, folded in, saved and read. The only door for PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from remix.config import LoraAdapter, NoAdapter
from remix.durable import write_json
from remix.errors import first_line
from remix.models import files
from remix.models.naming import as_saved

ADAPTER = "policy_adapter"


"""PEFT matches adapter names against parts of parameter paths when it saves, so the name must be unmistakable."""


MERGEABLE = frozenset(
    {"ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT"}
    | {"RANDLORA", "ROAD", "SHIRA", "VBLORA", "VERA"}
)


"""PEFT's types whose whole effect is on the weights. Others may name further models and tokenizers to load."""


def merge_saved_adapter(lm: Any, folder: Path) -> Any:
    """The model with a saved PEFT adapter folded into its weights. Raises ValueError where it does not fit."""
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    wrong = f"the adapter {folder} does not fit this model, so it was trained on another"
    files.check_adapter(folder)  # PEFT would go on to look for a pickle
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the adapter {folder}: not a saved PEFT adapter ({first_line(error)})") from error
    if not weights:
        raise ValueError(f"the adapter {folder}: it holds no weights")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in MERGEABLE:
        raise ValueError(f"the adapter {folder}: a {kind} adapter cannot be merged into the weights")
    config.inference_mode = True
    if getattr(config, "megatron_config", None):
        config.megatron_config = None  # with it PEFT imports whatever module the file names
    try:
        adapted = PeftModel(lm, config, adapter_name=ADAPTER)
        loaded = set_peft_model_state_dict(adapted, weights, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:  # no such layers, or of another shape
        detail = next((line for line in str(error).splitlines() if "size mismatch" in line), first_line(error))
        raise ValueError(f"{wrong}: {detail.strip()}") from error
    missing = [name for name in loaded.missing_keys if f".{ADAPTER}" in name]
    if loaded.unexpected_keys or missing:
        odd = [*loaded.unexpected_keys, *missing]
        raise ValueError(f"{wrong}: {odd[0]} and {len(odd) - 1} more weights are on one side only")
    return adapted.merge_and_unload()


def add_adapter(lm: Any, config: NoAdapter | LoraAdapter) -> Any:
    """The model with a fresh adapter on it, as PEFT builds it; without one, the model as it is."""
    if isinstance(config, NoAdapter):
        return lm
    from peft import LoraConfig, get_peft_model

    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(lm, lora, adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"adapter.targets {config.targets}: {error}") from error
    embeddings = {lm.get_input_embeddings(), lm.get_output_embeddings()}
    if embeddings & set(_adapter_layers(adapted)):
        # Log-probs are computed from the head's own weight, which the embedding may share.
        raise ValueError(f"adapter.targets {config.targets}: leave out the embedding and the output head")
    return adapted


def merge_adapter(lm: Any) -> None:
    """Folds the LoRA into the base weights and makes it a fresh one, B = 0. The policy stays the same policy."""
    lm.merge_adapter(adapter_names=[ADAPTER])
    for layer in _adapter_layers(lm):
        layer.merged_adapters.clear()
        layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


def checkpoint_weights(lm: Any) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights under the names of its base model's checkpoint, the adapter merged in.

    Lazily, one layer at a time; the model in training is left as it was, bit for bit.
    """
    yield from as_saved(lm.get_base_model() if hasattr(lm, "get_base_model") else lm, _module_weights(lm))


def _module_weights(lm: Any) -> Iterator[tuple[str, Tensor]]:
    """The same under the names of the base model's modules."""
    if not hasattr(lm, "get_base_model"):
        yield from ((name, tensor.detach()) for name, tensor in lm.state_dict().items())
        return
    adapted = set(_adapter_layers(lm))
    merged = {f"{name}.base_layer.weight": layer for name, layer in lm.named_modules() if layer in adapted}
    for name, tensor in lm.state_dict().items():
        if f".{ADAPTER}." in f"{name}." or ".lora_" in name:
            continue
        public = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        yield public, _merged_weight(merged[name]) if name in merged else tensor.detach()


def save_model(lm: Any, reader: Any, folder: Path, *, base_changed: bool) -> None:
    """A standard checkpoint, or a standard PEFT adapter where the base weights are still the base model's own.

    `reader`: the model's tokenizer, or the processor that holds it.
    """
    if hasattr(lm, "get_base_model") and base_changed:
        lm.get_base_model().save_pretrained(folder, state_dict=dict(_module_weights(lm)))
    elif hasattr(lm, "get_base_model"):
        # Under its default name, where PEFT puts it into the folder itself and every reader looks for it.
        lm.save_pretrained(folder, selected_adapters=[ADAPTER])
        _lift_adapter(folder)
    else:
        lm.save_pretrained(folder)
    reader.save_pretrained(folder)


_SETS = ("target_modules", "exclude_modules")


def _lift_adapter(folder: Path) -> None:
    nested = folder / ADAPTER
    for file in nested.iterdir():
        file.replace(folder / file.name)
    nested.rmdir()
    # PEFT writes sets in whatever order they have in this process.
    path = folder / files.ADAPTER_CONFIG
    config = {
        k: sorted(v) if k in _SETS and isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()
    }
    write_json(path, config)


def _merged_weight(layer: Any) -> Tensor:
    base = layer.get_base_layer().weight
    before = base.detach().clone()
    layer.merge(adapter_names=[ADAPTER])
    merged: Tensor = layer.get_base_layer().weight.detach().clone()
    layer.unmerge()
    # Subtracting the delta again would leave rounding behind.
    base.data.copy_(before)
    return merged


def _adapter_layers(lm: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]
