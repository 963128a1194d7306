"""`remix eval` as a user runs it, on the embedded model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from remix import cli
from tests.tiny import EMBEDDED, ROOT, make_tiny_model, opened, tiny_recipe

BASE = str(EMBEDDED / "base")
SAMPLED = ["--samples", "3", "--temperature", "0.8", "--limit", "40"]


def remix_eval(out: Path, *options: str, model: str = BASE, benchmarks: str = "arithmetic") -> int:
    words = ["eval", "--model", model, "--benchmarks", benchmarks, "--engine", "hf", "--out", str(out), *options]
    return cli.main(words)


def summary(out: Path) -> dict[str, Any]:
    """Without what one session has to itself."""
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert found.pop("session").keys() == {"command", "device", "seconds", "finished"}
    return found


def rows(out: Path, benchmark: str = "arithmetic") -> list[dict[str, Any]]:
    chunks = sorted((out / "generations" / benchmark).glob("*.parquet"))
    return [row for chunk in chunks for row in pq.read_table(chunk).to_pylist()]


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("greedy") / "out"
    assert remix_eval(out, "--limit", "96") == 0
    return out


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sampled") / "out"
    assert remix_eval(out, *SAMPLED) == 0
    return out


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes what the model says, made with PEFT alone."""
    return make_adapter(BASE, tmp_path_factory.mktemp("adapter") / "lora")


def make_adapter(model: str, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    return folder


# --- what it leaves behind ----------------------------------------------------------------------------------------


def test_what_is_written(sampled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert remix_eval(sampled, *SAMPLED, "--resume") == 0  # all is there: no model is loaded
    shown = capsys.readouterr()
    assert "arithmetic 40 3" in shown.out
    assert "chat template not used" in shown.out
    assert "120 of 120 responses are there already" in shown.err
    assert "loading" not in shown.err

    found = summary(sampled)
    scores, run = found["benchmarks"]["arithmetic"], found["run"]
    generated, problems = rows(sampled), [json.loads(line) for line in (sampled / "problems.jsonl").open()]
    assert len(generated) == 120
    assert [problem["correct"] for problem in problems] == [
        sum(row["verdict"] == "correct" for row in generated if row["problem"] == problem["problem"])
        for problem in problems
    ]
    assert scores["avg@k"] == pytest.approx(sum(row["verdict"] == "correct" for row in generated) / 120)
    assert scores["interval_95"][0] < scores["avg@k"] < scores["interval_95"][1]
    assert scores["avg@k"] < scores["pass@k"]["2"] < scores["pass@k"]["3"]
    assert scores["mean_tokens"] == sum(row["tokens"] for row in generated) / 120
    assert found["macro_average"]["avg@k"] == scores["avg@k"]
    assert run["benchmarks"]["arithmetic"]["samples"] == 3
    assert len({row["seed"] for row in generated}) == 120

    digest = subprocess.check_output("sha256sum *.safetensors | sha256sum", shell=True, cwd=BASE, text=True).split()[0]
    text = (sampled / "summary.md").read_text()
    assert run["model"]["weights"] == digest
    facts = [digest, run["benchmarks"]["arithmetic"]["sha256"], run["grader"]["version"], "temperature 0.8", "seed | 0"]
    for fact in [*facts, "hf, float32", "transformers 5", "remix eval --model", "not used", "Apache-2.0"]:
        assert fact in text


def test_batches_and_workers_change_nothing(sampled: Path, tmp_path: Path) -> None:
    assert remix_eval(tmp_path / "out", *SAMPLED, "--batch-size", "7", "--workers", "1") == 0
    assert rows(tmp_path / "out") == rows(sampled)
    assert summary(tmp_path / "out") == summary(sampled)


def test_the_seed_changes_the_responses(sampled: Path, tmp_path: Path) -> None:
    assert remix_eval(tmp_path / "out", *SAMPLED, "--seed", "1") == 0
    assert [row["text"] for row in rows(tmp_path / "out")] != [row["text"] for row in rows(sampled)]


def test_kill_and_resume_give_the_same(sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, options = tmp_path / "out", [*SAMPLED, "--batch-size", "8"]
    command = ["eval", "--model", BASE, "--benchmarks", "arithmetic", "--engine", "hf", "--out", str(out), *options]
    process = subprocess.Popen([sys.executable, "-m", "remix.cli", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    third = out / "generations" / "arithmetic" / "00002.parquet"
    deadline = time.monotonic() + 120
    while not third.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 24 <= len(rows(out)) < 120, "killed in the middle"
    assert not (out / "summary.json").exists()

    assert remix_eval(out, *options) == 2
    assert "add --resume" in capsys.readouterr().err
    assert remix_eval(out, *options, "--resume") == 0
    assert rows(out) == rows(sampled)
    assert summary(out) == summary(sampled)


# --- engines and adapters -----------------------------------------------------------------------------------------


def test_both_engines_give_the_same_verdicts(greedy: Path, adapter: Path, tmp_path: Path) -> None:
    options = ["--limit", "96"]
    assert remix_eval(tmp_path / "vllm", *options, "--engine", "vllm") == 0
    assert remix_eval(tmp_path / "hf_lora", *options, "--adapter", str(adapter)) == 0
    assert remix_eval(tmp_path / "vllm_lora", *options, "--adapter", str(adapter), "--engine", "vllm") == 0
    assert 0.5 < summary(greedy)["benchmarks"]["arithmetic"]["avg@k"] < 1
    assert rows(tmp_path / "vllm") == rows(greedy)
    assert rows(tmp_path / "vllm_lora") == rows(tmp_path / "hf_lora")
    assert [row["text"] for row in rows(tmp_path / "hf_lora")] != [row["text"] for row in rows(greedy)]
    assert summary(tmp_path / "hf_lora")["files"]["adapter"]["files"].keys() >= {"adapter_model.safetensors"}
    assert not summary(greedy)["run"]["adapter"]


def test_training_evaluates_by_the_same_code(tmp_path: Path) -> None:
    """The last evaluation of a run is the one that `remix eval` repeats on the model that the run left."""
    from remix.training.finish import finish

    recipe = tiny_recipe(
        Path(BASE),
        tmp_path / "run",
        {"max_steps": 1, "seed": 4, "eval": {"benchmarks": ["arithmetic"], "limit": 48, "samples": 2,
                                             "temperature": 0.7}},
    )  # fmt: skip
    with opened(recipe) as trainer:
        trainer.fit()
        result = finish(trainer, "recipe.yaml")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["final_pass_at_1"] == metrics["eval/pass@1"] == metrics["eval/arithmetic/pass@1"]
    assert metrics["eval/arithmetic/pass@2"] > metrics["eval/arithmetic/pass@1"] > 0
    options = ["--limit", "48", "--samples", "2", "--temperature", "0.7", "--seed", "4"]
    assert remix_eval(tmp_path / "out", *options, model=str(tmp_path / "run" / "final")) == 0
    scores = summary(tmp_path / "out")["benchmarks"]["arithmetic"]
    assert scores["avg@k"] == pytest.approx(metrics["eval/arithmetic/pass@1"])
    assert scores["pass@k"]["2"] == pytest.approx(metrics["eval/arithmetic/pass@2"])


def test_a_chat_model_on_two_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The chat template goes around the problem, local files stand in for the hub, and the average is a macro one."""
    from transformers import AutoTokenizer

    model = make_tiny_model(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    problems = [{"id": str(i), "problem": f"{i} + 1", "answer": str(i + 1)} for i in range(30)]
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    options = ["--data-dir", str(tmp_path), "--limit", "6", "--samples", "2", "--temperature", "1", "--max-tokens", "8"]
    assert remix_eval(tmp_path / "out", *options, model=str(model), benchmarks="aime24,arithmetic") == 0
    shown = capsys.readouterr().out
    assert "chat template used" in shown
    assert [line.split()[0] for line in shown.splitlines()[2:5]] == ["aime24", "arithmetic", "average"]
    found = summary(tmp_path / "out")
    assert found["data"]["aime24"]["of"] == 30
    assert found["data"]["aime24"]["revision"].startswith("sha256:")
    assert found["run"]["benchmarks"]["aime24"]["problems"] == 6
    each = [scores["avg@k"] for scores in found["benchmarks"].values()]
    assert found["macro_average"]["avg@k"] == sum(each) / 2
    assert "chat template | used, sha256" in (tmp_path / "out" / "summary.md").read_text()
    assert {row["verdict"] for row in rows(tmp_path / "out", "aime24")} <= {"correct", "wrong", "no_answer"}

    # Without the template the prompts are others, which makes it another run.
    options += ["--chat", "never", "--resume"]
    assert remix_eval(tmp_path / "out", *options, model=str(model), benchmarks="aime24,arithmetic") == 2
    assert "chat_template was" in capsys.readouterr().err


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "arithmetics"], "unknown benchmark 'arithmetics'; did you mean 'arithmetic'?"),
        (["--benchmarks", "aime24", "--data-dir", "/nowhere"], "/nowhere/aime24.jsonl: no such file"),
        (["--max-tokens", "250"], "set --max-tokens to 246 or less"),
        (["--samples", "4", "--temperature", "1", "--pass-at", "1,8"], "pass@8 needs 8 samples of a problem"),
        (["--samples", "2"], "at temperature 0 all 2 samples are the same"),
        (["--chat", "always"], "has no chat template"),
        (["--model", "/nowhere"], "--model /nowhere: no such directory"),
        (["--model", str(ROOT / "recipes")], "no config.json"),
        (["--adapter", "/nowhere"], "--adapter /nowhere: no such directory"),
        (["--adapter", BASE], "no adapter_config.json there"),
    ],
)
def test_a_wrong_request_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert remix_eval(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--samples", "0"], ["--top-p", "0"], ["--temperature", "-1"], ["extra"]])
def test_options_are_checked(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        remix_eval(tmp_path / "out", *words)
    assert words[-1] in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_count_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "aime24.jsonl").write_text('{"id": "1", "problem": "1+1", "answer": "2"}\n')
    assert remix_eval(tmp_path / "out", "--data-dir", str(tmp_path), benchmarks="aime24") == 2
    assert "1 problems, but aime24 has 30" in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["model.safetensors", "tokenizer.json"])
def test_a_model_that_lacks_a_part(lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    for file in Path(BASE).iterdir():
        if file.name != lacking and not (lacking == "tokenizer.json" and "token" in file.name):
            (tmp_path / "model" / file.name).symlink_to(file)
    assert remix_eval(tmp_path / "out", model=str(tmp_path / "model")) == 2
    assert f"no {'weights' if 'model' in lacking else 'tokenizer'}" in capsys.readouterr().err


def another_base(config: dict[str, Any]) -> None:
    config["base_model_name_or_path"] = "Qwen/Qwen2.5-0.5B"


def no_base(config: dict[str, Any]) -> None:
    config["base_model_name_or_path"] = None


def other_layers(config: dict[str, Any]) -> None:
    no_base(config)
    config["target_modules"] = ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize(
    ("of_tiny", "change", "message"),
    [
        (False, another_base, "was trained on another base, Qwen/Qwen2.5-0.5B"),
        (True, None, "was trained on another base"),
        (True, no_base, "does not fit this model"),
        (False, other_layers, "more weights are on one side only"),
    ],
)
def test_an_adapter_for_another_base(
    of_tiny: bool,
    change: Callable[[dict[str, Any]], None] | None,
    message: str,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make_adapter(str(make_tiny_model(tmp_path / "tiny")), tmp_path / "lora") if of_tiny else adapter
    changed = tmp_path / "changed"
    changed.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    if change is not None:
        change(config)
    (changed / "adapter_config.json").write_text(json.dumps(config))
    (changed / "adapter_model.safetensors").symlink_to(source / "adapter_model.safetensors")
    assert remix_eval(tmp_path / "out", "--adapter", str(changed)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_the_place_of_a_model(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert remix_eval(tmp_path / "out", model=str(adapter)) == 2
    assert f"--model {BASE} --adapter {adapter}" in capsys.readouterr().err


def test_the_folder_of_another_run_is_left_alone(
    sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in sampled.rglob("*") if path.is_file()}
    assert remix_eval(sampled, *SAMPLED) == 2
    assert "already holds an evaluation" in capsys.readouterr().err
    assert remix_eval(sampled, "--samples", "3", "--temperature", "0.5", "--limit", "40", "--resume") == 2
    assert "benchmarks.arithmetic.temperature was 0.8, now 0.5" in capsys.readouterr().err
    other = make_tiny_model(tmp_path / "tiny")
    assert remix_eval(sampled, *SAMPLED, "--resume", model=str(other)) == 2
    assert "model.weights was" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sampled.rglob("*") if path.is_file()} == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert remix_eval(tmp_path / "mine", *SAMPLED, "--resume") == 2
    assert "what it holds is no evaluation" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
