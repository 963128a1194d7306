"""What needs a vLLM engine of its own: wrong weights, sleep, process groups, unusual checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from remix.rollout.vllm import VLLMEngine
from remix.types import Request, Sampling
from tests.rollout.reference import EOS, SHORT_PROMPT, assert_logprobs_of, checkpoint, saved, tiny_model, trainer_state


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return tiny_model(tied=True, seed=0)


@pytest.fixture(scope="module")
def path(model: Qwen2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(model, tmp_path_factory.mktemp("model"))


class TestOwnEngine:
    """One at a time: each test closes its own."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda w: w | {"model.layers.0.mlp.up.weight": torch.zeros(1)},
                r"'model\.layers\.0\.mlp\.up\.weight' is no weight .*Did you mean 'model\.layers\.0\.mlp\.up_proj",
            ),
            (
                lambda w: {name: tensor for name, tensor in w.items() if "layers.1.self_attn.k_proj" not in name},
                r"2 of 26 weights .* did not come, for example model\.layers\.1\.self_attn\.k_proj\.bias",
            ),
            (
                lambda w: w | {"model.norm.weight": torch.zeros(64)},
                r"'model\.norm\.weight' has shape \(64,\), .* it has \(128,\)",
            ),
        ],
        ids=["unknown", "missing", "shape"],
    )
    def test_a_wrong_sync_fails_and_leaves_no_usable_mixture(
        self, path: str, model: Qwen2ForCausalLM, change: Any, message: str
    ) -> None:
        engine = VLLMEngine(path, max_model_len=64, kv_cache_gib=0.03)
        try:
            with pytest.raises(ValueError, match=message):
                engine.sync(change(checkpoint(model)).items())
            with pytest.raises(RuntimeError, match="mixture"):
                engine.generate([Request(SHORT_PROMPT, 0)], Sampling(max_tokens=1))
            with pytest.raises(RuntimeError, match="mixture"):
                engine.sync(checkpoint(model).items())
        finally:
            engine.close()

    def test_it_sleeps_between_calls_and_its_cache_through_a_sync(self, path: str, model: Qwen2ForCausalLM) -> None:
        """Whose memory a CPU does not give back, but vLLM keeps books of it all the same."""
        other = tiny_model(tied=True, seed=1)
        engine = VLLMEngine(path, max_model_len=64, kv_cache_gib=0.03, sleep=True)
        executor = engine._llm.llm_engine.engine_core.engine_core.model_executor  # type: ignore[attr-defined]
        requests = [Request(SHORT_PROMPT, seed) for seed in range(2)]
        asleep = list[set[str]]()

        def weights() -> Iterator[tuple[str, Tensor]]:
            for weight in checkpoint(other).items():
                asleep.append(set(executor.sleeping_tags))
                yield weight

        try:
            for of in (model, other):
                assert executor.sleeping_tags == {"weights", "kv_cache"}
                assert_logprobs_of(of, requests, engine.generate(requests, Sampling(max_tokens=4)), 1.0)
                assert executor.sleeping_tags == {"weights", "kv_cache"}
                engine.sync(weights())
            assert asleep
            assert all(tags == {"kv_cache"} for tags in asleep)
            with pytest.raises(ValueError, match="unknown"):
                engine.sync({"unknown": torch.zeros(1)}.items())
            assert executor.sleeping_tags == {"weights", "kv_cache"}
        finally:
            engine.close()

    def test_a_process_group_of_the_trainer_is_used_and_kept(
        self, path: str, model: Qwen2ForCausalLM, tmp_path: Path
    ) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            torch.set_float32_matmul_precision("high")
            before = trainer_state()
            # An eos of the caller's choice in place of the checkpoint's.
            engine = VLLMEngine(path, max_model_len=64, kv_cache_gib=0.03, eos_token_ids=[7, 8])
            assert trainer_state() == before
            torch.set_float32_matmul_precision("highest")
            requests = [Request(SHORT_PROMPT, seed) for seed in range(64)]
            got = engine.generate(requests, Sampling(max_tokens=40))
            assert_logprobs_of(model, requests, got, 1.0)
            stopped = [completion.response_ids for completion in got if completion.finish_reason == "stop"]
            assert {int(ids[-1]) for ids in stopped} == {7, 8}
            assert any(EOS in ids for ids in stopped)
            engine.close()
            engine.close()
            torch.distributed.barrier()
        finally:
            torch.set_float32_matmul_precision("highest")
            torch.distributed.destroy_process_group()

    def test_pickled_weights_are_not_read(self, model: Qwen2ForCausalLM, tmp_path: Path) -> None:
        path = saved(model, tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"no weights as safetensors.*Save it with save_pretrained"):
            VLLMEngine(path, max_model_len=64, kv_cache_gib=0.03)

    def test_a_head_that_the_checkpoint_stores_beside_its_embedding(
        self, model: Qwen2ForCausalLM, tmp_path: Path
    ) -> None:
        """The config says tied and the file has the head all the same, as other tools write it."""
        from safetensors.torch import load_file, save_file

        path = saved(model, tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        head = weights["model.embed_tokens.weight"].clone()
        save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        other = tiny_model(tied=True, seed=1)
        requests = [Request(SHORT_PROMPT, 0)]
        engine = VLLMEngine(path, max_model_len=64, kv_cache_gib=0.03)
        try:
            for with_head in (False, True):
                engine.sync(checkpoint(model).items())
                engine.sync(checkpoint(other, with_head).items())
                assert_logprobs_of(other, requests, engine.generate(requests, Sampling(max_tokens=16)), 1.0)
        finally:
            engine.close()
