"""The vLLM engine for real: tiny models on the CPU against transformers in float32."""

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from remix.errors import Interrupted
from remix.rollout.vllm import VLLMEngine
from remix.types import Request, Sampling
from tests.rollout.faults import assert_identical, interruption, listening
from tests.rollout.reference import (
    EOS,
    LONG_PROMPT,
    MAX_MODEL_LEN,
    REQUESTS,
    SHORT_PROMPT,
    assert_logprobs_of,
    checkpoint,
    reference_logprobs,
    saved,
    tiny_model,
    trainer_state,
)


def cached_tokens(engine: VLLMEngine, requests: list[Request]) -> list[int]:
    """How much of each prompt a call takes from vLLM's prefix cache."""
    generate, outputs = engine._llm.generate, []
    engine._llm.generate = lambda *args, **kwargs: outputs.extend(generate(*args, **kwargs)) or outputs
    try:
        engine.generate(requests, Sampling(max_tokens=1))
    finally:
        engine._llm.generate = generate
    return [int(output.num_cached_tokens) for output in outputs]


@dataclass
class Case:
    engine: VLLMEngine
    tied: bool
    first: Qwen2ForCausalLM
    """Its weights are those that the engine starts with."""
    second: Qwen2ForCausalLM
    """Other weights, from another seed."""


@pytest.fixture(scope="class", params=[True, False], ids=["tied", "untied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    tied = request.param
    first, second = tiny_model(tied, seed=0), tiny_model(tied, seed=1)
    engine = VLLMEngine(
        saved(first, tmp_path_factory.mktemp("model")), max_model_len=MAX_MODEL_LEN, kv_cache_gib=0.06, seed=3
    )
    yield Case(engine, tied, first, second)
    engine.close()


@pytest.fixture
def started(case: Case) -> Case:
    """The case with the engine back at its first weights, whatever ran before."""
    case.engine.sync(checkpoint(case.first).items())
    return case


class TestSampleAndSync:
    """On the engine of `case`, in turn for a tied and an untied head."""

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_logprobs_are_those_of_transformers_before_and_after_a_sync(self, case: Case, temperature: float) -> None:
        sampling = Sampling(max_tokens=24, temperature=temperature)
        if temperature == 1.0:  # once, before any sync: as loaded from the checkpoint
            assert_logprobs_of(case.first, REQUESTS, case.engine.generate(REQUESTS, sampling), temperature)
        # First weights, second, and first again; nothing of an earlier call is taken from the prefix cache.
        for model in (case.first, case.second, case.first):
            case.engine.sync(iter(checkpoint(model, with_head=not case.tied).items()))
            # Within a call prompts share 3 whole blocks of 128.
            assert cached_tokens(case.engine, REQUESTS) == [0, 384, 384, 0, 0, 0]
            got = case.engine.generate(REQUESTS, sampling)
            assert_logprobs_of(model, REQUESTS, got, temperature)
        other = reference_logprobs(case.second, LONG_PROMPT, got[0], temperature)
        assert (other - got[0].sampler_logprobs).abs().mean() > 1  # the two models are far apart

    def test_a_tied_head_may_come_or_not(self, started: Case) -> None:
        for with_head in (True, False) if started.tied else (True,):
            started.engine.sync(checkpoint(started.first).items())
            started.engine.sync(checkpoint(started.second, with_head).items())
            got = started.engine.generate(REQUESTS, Sampling(max_tokens=8))
            assert_logprobs_of(started.second, REQUESTS, got, 1.0)

    def test_sync_reads_a_tensor_before_it_asks_for_the_next(self, started: Case) -> None:
        """As where weights are gathered one at a time into memory that is used again."""

        def gathered() -> Iterator[tuple[str, Tensor]]:
            for name, weight in checkpoint(started.second).items():
                buffer = weight.clone()
                yield name, buffer
                buffer.fill_(float("nan"))

        started.engine.sync(gathered())
        got = started.engine.generate(REQUESTS, Sampling(max_tokens=8))
        assert_logprobs_of(started.second, REQUESTS, got, 1.0)

    def test_half_precision_weights_are_taken_over(self, started: Case) -> None:
        halved = {name: weight.bfloat16() for name, weight in checkpoint(started.second).items()}
        started.engine.sync(halved.items())
        got = started.engine.generate(REQUESTS, Sampling(max_tokens=8))
        rounded = copy.deepcopy(started.second)
        rounded.load_state_dict(halved)
        assert_logprobs_of(rounded, REQUESTS, got, 1.0)

    @pytest.mark.parametrize("length", [129, 257, 400])
    def test_a_response_does_not_depend_on_earlier_calls(self, started: Case, length: int) -> None:
        """Bit for bit, though all but a few tokens of the prompt were cached. Two threads sum a row in another order
        than they sum the rows of a block."""
        requests, sampling = [Request(LONG_PROMPT[:length], 0)], Sampling(max_tokens=16)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            fresh = started.engine.generate(requests, sampling)
            assert_identical(started.engine.generate(requests, sampling), fresh)
            started.engine.generate([Request(LONG_PROMPT, 9), *REQUESTS[::-1]], Sampling(max_tokens=40))
            started.engine.sync(checkpoint(started.first).items())
            assert_identical(started.engine.generate(requests, sampling), fresh)
        finally:
            torch.set_num_threads(threads)

    def test_an_interrupted_call_leaves_nothing_to_the_next(self, started: Case) -> None:
        sampling = Sampling(max_tokens=16)
        before = started.engine.generate(REQUESTS, sampling)
        many = [Request(LONG_PROMPT[: 200 + seed % 100], seed) for seed in range(300)]
        for delay in (0.05, 0.3):
            with interruption(delay), pytest.raises(Interrupted):
                started.engine.generate(many, Sampling(max_tokens=100))
            assert started.engine._llm.llm_engine.get_num_unfinished_requests() == 0
            assert_identical(started.engine.generate(REQUESTS, sampling), before)

    def test_prompts_that_are_longer_together_than_a_batch(self, started: Case) -> None:
        """A prompt cut in two by the end of a batch would sample its first token twice."""
        many = [Request((*LONG_PROMPT[:100], 2 + i % 50, 2 + i // 50), i) for i in range(60)]
        got = started.engine.generate(many, Sampling(max_tokens=4))
        assert_logprobs_of(started.first, many, got, 1.0)
        alone = started.engine.generate(many[40:41], Sampling(max_tokens=4))
        assert alone[0].response_ids.tolist() == got[40].response_ids.tolist()

    def test_it_listens_to_no_other_machine(self, started: Case) -> None:
        with socket.socket() as open_to_all:  # what would be found
            open_to_all.bind(("0.0.0.0", 0))
            open_to_all.listen()
            assert [address for address in listening(os.getpid()) if not address.is_loopback]
        assert [address for address in listening(os.getpid()) if not address.is_loopback] == []

    def test_the_seed_alone_determines_a_response(self, started: Case) -> None:
        sampling = Sampling(max_tokens=32)
        together = started.engine.generate(REQUESTS, sampling)
        alone = [started.engine.generate([request], sampling)[0] for request in REQUESTS]
        reversed_order = started.engine.generate(REQUESTS[::-1], sampling)[::-1]
        for first, second, third in zip(together, alone, reversed_order, strict=True):
            assert first.response_ids.tolist() == second.response_ids.tolist() == third.response_ids.tolist()
        assert len({tuple(c.response_ids.tolist()) for c in together[:3]}) == 3  # one prompt, three seeds
        torch.manual_seed(0)
        (first,) = started.engine.generate([Request(SHORT_PROMPT, -1)], sampling)
        torch.manual_seed(1)
        (second,) = started.engine.generate([Request(SHORT_PROMPT, -1)], sampling)
        assert first.response_ids.tolist() == second.response_ids.tolist()  # -1 is a seed like any other

    def test_temperature_0_is_greedy_with_logprobs_at_temperature_1(self, started: Case) -> None:
        (got,) = started.engine.generate([Request(LONG_PROMPT, 0)], Sampling(max_tokens=16, temperature=0.0))
        ids = torch.tensor([LONG_PROMPT])
        expected = started.first.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert got.response_ids.tolist() == expected[0, len(LONG_PROMPT) :].tolist()
        assert_logprobs_of(started.first, [Request(LONG_PROMPT, 0)], [got], 1.0)

    def test_responses_end_with_the_eos_token_or_at_the_limit(self, started: Case) -> None:
        requests = [Request(SHORT_PROMPT, seed) for seed in range(64)]
        got = started.engine.generate(requests, Sampling(max_tokens=40))
        for completion in got:
            ids = completion.response_ids
            assert ids.dtype == torch.int64
            assert completion.sampler_logprobs.dtype == torch.float32
            assert len(completion.sampler_logprobs) == len(ids)
            assert EOS not in ids[:-1]
            assert completion.finish_reason == ("stop" if ids[-1] == EOS else "length")
            assert completion.finish_reason == "stop" or len(ids) == 40
        assert {completion.finish_reason for completion in got} == {"stop", "length"}

    def test_no_requests_no_completions(self, started: Case) -> None:
        assert started.engine.generate([], Sampling(max_tokens=4)) == []

    def test_a_prompt_that_leaves_no_room_is_refused(self, started: Case) -> None:
        fits = Request((5,) * (MAX_MODEL_LEN - 4), 0)
        assert len(started.engine.generate([fits], Sampling(max_tokens=4))) == 1
        with pytest.raises(ValueError, match=r"508 tokens.*prompt\.max_tokens or rollout\.max_tokens.*513 together"):
            started.engine.generate([Request(SHORT_PROMPT, 0), fits], Sampling(max_tokens=5))

    def test_the_trainer_is_left_as_it_was(self, started: Case, capfd: pytest.CaptureFixture[str]) -> None:
        torch.manual_seed(11)
        before = trainer_state()
        started.engine.generate(REQUESTS, Sampling(max_tokens=4))
        started.engine.sync(checkpoint(started.second).items())
        assert trainer_state() == before
        assert capfd.readouterr().out == ""  # the progress display has the screen

    def test_one_engine_at_a_time(self, started: Case) -> None:
        with pytest.raises(RuntimeError, match="Close it first"):
            VLLMEngine("anywhere", max_model_len=8)


def test_without_vllm_the_import_names_the_remedy() -> None:
    code = "import sys; sys.modules['vllm'] = None; import remix.rollout.vllm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ModuleNotFoundError: vLLM is not installed. Run `bash scripts/setup.sh vllm`" in done.stderr
