"""Before a vLLM server answers and after its run is killed: what is refused, what the plan says, what is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from remix.config import Recipe
from remix.config.compare import changed_keys
from remix.models import files
from remix.rollout.launch import choose_ports
from remix.rollout.serve import KEY, served
from remix.rollout.server import ServerEngine
from remix.training.plan import make_plan
from tests.rollout.faults import alive
from tests.tiny import ROOT, make_picture_task, opened, tiny_recipe


class Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"hello": "world"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    """The port of a web server that is none of vLLM's."""
    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_what_cannot_be_had_is_said_before_anything_is_trained(
    tiny_model: Path, tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (free,) = choose_ports(None, 1)
    nobody = f"http://127.0.0.1:{free}"
    for engine, key, words in [
        ({"urls": [nobody], "retries": 1}, "k",
         f"rollout.engine.urls: {nobody} does not answer (All connection attempts failed): start a server there with "
         f"`python -m remix.rollout.serve {tiny_model} --port {free} --dtype float32`, or take it out"),
        ({"urls": [nobody]}, None, f"set {KEY} to the key that the servers were started with"),
        ({"urls": [f"http://127.0.0.1:{taken}"]}, "k", "is no server of remix.rollout.serve"),
        ({"port": taken}, None, f"rollout.engine.port {taken}: cannot listen there"),
        ({"urls": [nobody], "transfer": "/proc/nowhere"}, "k", "rollout.engine.transfer /proc/nowhere: cannot be"),
    ]:  # fmt: skip
        monkeypatch.delenv(KEY, raising=False)
        if key:
            monkeypatch.setenv(KEY, key)
        recipe = tiny_recipe(tiny_model, tmp_path / "run", {"rollout": {"engine": {"type": "vllm_server", **engine}}})
        with pytest.raises(ValueError, match=re.escape(words)), opened(recipe):
            pass
        assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", "checkpoints"}


def test_the_launcher_refuses_in_one_line(tmp_path: Path, vllm_model: Path, taken: int) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, environment, said in [
        ([str(vllm_model), "--port=1"], {}, f"set {KEY} to a secret of yours"),
        ([str(vllm_model), f"--port={taken}"], {KEY: "k"}, f"--port {taken}: cannot listen there on 127.0.0.1"),
        ([str(empty), "--port=8123"], {KEY: "k"}, "no weights (*.safetensors)"),
    ]:
        own = {name: value for name, value in os.environ.items() if name != KEY}
        done = subprocess.run(
            [sys.executable, "-m", "remix.rollout.serve", *words],
            env={**own, **environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_servers_end_with_a_run_that_is_killed(tmp_path: Path, vllm_model: Path) -> None:
    (port,) = choose_ports(None, 1)
    run = tmp_path / "run.py"
    run.write_text(
        "import subprocess, sys, os, time\n"
        "command = [sys.executable, '-m', 'remix.rollout.serve', f'--parent={os.getpid()}']\n"
        f"words = [{str(vllm_model)!r}, '--port={port}']\n"
        f"subprocess.Popen(command + words, env={{**os.environ, {KEY!r}: 'k'}}, start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, str(run)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while len(tree := psutil.Process(process.pid).children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(tree) >= 2
    process.kill()
    process.wait()
    while any(alive(one.pid) for one in tree) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [one for one in tree if alive(one.pid)]


def test_weights_that_a_killed_run_left_in_memory_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remix.rollout.frames.SHARED_MEMORY", str(tmp_path))
    arguments = {"key": "k", "max_model_len": 8, "eos_token_ids": [1], "message": print}
    alive_run, killed_run = (ServerEngine([], **arguments) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 2
    assert killed_run._lock is not None
    killed_run._lock.close()  # as the kernel does
    third = ServerEngine([], **arguments)
    assert set(tmp_path.iterdir()) == {alive_run._folder, third._folder}
    for engine in (alive_run, third):
        engine.close()
    assert not list(tmp_path.iterdir())


def test_what_a_recipe_may_not_say(vllm_model: Path, tmp_path: Path) -> None:
    for engine, words in [
        ({"lora": "hot_swap"}, "rollout.engine.lora hot_swap is for type vllm"),
        ({"urls": ["127.0.0.1:1"]}, "'127.0.0.1:1' is no address"),
        ({"urls": ["http://a:1", "http://a:1"]}, "names a server twice"),
        ({"urls": ["http://a:1"], "replicas": 2}, "rollout.engine.replicas is for servers that the run starts"),
        ({"replicas": 2, "devices": ["0"]}, "names the GPUs of 1 servers, replicas is 2"),
    ]:
        with pytest.raises(ValueError, match=words.replace(".", r"\.")):
            tiny_recipe(vllm_model, tmp_path / "run", {"rollout": {"engine": {"type": "vllm_server", **engine}}})
    with pytest.raises(ValueError, match=r"rollout\.engine\.type vllm_server does not serve adapter\.type prefix"):
        tiny_recipe(
            vllm_model, tmp_path / "run",
            {"rollout": {"engine": {"type": "vllm_server"}}, "adapter": {"type": "prefix", "tokens": 5}},
        )  # fmt: skip


def test_what_the_plan_says_and_refuses(vllm_model: Path, tmp_path: Path) -> None:
    def recipe(**engine: Any) -> Recipe:
        changes = {"rollout": {"engine": {"type": "vllm_server", **engine}}}
        return tiny_recipe(vllm_model, tmp_path / "run", changes)

    there, own = recipe(urls=["http://a:1", "http://b:1"], transfer="/shared"), recipe(replicas=2, port=7000)
    assert make_plan(there, 2).engine_way == "all weights after each step, by files, to 2 servers"
    assert make_plan(own).engine_way.endswith("to 2 servers that the run starts")
    assert changed_keys(there, own) == []  # where it is sampled changes nothing but rounding
    make_plan(recipe(timeout=5000.0))
    with pytest.raises(ValueError, match=r"rollout\.engine\.timeout is not below faults\.rank_timeout"):
        make_plan(recipe(timeout=5000.0), 2)


def test_a_model_that_sees_images_is_refused(tiny_vision_model: Path, tmp_path: Path) -> None:
    changes = {"rollout": {"engine": {"type": "vllm_server"}}, "tasks": [make_picture_task(tmp_path / "task")]}
    recipe = tiny_recipe(tiny_vision_model, tmp_path / "run", {**changes, "prompt": {"max_tokens": 24}})
    with (
        pytest.raises(ValueError, match=r"vllm_server takes token ids alone, and .* sees images: set it to"),
        opened(recipe),
    ):
        pass


def test_a_tokenizer_of_its_own_is_told(vllm_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(vllm_model, tmp_path / "other")
    (other / "tokenizer_config.json").write_text("{}")
    (other / "model.safetensors").unlink()
    assert served(other)["tokenizer"] != served(vllm_model)["tokenizer"]
    assert served(other)["config"] == served(vllm_model)["config"]
    assert files.fingerprint(other, files.TOKENIZER_FILES)["sha256"] == served(other)["tokenizer"]
