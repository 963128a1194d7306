"""vLLM servers for real: two replicas of a tiny model against vLLM in this process, and a run that starts its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from remix.errors import Interrupted, TrainingError
from remix.rollout.launch import OwnServers, choose_ports
from remix.rollout.replica import Wanted
from remix.rollout.serve import KEY, PATHS, served
from remix.rollout.server import ServerEngine
from remix.rollout.vllm import VLLMEngine
from remix.types import Completion, Request, Sampling
from tests.rollout.faults import alive, interruption, later, listening
from tests.tiny import EMBEDDED, ROOT, make_tiny_model

MAX_MODEL_LEN = 256
OWN_KEY = "the key of these tests"
EOS = 1
# vLLM caches prompts by blocks of 128 tokens: this one fills one.
LONG_PROMPT = tuple(2 + (7 * i * i + 3 * i) % 90 for i in range(200))
REQUESTS = [Request(LONG_PROMPT, seed) for seed in range(5)] + [Request((5, 9, 14), seed) for seed in range(5)]
MANY = [Request((*LONG_PROMPT[: 20 + i % 100], 2 + i % 90), i) for i in range(160)]
SAMPLING, LONG = Sampling(max_tokens=24), Sampling(max_tokens=100)
NEVER = (3, 7, 11)


def assert_same(got: list[Completion], expected: list[Completion]) -> None:
    """The same tokens; log-probs but for the rounding of other batches."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.finish_reason == other.finish_reason
        torch.testing.assert_close(one.sampler_logprobs, other.sampler_logprobs, atol=1e-4, rtol=0)


class Case:
    """The same model in this process and as two servers, which are handed the same weights."""

    def __init__(self, model: Path, other: Path) -> None:
        self.model = model
        self.first, self.second = (load_file(path / "model.safetensors") for path in (model, other))
        self.messages: list[str] = []
        ports = choose_ports(None, 2)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.there = self.engine(urls, own=True)
        self.there.servers = OwnServers(
            str(model),
            [f"--max-model-len={MAX_MODEL_LEN}", "--dtype=float32", "--kv-cache-gib=0.06"],
            ports=ports, devices=(), key=OWN_KEY, max_restarts=1,
            message=self.messages.append, revive=self.there.revive,
        )  # fmt: skip
        common = {"eos_token_ids": [EOS], "never": NEVER, "kv_cache_gib": 0.06}
        self.here = VLLMEngine(str(model), max_model_len=MAX_MODEL_LEN, **common)
        try:
            self.there.servers.wait(self.there.answers)
        except ValueError:
            self.close()
            raise

    def engine(self, urls: Any, **changes: Any) -> ServerEngine:
        arguments = {"key": OWN_KEY, "max_model_len": MAX_MODEL_LEN, "eos_token_ids": [EOS], "never": NEVER}
        return ServerEngine(urls, **{**arguments, "timeout": 60.0, "message": self.messages.append, **changes})

    @property
    def urls(self) -> list[str]:
        assert self.there.servers is not None
        return self.there.servers.urls

    def process(self, index: int) -> psutil.Process:
        """That of the web server."""
        assert self.there.servers is not None
        (child,) = psutil.Process(self.there.servers._processes[index].pid).children()
        return child

    def sync(self, weights: dict[str, Tensor]) -> None:
        for engine in (self.here, self.there):
            engine.sync(iter(weights.items()))

    def close(self) -> None:
        self.here.close()
        self.there.close()
        self.there.close()


@pytest.fixture(scope="module")
def case(vllm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    before = psutil.Process().children(recursive=True)
    case = Case(vllm_model, make_tiny_model(tmp_path_factory.mktemp("other"), seed=9))
    assert not case.messages
    started = [one for one in psutil.Process().children(recursive=True) if one not in before]
    folder = case.there._folder
    assert folder is not None
    yield case
    case.close()
    assert started
    assert not [one for one in started if alive(one.pid)]
    assert not folder.exists()


def get(url: str, key: str | None = OWN_KEY) -> httpx.Response:
    return httpx.get(url, headers={} if key is None else {"Authorization": f"Bearer {key}"}, trust_env=False)


class TestTwoServers:
    """On the servers of `case`, in this order."""

    def test_responses_are_those_of_the_engine_in_process(self, case: Case) -> None:
        assert_same(case.there.generate(REQUESTS, SAMPLING), case.here.generate(REQUESTS, SAMPLING))
        answers = []
        for weights in (case.second, case.first):  # with prompts that are in the caches from before
            case.sync(weights)
            answers.append(case.there.generate(REQUESTS, SAMPLING))
            assert_same(answers[-1], case.here.generate(REQUESTS, SAMPLING))
            versions = [get(f"{url}/weight_info").json()["weight_version"] for url in case.urls]
            assert versions == [case.there._version] * 2
        assert answers[0][0].response_ids.tolist() != answers[1][0].response_ids.tolist()
        drawn = {int(token) for answer in answers for one in answer for token in one.response_ids}
        assert not drawn & set(NEVER)
        greedy = Sampling(max_tokens=24, temperature=0.0)
        assert_same(case.there.generate(REQUESTS, greedy), case.here.generate(REQUESTS, greedy))
        cool = Sampling(max_tokens=24, temperature=0.7)
        assert_same(case.there.generate(REQUESTS, cool), case.here.generate(REQUESTS, cool))
        assert case.there.generate([], SAMPLING) == []
        with pytest.raises(ValueError, match=r"256 tokens.*prompt\.max_tokens or rollout\.max_tokens"):
            case.there.generate([Request((5,) * MAX_MODEL_LEN, 0)], SAMPLING)

    def test_both_take_part(self, case: Case) -> None:
        lines = [get(f"{url}/health").status_code for url in case.urls]
        assert lines == [200, 200]
        ports = [int(url.rpartition(":")[2]) for url in case.urls]
        seen: set[int] = set()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                seen.update(c.raddr.port for c in psutil.Process().net_connections("tcp") if c.raddr)

        watcher = threading.Thread(target=watch)
        watcher.start()
        case.there.generate(MANY, SAMPLING)
        done.set()
        watcher.join()
        assert set(ports) <= seen

    def test_who_has_no_key_gets_nothing_and_who_has_it_not_all(self, case: Case) -> None:
        """vLLM's own key would leave its development mode open to anybody on the host."""
        url = case.urls[0]
        for path in (*PATHS, "/remix", "/collective_rpc", "/v1/models", "/docs"):
            for key in (None, "another"):
                assert get(url + path, key).status_code == 401, path
        assert get(f"{url}/weight_info").status_code == 200
        for path in ("/collective_rpc", "/v1/models", "/v1/completions", "/sleep", "/server_info", "/docs", "/metrics"):
            assert get(url + path).status_code == 404, path
        for index in range(2):
            tree = [case.process(index), *case.process(index).children(recursive=True)]
            open_to = [address for one in tree for address in listening(one.pid)]
            assert open_to
            assert all(address.is_loopback for address in open_to)

    def test_wrong_weights_change_nothing(self, case: Case) -> None:
        before = case.there.generate(REQUESTS, SAMPLING)
        wrong = {**case.second, "model.layers.0.mlp.up.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up\.weight' is no weight .*Did you mean"):
            case.there.sync(wrong.items())
        few = {name: tensor for name, tensor in case.second.items() if "layers.1.mlp" not in name}
        with pytest.raises(ValueError, match=r"3 of 26 weights .* did not come"):
            case.there.sync(few.items())
        with pytest.raises(ValueError, match=r"'model\.norm\.weight' has shape \(3,\)"):
            case.there.sync({**case.second, "model.norm.weight": torch.zeros(3)}.items())
        assert_same(case.there.generate(REQUESTS, SAMPLING), before)
        assert case.there._folder is not None
        assert len(list(case.there._folder.glob("*.safetensors"))) == 1

    def test_a_server_with_other_weights_is_not_asked(self, case: Case) -> None:
        case.sync(case.second)
        expected = case.here.generate(REQUESTS, SAMPLING)
        case.messages.clear()
        stranger = case.engine(case.urls[:1])
        stranger.sync(case.first.items())
        assert_same(case.there.generate(REQUESTS, SAMPLING), expected)
        (message,) = case.messages
        assert f"{case.urls[0]} holds weights {stranger._version}: left out" in message
        third = case.engine(case.urls)
        with pytest.raises(
            TrainingError, match=r"no vLLM server is left \(http.* holds weights .*; http.* holds weights "
        ):
            third.generate(REQUESTS, SAMPLING)
        for engine in (stranger, third):
            engine.close()
        case.messages.clear()
        case.sync(case.second)  # which takes it back in
        assert_same(case.there.generate(REQUESTS, SAMPLING), expected)
        assert case.messages == [f"the vLLM server {case.urls[0]} is back"]

    def test_an_interrupted_call_leaves_nothing_to_the_next(self, case: Case) -> None:
        expected = case.here.generate(REQUESTS, SAMPLING)
        for delay in (0.05, 0.4):
            with interruption(delay), pytest.raises(Interrupted):
                case.there.generate(MANY, LONG)
            started = time.monotonic()
            assert_same(case.there.generate(REQUESTS, SAMPLING), expected)
            assert time.monotonic() - started < 20

    def test_an_abandoned_call_ends_and_so_does_each_until_the_next_sync(self, case: Case) -> None:
        case.sync(case.second)
        expected = case.here.generate(REQUESTS, SAMPLING)
        timer = threading.Timer(0.2, case.there.abandon)
        timer.start()
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(Interrupted):
                case.there.generate(MANY, LONG)
        assert time.monotonic() - started < 20
        case.there.sync(case.second.items())
        assert_same(case.there.generate(REQUESTS, SAMPLING), expected)

    def test_a_sync_waits_for_the_samples_that_are_under_way(self, case: Case) -> None:
        """As where the next step is sampled while this one is trained."""
        expected = case.here.generate(MANY, SAMPLING)
        got: list[list[Completion]] = []
        sampling = threading.Thread(target=lambda: got.append(case.there.generate(MANY, SAMPLING)))
        sampling.start()
        time.sleep(0.2)
        case.sync(case.first)
        sampling.join()
        assert_same(got[0], expected)
        assert_same(case.there.generate(REQUESTS, SAMPLING), case.here.generate(REQUESTS, SAMPLING))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"config": {"hidden_size": 128}}, "serves another model: hidden_size is 64, of .* it is 128"),
            ({"tokenizer": "0"}, "serves a model with another tokenizer"),
            ({"dtype": "bfloat16"}, "computes in float32, model.dtype is bfloat16"),
            ({"max_model_len": 300}, "holds 256 tokens .*--max-model-len 300"),
        ],
    )
    def test_a_server_of_another_model_is_refused(self, case: Case, changes: dict[str, Any], words: str) -> None:
        wanted = {**served(case.model), "dtype": "float32", "max_model_len": MAX_MODEL_LEN}
        case.there.check(Wanted(str(case.model), **wanted))
        for key, value in changes.items():
            wanted[key] = {**wanted[key], **value} if isinstance(value, dict) else value
        with pytest.raises(ValueError, match=rf"rollout\.engine\.urls: {case.urls[0]} {words}"):
            case.there.check(Wanted(str(case.model), **wanted))
        locked_out = case.engine(case.urls, key="another")
        with pytest.raises(ValueError, match=f"has another key: set {KEY} to the one"):
            locked_out.check(Wanted(str(case.model), **wanted))
        locked_out.close()

    def test_a_server_that_is_killed_is_left_out_and_comes_back(self, case: Case) -> None:
        """Its prompts go to the other with the same seeds: the same results as if nothing had been."""
        case.sync(case.second)
        expected = case.here.generate(MANY, LONG)
        case.messages.clear()
        with later(0.3, case.process(1).pid, signal.SIGKILL):
            assert_same(case.there.generate(MANY, LONG), expected)
        assert any(f"{case.urls[1]} does not answer" in message for message in case.messages), case.messages
        assert any("starting it again (1 of 1 restarts)" in message for message in case.messages)
        deadline = time.monotonic() + 500
        while f"the vLLM server {case.urls[1]} is back" not in case.messages:
            assert time.monotonic() < deadline
            time.sleep(0.5)
            assert_same(case.there.generate(REQUESTS, SAMPLING), case.here.generate(REQUESTS, SAMPLING))
        version = get(f"{case.urls[1]}/weight_info").json()["weight_version"]
        assert version == case.there._version  # without a sync: it was given the current weights

    def test_one_that_hangs_is_ended_and_where_none_is_left_the_run_ends(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = case.here.generate(REQUESTS, SAMPLING)
        case.messages.clear()
        case.there._replicas[0]._timeout = 3.0
        monkeypatch.setattr("remix.rollout.replica.CONNECT_SECONDS", 3.0)
        hung = case.process(0)
        hung.suspend()
        assert_same(case.there.generate(REQUESTS, SAMPLING), expected)
        assert any("did not answer within" in message for message in case.messages)
        assert not alive(hung.pid)
        last = case.process(1)
        last.kill()
        psutil.wait_procs([last])
        with pytest.raises(TrainingError, match=r"no vLLM server is left .*--resume"):
            case.there.generate(REQUESTS, SAMPLING)


def test_two_ranks_train_with_one_server_that_the_run_starts(tmp_path: Path) -> None:
    """The first starts it and hands over weights, which neither holds whole; both sample, the next step while one
    updates; evaluation too. An untied head."""
    model = make_tiny_model(tmp_path / "model", tie=False)
    fsdp2 = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text())
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(fsdp2 | {"num_processes": 2, "main_process_port": 0}))
    done = subprocess.run(
        [sys.executable, "-m", "remix.cli", "train", "--config_file", str(tmp_path / "accelerate.yaml"),
         str(EMBEDDED / "grpo.yaml"), "batch.prompts=8", "eval.prompts=8", "max_steps=3", "log.trackers=[]",
         f"model.path={model}", "rollout.engine={type: vllm_server, kv_cache_gib: 0.06}", f"run_dir={tmp_path / 'run'}",
         "rewards=[{type: length, free_tokens: 1, max_tokens: 24}]", "optimizer.lr=1e-3", "batch.minibatches=1",
         "rollout.overlap=true"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["policy_lag/mean"] for line in lines] == [0, 1, 1]
    for line in lines:
        assert 0 < line["sampler/probe"] < 1e-4
        assert line["sampler/mismatch_max"] < 1e-3
    assert lines[0]["grad_norm/policy"] > 0
    assert "eval/pass@1" in lines[2]
    for file in (tmp_path / "run").rglob("*"):  # the key is nowhere
        if file.suffix in (".yaml", ".json", ".jsonl"):
            assert KEY not in file.read_text()
