"""The engine's own loop against transformers' `generate`, over families of models: the same draws and log-probs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from remix.rollout import hf_decode
from remix.rollout.hf import HFEngine
from remix.rollout.hf_cache import SHARED
from remix.types import Request, Sampling

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.4,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "one key for all heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "gemma": GemmaConfig(**SIZES),
    # Logits are capped, scores too but under sdpa, and every other layer looks back a window.
    "gemma2": Gemma2Config(**SIZES, sliding_window=128, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma2, eager": Gemma2Config(**SIZES, sliding_window=128, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=128, layer_types=["sliding_attention", "full_attention"]),
    "mistral": MistralConfig(**SIZES, sliding_window=128),
}
LONG = SHARED + 8
PROMPTS = [(3,), (4, 5, 6), (4, 5, 6), (9, 10, 11, 12, 13), (0, 4, 5, 6)]
LONG_PROMPTS = [tuple(2 + (i * k) % 37 for i in range(LONG - 5 * k)) for k in (1, 1, 2, 1, 2)]


def engine_of(config: Any, eos: Sequence[int] = (1,), attention: str = "sdpa") -> HFEngine:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    lm.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return HFEngine(
        lm.eval(), eos_token_ids=eos, batch_size=8, device=torch.device("cpu"), autocast=nullcontext, never=[7]
    )


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest) -> HFEngine:
    return engine_of(FAMILIES[request.param], attention="eager" if "eager" in request.param else "sdpa")


def requests(prompts: Sequence[tuple[int, ...]]) -> list[Request]:
    return [Request(prompt, seed) for seed, prompt in enumerate(prompts, start=20)]


@torch.no_grad()
def check(engine: HFEngine, asked: Sequence[Request], sampling: Sampling) -> list[int]:
    """Lengths of the responses."""
    longest = max(len(request.prompt_ids) for request in asked) + sampling.max_tokens
    assert engine._decodes(asked, longest), "it is not what is tested otherwise"
    plain = zip(*(rows.cpu() for rows in engine._generated(asked, sampling)), strict=True)
    responses = engine.generate(asked, sampling)
    for response, row in zip(responses, plain, strict=True):
        expected = engine._completion(*row)
        assert response.response_ids.tolist() == expected.response_ids.tolist()
        assert response.finish_reason == expected.finish_reason
        torch.testing.assert_close(response.sampler_logprobs, expected.sampler_logprobs, atol=2e-5, rtol=0)
        assert 7 not in response.response_ids
    return [len(response.response_ids) for response in responses]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(12, temperature=2.0), Sampling(6, temperature=0.0), Sampling(6, top_k=5, top_p=0.8), Sampling(1)],
)
@pytest.mark.parametrize("prompts", [PROMPTS, LONG_PROMPTS], ids=["short", "shared"])
def test_it_is_what_generate_makes(engine: HFEngine, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> None:
    lengths = check(engine, requests(prompts), sampling)
    assert max(lengths) == sampling.max_tokens or sampling.temperature == 0


def test_responses_that_end_leave_the_others_as_they_are() -> None:
    """Some at once, some later, of prompts that are shared and not; whole prompts leave with their responses."""
    for prompts in (PROMPTS, LONG_PROMPTS):
        engine = engine_of(FAMILIES["qwen2"], eos=range(1, 9))
        for first in (20, 60, 100):
            asked = [Request(prompt, first + i) for i, prompt in enumerate(prompts * 4)]
            lengths = check(engine, asked, Sampling(40, temperature=3.0))
            assert min(lengths) == 1
            assert len(set(lengths)) > 3


@pytest.mark.parametrize("prompts", [PROMPTS, LONG_PROMPTS], ids=["short", "shared"])
def test_those_that_wait_take_the_places_of_those_that_have_ended(
    prompts: Sequence[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more in work than may be, nearly always as many, and each as if it were alone."""
    engine = engine_of(FAMILIES["qwen2"], eos=range(1, 6))
    asked = [Request(prompt, 60 + i) for i, prompt in enumerate(prompts * 12)]
    engine.generate(asked[:2], Sampling(4))  # tries the model
    in_work, forward = list[int](), engine.lm.forward

    def watched(*arguments: Any, **inputs: Any) -> Any:
        if "decoding" in inputs:
            in_work.append(len(inputs["input_ids"]))
        return forward(*arguments, **inputs)

    monkeypatch.setattr(engine.lm, "forward", watched)
    together = engine.generate(asked, Sampling(30, temperature=3.0))
    alone = [engine.generate([request], Sampling(30, temperature=3.0))[0] for request in asked]
    for one, other in zip(together, alone, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        torch.testing.assert_close(one.sampler_logprobs, other.sampler_logprobs, atol=2e-5, rtol=0)
    batches = in_work[: -sum(len(response.response_ids) - 1 for response in alone)]
    lengths = [len(response.response_ids) for response in together]
    assert max(batches) == engine.batch_size
    # 60 responses, 8 at a time, take as many steps as there are tokens by 8, and at the end those of the last ones.
    assert len(batches) < sum(lengths) / 8 + max(lengths)
    one_after_the_other = sum(max(lengths[at : at + 8]) for at in range(0, 60, 8))
    assert len(batches) < 0.75 * one_after_the_other


def test_a_response_that_has_all_its_tokens_asks_for_no_further_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays in work beside others for a while, and learned positions end where the longest sequence does."""
    monkeypatch.setattr(hf_decode, "LEAVE", 2)
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=18, initializer_range=0.4)
    engine = engine_of(config, eos=range(1, 5))
    asked = [Request((3, 4, 5, 6, 7, 8), 20 + i) for i in range(60)]
    lengths = check(engine, asked, Sampling(12, temperature=3.0))
    assert lengths.count(12) > 3


def test_a_prompt_is_kept_once_and_read_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What long prompts take does not grow with the group."""
    kept = list[Any]()

    class Watched(hf_decode.Decoding):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            kept.append(self)

    monkeypatch.setattr(hf_decode, "Decoding", Watched)
    engine = engine_of(FAMILIES["llama"])
    asked = [Request(LONG_PROMPTS[0], seed) for seed in range(8)]
    engine.generate(asked, Sampling(9))
    keys, _ = kept[-1].shared.layers[0]
    assert keys.shape[0] == 1, "one prompt"
    assert keys.shape[2] == len(LONG_PROMPTS[0])
    widths = [layer.get_seq_length() for layer in kept[-1].layers]
    assert widths == [8, 8], "of a response its own tokens alone, the last one never read"


def test_attention_that_is_cut_short_is_left_to_generate() -> None:
    """A window smaller than the sequence, and sinks, of which the loop knows nothing."""
    windowed = engine_of(MistralConfig(**SIZES, sliding_window=16))
    asked = requests([tuple(range(2, 14)), (3, 4)])
    assert windowed._decodes(asked, 16)
    assert not windowed._decodes(asked, 17)
    sunk = engine_of(GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1), attention="eager")
    assert sunk._off_by(asked) == math.inf
    for engine in (windowed, sunk):
        together = engine.generate(asked, Sampling(12))
        for request, response in zip(asked, together, strict=True):
            (alone,) = engine.generate([request], Sampling(12))
            assert alone.response_ids.tolist() == response.response_ids.tolist()


def test_a_model_that_it_would_be_wrong_for_is_left_to_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by its log-probs, not by its name: here one that counts positions otherwise."""
    engine = engine_of(FAMILIES["qwen2"])
    own, asked = engine.lm.model.forward, requests(PROMPTS)

    def shifted(*arguments: Any, **inputs: Any) -> Any:
        if "decoding" in inputs:
            inputs["position_ids"] = inputs["position_ids"] * 2
        return own(*arguments, **inputs)

    expected = [response.response_ids.tolist() for response in engine.generate(asked, Sampling(6))]
    monkeypatch.setattr(engine.lm.model, "forward", shifted)
    again = replace_engine(engine)
    assert 1e-3 < again._off_by(asked) < math.inf
    assert [response.response_ids.tolist() for response in again.generate(asked, Sampling(6))] == expected


def replace_engine(engine: HFEngine) -> HFEngine:
    """One that has tried nothing yet, of the same model."""
    return HFEngine(engine.lm, eos_token_ids=[1], batch_size=8, device=torch.device("cpu"), autocast=nullcontext,
                    never=[7])  # fmt: skip


def test_prompts_with_a_common_beginning_are_different(engine: HFEngine) -> None:
    prompt = LONG_PROMPTS[0]
    check(engine, [replace(r, seed=5) for r in requests([prompt, prompt[1:], prompt[:-1], prompt])], Sampling(5))
