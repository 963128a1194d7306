"""PEFT's adapters on a model: made, folded in, saved and read. The only door for PEFT."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from remix.config import (
    AdapterConfig,
    IA3Adapter,
    LayersAdapter,
    LoraAdapter,
    NoAdapter,
    PrefixAdapter,
    PromptAdapter,
    VLLMEngineConfig,
)
from remix.durable import write_json
from remix.errors import first_line
from remix.models import files
from remix.models.adapter_files import VIRTUAL
from remix.models.layers import trained_layers
from remix.models.naming import as_saved
from remix.models.parts import Holding, at_hand, shape_of

ADAPTER = "policy_adapter"
"""PEFT matches adapter names against parts of parameter paths when it saves, so the name must be unmistakable."""

MERGEABLE = frozenset(
    {"ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT"}
    | {"RANDLORA", "ROAD", "SHIRA", "VBLORA", "VERA"}
)
"""PEFT's types whose whole effect is on the weights. Others may name further models and tokenizers to load."""


# --- a fresh adapter, or one to go on from ------------------------------------------------------------------------


def add_adapter(lm: Any, config: AdapterConfig) -> Any:
    """The model with an adapter on it, as PEFT builds it: fresh, or as it was saved in `config.path`.

    Without one, the model as it is. Raises ValueError where the adapter does not fit the model.
    """
    if isinstance(config, NoAdapter):
        return lm
    from peft import get_peft_model

    trained = trained_layers(lm, config) if isinstance(config, LayersAdapter) else {}
    key = f"adapter.targets {config.targets}" if isinstance(config, LoraAdapter | IA3Adapter) else "adapter"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # of norms, whose widths PEFT does not need
            adapted = get_peft_model(lm, _peft_config(config, list(trained)), adapter_name=ADAPTER)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: {error}") from error
    if isinstance(config, PromptAdapter) and config.init == "random":
        # PEFT draws them from N(0, 1), up to fifty times as wide as embeddings are.
        with torch.no_grad():
            adapted.prompt_encoder[ADAPTER].embedding.weight.mul_(lm.get_input_embeddings().weight.float().std())
    if isinstance(config, LayersAdapter):
        _train_copies(adapted, trained)
    elif {lm.get_input_embeddings(), lm.get_output_embeddings()} & set(_adapter_layers(adapted)):
        # Log-probs are computed from the head's own weight, which the embedding may share.
        raise ValueError(f"{key}: leave out the embedding and the output head")
    if config.path is not None:
        _, weights = _read(Path(config.path), f"adapter.path {config.path}")
        _put(adapted, weights, f"adapter.path {config.path}: it does not fit the recipe's model and adapter")
    return adapted


def _peft_config(config: AdapterConfig, layers: list[str]) -> Any:
    from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig

    task = "CAUSAL_LM"
    match config:
        case LoraAdapter():
            return LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
                use_rslora=config.rslora,
                use_dora=config.dora,
                task_type=task,
            )
        case IA3Adapter():
            feedforward = list(config.feedforward)
            return IA3Config(target_modules=list(config.targets), feedforward_modules=feedforward, task_type=task)
        case PrefixAdapter():
            init = "zero" if config.init == "zero" else None
            return PrefixTuningConfig(num_virtual_tokens=config.tokens, init_weights=init, task_type=task)
        case PromptAdapter():
            init = "SAMPLE_VOCAB" if config.init == "vocabulary" else "RANDOM"
            return PromptTuningConfig(num_virtual_tokens=config.tokens, prompt_tuning_init=init, task_type=task)
    return LNTuningConfig(target_modules=layers, task_type=task)


def _train_copies(adapted: Any, whole: Mapping[str, bool]) -> None:
    """PEFT trains copies of whole layers. Where only a bias is to be trained, all else is the layer's own again."""
    layers = {name.removeprefix("base_model.model."): layer for name, layer in adapted.named_modules()}
    assert sum(layer in set(_adapter_layers(adapted)) for layer in layers.values()) == len(whole)
    for name, all_of_it in whole.items():
        copy, own = layers[name].ln_tuning_layers[ADAPTER], layers[name].base_layer
        for parameter_name, parameter in list(copy.named_parameters()):
            if all_of_it or parameter_name == "bias":
                parameter.data = parameter.data.float()  # what is trained is kept in float32
            else:
                setattr(copy, parameter_name, own.get_parameter(parameter_name))


# --- where an adapter has a say in the forward --------------------------------------------------------------------


def backbone_inputs(lm: Any, input_ids_BS: Tensor) -> tuple[dict[str, Any], int]:
    """What the backbone is called with, and how many positions of its output come before the first token."""
    if not has_virtual_tokens(lm):
        return {"input_ids": input_ids_BS}, 0
    before = lm.get_prompt(batch_size=len(input_ids_BS))
    if lm.active_peft_config.peft_type == "PREFIX_TUNING":
        return {"input_ids": input_ids_BS, "past_key_values": before}, 0
    # Not PEFT's `word_embeddings`: the first weight with as many rows as there are tokens, whatever it is.
    embedded = lm.get_base_model().get_input_embeddings()(input_ids_BS)
    return {"inputs_embeds": torch.cat([before.to(embedded.dtype), embedded], 1)}, before.shape[1]


def generation_inputs(lm: Any, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> tuple[Any, dict[str, Any], int]:
    """The model to ask, what its `generate` is called with, and how many tokens of the answer are no new ones.

    PEFT's own `generate` counts padding on the left as positions after virtual tokens. Handed over as inputs of the
    base model, they have the positions that they have in training.
    """
    if not has_virtual_tokens(lm):
        return lm, {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS}, input_ids_BS.shape[1]
    tokens = lm.active_peft_config.num_virtual_tokens
    ahead = attention_mask_BS.new_ones(len(input_ids_BS), tokens)
    inputs, _ = backbone_inputs(lm, input_ids_BS)
    inputs["attention_mask"] = torch.cat([ahead, attention_mask_BS], 1)
    if "inputs_embeds" in inputs:
        return lm.get_base_model(), inputs, 0
    # What is in the cache already is passed over, whatever its ids.
    inputs["input_ids"] = torch.cat([ahead, input_ids_BS], 1)
    return lm.get_base_model(), inputs, tokens + input_ids_BS.shape[1]


def output_head(head: Any) -> nn.Linear:
    """The head whose weight makes the logits: the trained copy, where `layers` has one."""
    copies = getattr(head, "ln_tuning_layers", None)
    chosen: nn.Linear = head if copies is None else copies[ADAPTER]
    return chosen


def has_virtual_tokens(lm: Any) -> bool:
    """Whether its adapter puts tokens of its own before every sequence."""
    return hasattr(lm, "get_base_model") and bool(lm.active_peft_config.is_prompt_learning)


@dataclass(frozen=True, slots=True)
class TrainedShare:
    """How much of the policy is trained, without any critic."""

    trained: int
    """Parameters."""
    parameters: int
    """Those of the base model and the adapter's."""

    @property
    def share(self) -> float:
        return self.trained / self.parameters

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.parameters:,} parameters of the policy ({self.share:.3%})"


def trained_share(lm: nn.Module) -> TrainedShare:
    sizes = [(shape_of(parameter).numel(), parameter.requires_grad) for parameter in lm.parameters()]
    return TrainedShare(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


# --- an adapter's weights, by themselves and in the model's -------------------------------------------------------


def merge_adapter(lm: Any) -> None:
    """Folds a LoRA or (IA)³ into the base weights and makes it a fresh one. The policy stays the same policy."""
    lm.merge_adapter(adapter_names=[ADAPTER])
    for layer in _adapter_layers(lm):
        layer.merged_adapters.clear()
        if hasattr(layer, "ia3_l"):
            layer.reset_ia3_parameters(ADAPTER)
        else:
            layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


def engine_weights(lm: Any, engine: Any, holding: Holding = at_hand) -> Iterator[tuple[str, Tensor]]:
    """What an engine is handed when the policy has changed: the adapter alone, or a checkpoint's weights."""
    if isinstance(engine, VLLMEngineConfig) and engine.lora == "hot_swap":
        return adapter_weights(lm, holding)
    return checkpoint_weights(lm, holding)


def adapter_weights(lm: Any, holding: Holding = at_hand) -> Iterator[tuple[str, Tensor]]:
    """The weights of a LoRA under the names that they have in PEFT's files."""
    for name, parameter in lm.named_parameters():
        if f".{ADAPTER}." in name:
            with holding([lm.get_submodule(name.rpartition(".")[0])]):
                tensor = parameter.detach()
            yield name.replace(f".{ADAPTER}.", "."), tensor


def adapter_config(lm: Any) -> dict[str, Any]:
    """Of a LoRA, as in PEFT's adapter_config.json."""
    config = lm.peft_config[ADAPTER]
    plain = {"r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora, "peft_type": "LORA"}
    targets = config.target_modules
    return {**plain, "target_modules": targets if isinstance(targets, str) else sorted(targets)}


def checkpoint_weights(lm: Any, holding: Holding = at_hand) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights under the names of its base model's checkpoint, the adapter merged in.

    Lazily, one layer at a time; the model in training is left as it was, bit for bit.
    """
    yield from as_saved(lm.get_base_model() if hasattr(lm, "get_base_model") else lm, _module_weights(lm, holding))


def _module_weights(lm: Any, holding: Holding = at_hand) -> Iterator[tuple[str, Tensor]]:
    """The same under the names of the base model's modules."""

    def own(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        with holding([lm.get_submodule(owner)]):
            tensor: Tensor = getattr(lm.get_submodule(owner), leaf).detach()
        return tensor

    if not hasattr(lm, "get_base_model"):
        yield from ((name, own(name)) for name in lm.state_dict())
        return
    assert not has_virtual_tokens(lm), "virtual tokens are no part of any weight"
    adapted = set(_adapter_layers(lm))
    layers = {name: layer for name, layer in lm.named_modules() if layer in adapted}
    current, merged = "", dict[str, Tensor]()
    for name in lm.state_dict():
        if f".{ADAPTER}." in f"{name}." or ".lora_" in name:
            continue
        layer, _, leaf = name.rpartition(".base_layer.")
        if layer in layers and layer != current:
            with holding([layers[layer]]):
                current, merged = layer, _merged(layers[layer])
        public = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if layer in layers:
            yield public, merged[leaf].to(getattr(layers[layer].get_base_layer(), leaf).dtype)
        else:
            yield public, own(name)


def _merged(layer: Any) -> dict[str, Tensor]:
    """What a layer's own weights become when the adapter is folded in, by name; they stay what they are."""
    if hasattr(layer, "ln_tuning_layers"):
        return {name: p.detach() for name, p in layer.ln_tuning_layers[ADAPTER].named_parameters()}
    own = dict(layer.get_base_layer().named_parameters())
    before = {name: parameter.data for name, parameter in own.items()}
    for name, parameter in own.items():
        parameter.data = before[name].clone()
    layer.merge(adapter_names=[ADAPTER])
    merged = {name: parameter.data for name, parameter in own.items()}
    # Taking the delta back out would leave rounding behind.
    for name, parameter in own.items():
        parameter.data = before[name]
    layer.merged_adapters.clear()
    return merged


def _adapter_layers(lm: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]


# --- files --------------------------------------------------------------------------------------------------------


def save_model(lm: Any, reader: Any, folder: Path, *, base_changed: bool) -> None:
    """A standard checkpoint, or a standard PEFT adapter where the base weights are still the base model's own.

    `reader`: the model's tokenizer, or the processor that holds it.
    """
    if hasattr(lm, "get_base_model") and base_changed:
        lm.get_base_model().save_pretrained(folder, state_dict=dict(_module_weights(lm)))
    elif hasattr(lm, "get_base_model"):
        # Under its default name, where PEFT puts it into the folder itself and every reader looks for it.
        lm.save_pretrained(folder, selected_adapters=[ADAPTER], save_embedding_layers=False)
        _lift_adapter(folder)
        _check_saved(lm, folder)
    else:
        lm.save_pretrained(folder)
    reader.save_pretrained(folder)


_SETS = ("target_modules", "exclude_modules", "feedforward_modules")


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


def _check_saved(lm: Any, folder: Path) -> None:
    """PEFT saves an empty adapter without a word where it does not recognise its own names."""
    with safe_open(str(folder / files.ADAPTER_WEIGHTS), "pt") as saved:
        written = sum(math.prod(saved.get_slice(name).get_shape()) for name in saved.keys())  # noqa: SIM118
    assert written >= trained_share(lm).trained, f"{folder}: PEFT saved {written} numbers of the adapter"


def with_saved_adapter(lm: Any, folder: Path) -> Any:
    """The model with a saved PEFT adapter: folded in, or, where it lies before the tokens, beside the weights.

    Raises ValueError where it does not fit.
    """
    from peft import PeftModel

    config, weights = _read(folder, f"the adapter {folder}")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in MERGEABLE and kind not in VIRTUAL:
        raise ValueError(f"the adapter {folder}: a {kind} adapter cannot be merged into the weights")
    config.inference_mode = True
    if getattr(config, "megatron_config", None):
        config.megatron_config = None  # with it PEFT imports whatever module the file names
    if kind in VIRTUAL:
        # What the file says of the model is taken from the model, and no tokenizer that it names is loaded.
        config.prompt_tuning_init = "RANDOM"
        config.num_layers = config.token_dim = config.num_attention_heads = config.num_transformer_submodules = None
    wrong = f"the adapter {folder} does not fit this model, so it was trained on another"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            adapted = PeftModel(lm, config, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:  # no such layers
        raise ValueError(f"{wrong}: {first_line(error)}") from error
    _put(adapted, weights, wrong)
    return adapted if kind in VIRTUAL else adapted.merge_and_unload()


def load_adapter(lm: Any, folder: Path) -> None:
    """A saved adapter of the same kind and shape in place of the model's own. Raises ValueError."""
    _, weights = _read(folder, f"the adapter {folder}")
    _put(lm, weights, f"the adapter {folder} is not of this model's kind and shape")


def _read(folder: Path, what: str) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of a saved adapter. Raises ValueError."""
    from peft import PeftConfig, load_peft_weights

    files.check_adapter(folder)  # PEFT would go on to look for a pickle
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{what}: not a saved PEFT adapter ({first_line(error)})") from error
    if not weights:
        raise ValueError(f"{what}: it holds no weights")
    return config, weights


def _put(adapted: Any, weights: Mapping[str, Tensor], wrong: str) -> None:
    """Raises ValueError, which begins with `wrong`, where names or shapes are not the adapter's."""
    from peft import set_peft_model_state_dict

    names = {"prompt_embeddings"} if has_virtual_tokens(adapted) else set()
    try:
        loaded = set_peft_model_state_dict(adapted, dict(weights), adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:  # of another shape
        detail = next((line for line in str(error).splitlines() if "size mismatch" in line), first_line(error))
        raise ValueError(f"{wrong}: {detail.strip()}") from error
    missing = [name for name in loaded.missing_keys if f".{ADAPTER}." in f"{name}." and not names]
    odd = [*(name for name in loaded.unexpected_keys if name not in names), *missing]
    if odd:
        raise ValueError(f"{wrong}: {odd[0]} and {len(odd) - 1} more weights are on one side only")
