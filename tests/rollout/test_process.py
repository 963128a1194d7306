"""The engine in its own process for real: killed, stopped, orphaned; always the responses of the engine in process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from remix.errors import Interrupted, TrainingError
from remix.rollout.process import EngineProcess, child_environment
from remix.rollout.vllm import VLLMEngine
from remix.types import Completion, Request, Sampling
from tests.rollout.faults import alive, assert_identical, interruption, later, listening
from tests.rollout.reference import LONG_PROMPT, MAX_MODEL_LEN, REQUESTS, checkpoint, saved, tiny_model

CPU = torch.device("cpu")
SAMPLING = Sampling(max_tokens=24, temperature=0.9)
MANY = [Request(LONG_PROMPT[: 100 + seed % 90], seed) for seed in range(256)]
"""A second of work with LONG."""
LONG = Sampling(max_tokens=80)


def pid_of(engine: EngineProcess) -> int:
    assert engine._child is not None
    return engine._child._process.pid


class Case:
    """One engine of each kind over the same model, with the weights of `current`."""

    def __init__(self, folder: Path) -> None:
        self.first, self.second = tiny_model(True, seed=0), tiny_model(True, seed=1)
        self.current: Qwen2ForCausalLM = self.first
        self.messages: list[str] = []
        path = saved(self.first, folder)
        settings: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "kv_cache_gib": 0.06, "seed": 3}
        self.here = VLLMEngine(path, **settings)
        self.there = EngineProcess(
            path, weights=lambda: checkpoint(self.current).items(), message=self.messages.append, device=CPU, **settings
        )

    def sync(self, model: Qwen2ForCausalLM) -> None:
        self.current = model
        self.here.sync(checkpoint(model).items())
        self.there.sync(checkpoint(model).items())

    def close(self) -> None:
        self.here.close()
        self.there.close()
        self.there.close()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("model"))
    yield case
    pid = pid_of(case.there) if case.there._child else None
    case.close()
    assert pid is None or not alive(pid)


def restarts(case: Case, before: int, *words: str) -> bool:
    """One more, announced once in these words."""
    return case.there.restarts == len(case.messages) == before + 1 and all(word in case.messages[-1] for word in words)


class TestOneEngine:
    """On the two engines of `case`, in this order."""

    def test_responses_are_those_of_the_engine_in_process(self, case: Case) -> None:
        expected = case.here.generate(REQUESTS, SAMPLING)
        assert_identical(case.there.generate(REQUESTS, SAMPLING), expected)  # weights as loaded
        for model in (case.second, case.first):
            case.sync(model)
            case.there.generate(MANY[:5], SAMPLING)  # what was asked before does not matter
            expected = case.here.generate(REQUESTS, SAMPLING)
            assert_identical(case.there.generate(REQUESTS, SAMPLING), expected)
        assert case.there.generate([], SAMPLING) == []
        assert case.there.restarts == 0

    def test_it_listens_to_no_other_machine_and_has_a_session_of_its_own(self, case: Case) -> None:
        pid = pid_of(case.there)
        assert [address for address in listening(pid) if not address.is_loopback] == []
        assert os.getsid(pid) == pid

    def test_a_wrong_request_is_a_value_error_and_no_fault(self, case: Case) -> None:
        with pytest.raises(ValueError, match=r"512 tokens.*prompt\.max_tokens or rollout\.max_tokens"):
            case.there.generate([Request((5,) * MAX_MODEL_LEN, 0)], SAMPLING)
        assert case.there.restarts == 0

    def test_killed_while_sampling(self, case: Case) -> None:
        case.sync(case.second)
        expected = case.here.generate(MANY, LONG)
        with later(0.2, pid_of(case.there), signal.SIGKILL):
            assert_identical(case.there.generate(MANY, LONG), expected)
        assert restarts(case, 0, "was ended by SIGKILL while sampling", "1 of 3")

    def test_killed_while_syncing(self, case: Case) -> None:
        case.current = case.first

        def weights() -> Iterator[tuple[str, Tensor]]:
            for index, item in enumerate(checkpoint(case.first).items()):
                if index == 5:
                    os.kill(pid_of(case.there), signal.SIGKILL)
                yield item

        case.there.sync(weights())
        case.here.sync(checkpoint(case.first).items())
        assert_identical(case.there.generate(REQUESTS, SAMPLING), case.here.generate(REQUESTS, SAMPLING))
        assert restarts(case, 1, "was ended by SIGKILL while taking over weights", "2 of 3")

    def test_stopped_for_longer_than_the_timeout(self, case: Case) -> None:
        pid, case.there._timeout = pid_of(case.there), 5.0
        os.kill(pid, signal.SIGSTOP)
        assert_identical(case.there.generate(REQUESTS, SAMPLING), case.here.generate(REQUESTS, SAMPLING))
        case.there._timeout = 1800.0
        assert restarts(case, 2, "did not answer within 5 s while sampling", "3 of 3")
        assert not alive(pid)

    def test_an_interruption_ends_the_child_and_is_no_fault(self, case: Case) -> None:
        pid = pid_of(case.there)
        with interruption(0.2), pytest.raises(Interrupted):
            case.there.generate(MANY, LONG)
        assert not alive(pid)
        assert case.there.restarts == len(case.messages) == 3

    def test_restarts_are_not_endless(self, case: Case) -> None:
        """Nor does it help that the child is killed while it starts."""

        def kill() -> None:
            while case.there._child is None:
                time.sleep(0.05)
            os.kill(pid_of(case.there), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(TrainingError, match=r"was ended by SIGKILL after 3 restarts \(rollout\.engine\.restarts\)"):
            case.there.generate(REQUESTS, SAMPLING)
        killer.join()
        assert case.there.restarts == len(case.messages) == 3


def started(path: str, **changes: Any) -> EngineProcess:
    return EngineProcess(path, weights=list, message=lambda _: None, device=CPU, max_model_len=64, **changes)


class TestWithoutAChildThatComesUp:
    """An error at once, with its cause, and no restart."""

    def test_no_vllm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['vllm'] = None")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(ValueError, match=r"vLLM is not installed. Run `bash scripts/setup.sh vllm`"):
            started("anywhere")

    @pytest.mark.parametrize(
        ("crash", "message"),
        [
            (
                "raise MemoryError('\\x1b[31mno \\x07room')",
                r"exit status 1\. .*words: .*MemoryError: no room$",
            ),
            ("import os; os.abort()", r"ended by SIGABRT\. .*words: .*Fatal Python error: Aborted.*vllm\.py.*line 1"),
        ],
    )
    def test_a_crash(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str, message: str) -> None:
        (tmp_path / "vllm.py").write_text(f"print('on stdout ' * 1000); {crash}")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(TrainingError, match=f"(?s){message}") as caught:
            started("anywhere")
        assert len(str(caught.value)) < 2500


ORPHANED = """
import sys, torch
from remix.rollout.process import EngineProcess
from remix.types import Request, Sampling
cpu, requests = torch.device("cpu"), [Request((5,) * 200, seed) for seed in range(5000)]
engine = EngineProcess(sys.argv[1], weights=list, message=print, device=cpu, max_model_len=512, kv_cache_gib=0.06)
print(engine._child._process.pid, flush=True)
engine.generate(requests, Sampling(max_tokens=300))
"""


def test_the_child_dies_with_a_trainer_that_is_killed_while_it_samples(tmp_path: Path) -> None:
    path = saved(tiny_model(True, seed=0), tmp_path)
    command = [sys.executable, "-c", ORPHANED, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        time.sleep(0.5)
        assert alive(pid)
        trainer.kill()
    deadline = time.monotonic() + 5.0
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_the_child_is_no_rank_and_sees_the_ranks_own_gpu() -> None:
    launched = {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
        "ROLE_RANK": "3", "ROLE_WORLD_SIZE": "4", "ROLE_NAME": "default", "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "GLOO_SOCKET_IFNAME": "eth0", "HF_HOME": "/models",
    }  # fmt: skip
    plain = child_environment(launched, CPU)
    assert {*plain} - {*launched} <= {"PYTHONPATH", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME"}
    assert {*launched} & {*plain} == {"HF_HOME", "GLOO_SOCKET_IFNAME"}
    assert plain["GLOO_SOCKET_IFNAME"] == plain["NCCL_SOCKET_IFNAME"] == "lo"
    gpu = torch.device("cuda", 1)
    assert child_environment(launched, gpu)["CUDA_VISIBLE_DEVICES"] == "1"
    assert child_environment({**launched, "CUDA_VISIBLE_DEVICES": "4, GPU-5e"}, gpu)["CUDA_VISIBLE_DEVICES"] == "GPU-5e"


def test_completions_keep_their_own_memory_alone() -> None:
    from remix.rollout import frames

    completions = [
        Completion(torch.arange(3), torch.zeros(3), "stop"),
        Completion(torch.arange(2), torch.ones(2), "length"),
    ]
    got = frames.unpack_completions(frames.unpack(frames.pack_completions(completions)))
    assert_identical(got, completions)
    assert got[1].response_ids.untyped_storage().nbytes() == 2 * 8
