"""A model that says the worst: its text reaches no shell, no format string, no path, no page and no terminal alive."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from remix import cli, train
from remix.config import PromptConfig, dump_recipe
from remix.evaluation.summary import markdown
from remix.tasks import encode
from remix.terminal import markdown_code, markdown_text, printable
from remix.types import Prompt
from tests.tiny import EMBEDDED, ROOT, tiny_recipe

HOSTILE = (
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\x9b31m",
    "{0.__class__}",
    "{problem}",
    "%s%n",
    "$(touch owned)",
    "`touch owned`",
    "; touch owned",
    "../../owned",
    "/tmp/../owned",
    "<script>alert(1)</script>",
    "[bold red]",
    "[/]",
    "\u202e",
    "\r",
)
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model most of whose probability lies on such tokens."""
    folder = tmp_path_factory.mktemp("hostile")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    tokenizer.add_tokens(list(HOSTILE))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # the same logits everywhere: high where the text is hostile
        model.model.norm.weight.zero_()
        bias = torch.full((len(tokenizer),), -4.0)
        bias[-len(HOSTILE) :] = 0.0
        bias[tokenizer.eos_token_id] = -1.0
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight[:, 0] = bias
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


REWARD = """
def angry(prompt, response):
    if "owned" in response:
        raise RuntimeError("\\x1b]0;title\\x07 cannot read " + response + " [bold red] <script>")
    return 0.0
"""


def run(folder: Path, *commands: Sequence[str]) -> tuple[list[int], str]:
    """Exit codes, and all that was printed, of commands [module, word, ...] in a process of their own."""
    code = (
        f"from importlib import import_module; import json; commands = {[list(command) for command in commands]!r}; "
        "codes = [import_module(module).main(words) for module, *words in commands]; "
        "json.dump(codes, open('codes.json', 'w'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return json.loads((folder / "codes.json").read_text()), (done.stdout + done.stderr).decode()


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def trained_and_evaluated(model: Path, work: Path) -> str:
    """All that both commands print."""
    recipe = tiny_recipe(
        model,
        work / "run",
        {
            "rewards": [{"type": "math"}, {"type": "length", "free_tokens": 1, "max_tokens": 24}],
            "eval": {"every": 1},
            "log": {"completions_every": 1, "trackers": ["tensorboard"]},
        },
    )
    (work / "recipe.yaml").write_text(dump_recipe(recipe))
    evaluation = [
        "eval",
        "--model",
        str(model),
        "--benchmarks",
        "arithmetic",
        "--limit",
        "12",
        "--engine",
        "hf",
    ]
    evaluation += ["--temperature", "1", "--samples", "2", "--out", "evaluated"]
    codes, said = run(work, ["remix.train", "recipe.yaml"], ["remix.cli", *evaluation])
    assert codes == [0, 0], said
    return said


def assert_nothing_but_what_a_run_leaves(work: Path) -> None:
    tensorboard = {name for name in files_under(work) if name.startswith("run/remix/")}
    assert tensorboard
    expected = {"recipe.yaml", "in.jsonl", "out.jsonl", "codes.json", "run/metrics.jsonl", "run/completions.jsonl"}
    expected |= {"run/recipe.yaml", "run/result.json", "run/final/README.md"}
    expected |= {f"run/rollouts/step=00000{step}.parquet" for step in (0, 1)}
    saved = ("state.json", "tensors.safetensors", "manifest.json")
    expected |= {f"run/checkpoints/step=00000{step}/{name}" for step in (1, 2) for name in saved} | {"run/.lock"}
    expected |= {f"evaluated/{name}" for name in ("run.json", "problems.jsonl", "summary.json", "summary.md", ".lock")}
    expected |= {"evaluated/generations/arithmetic/00000.parquet"}
    left = files_under(work) - tensorboard
    assert expected <= left
    model_files = {
        name for name in left - expected if re.fullmatch(r"run/final/[a-z_]+\.(json|safetensors|jinja)", name)
    }
    assert left - expected - model_files == set()


def assert_the_text_is_as_it_was(work: Path, generated: list[str]) -> None:
    rollouts = [
        row["response"]
        for step in (0, 1)
        for row in pq.read_table(work / f"run/rollouts/step=00000{step}.parquet").to_pylist()
    ]
    for text in HOSTILE:
        assert any(text in response for response in rollouts), text
        assert any(text in response for response in generated), text
    completions = [json.loads(line) for line in (work / "run/completions.jsonl").read_text().splitlines()]
    assert {row["response"] for row in completions} <= set(rollouts)
    assert any("\x1b" in row["response"] for row in completions)
    graded = [json.loads(line) for line in (work / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in graded] == [f"\\boxed{{{text}}}" for text in generated]


def test_a_run_an_evaluation_and_grading_of_hostile_text(
    hostile_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "one" / "two" / "three"  # so that ../../owned stays under tmp_path
    work.mkdir(parents=True)
    said = trained_and_evaluated(hostile_model, work)
    chunks = [
        pq.read_table(file).to_pylist() for file in sorted((work / "evaluated" / "generations").rglob("*.parquet"))
    ]
    generated = [row["text"] for chunk in chunks for row in chunk]
    lines = [json.dumps({"gold": "1", "prediction": f"\\boxed{{{text}}}"}) for text in generated]
    (work / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert cli.main(["grade", "--in", str(work / "in.jsonl"), "--out", str(work / "out.jsonl")]) == 0
    shown = said + "".join(capfd.readouterr())
    assert "arithmetic" in shown
    assert "24 graded" in shown
    assert CONTROL.findall(shown) == []
    assert not any(text in shown for text in ("owned", "alert(1)", "__class__"))
    assert [str(path) for path in tmp_path.rglob("*owned*")] == []
    assert not (ROOT / "owned").exists()

    assert_nothing_but_what_a_run_leaves(work)
    assert_the_text_is_as_it_was(work, generated)
    for page in (work / "evaluated/summary.md", work / "run/final/README.md"):
        text = page.read_text()
        assert "<script" not in text
        assert CONTROL.findall(text) == []


def test_an_error_that_quotes_the_text(
    hostile_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "angry_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"rewards": [{"type": "python", "function": "angry_reward:angry"}]}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe(hostile_model, tmp_path / "run", changes)))
    assert train.main([str(tmp_path / "recipe.yaml")]) == 1
    said = capfd.readouterr().err
    assert "angry_reward:angry raised RuntimeError ( cannot read " in said
    assert "owned" in said, "it quotes the response, harmlessly"
    assert CONTROL.findall(said) == []


def test_a_trace_that_quotes_the_text(tmp_path: Path) -> None:
    """Of an error that a command does not foresee."""
    code = "from remix import cli; cli.main([]); raise RuntimeError('\\x1b[2J owned \\u202e \\x9b31m')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    said = done.stderr.decode()
    assert said.startswith("Traceback")
    assert said.endswith("RuntimeError:  owned  \n")


def test_braces_stay_as_they_are(hostile_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hostile_model)
    problem = "{0.__class__} {{x}} %s {problem} $(touch owned)"
    form = PromptConfig(template="{a} {problem} \\boxed{}", system="{system} {0}", max_tokens=512)
    (prompt,) = encode([Prompt("p", problem, "1", "t")], tokenizer, form)
    assert tokenizer.decode(list(prompt.token_ids)) == "{system} {0}\n\n{a} " + problem + " \\boxed{}"


def test_a_plan_shows_markup_and_controls_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes/embedded/grpo.yaml")
    assert cli.main(["plan", recipe, 'run_dir="runs/[bold red]x[/] \\e]0;owned\\a"']) == 0
    shown = capsys.readouterr().out
    assert "runs/[bold red]x[/]" in shown
    assert CONTROL.findall(shown) == []
    assert "owned" not in shown
    assert cli.main(["plan", "[red]\x1b[2Jno.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: [red]\\x1b[2Jno.yaml: no such recipe")


@pytest.mark.parametrize("text", HOSTILE)
def test_pages(text: str) -> None:
    assert "<" not in markdown_text(text)
    code = markdown_code(f"a{text}b")
    fence = re.match("`+", code)[0]
    assert code.endswith(fence)
    assert fence not in code[len(fence) : -len(fence)]
    assert CONTROL.findall(printable(text) + markdown_text(text) + code) == []


def test_the_names_in_a_summary_are_text() -> None:
    run = {
        "model": {"path": "<script>a</script>", "commit": None},
        "adapter": {"path": "`<b>`"},
        "benchmarks": {},
        "chat_template": None,
        "engine": {"name": "hf", "dtype": "float32"},
        "seed": 0,
        "grader": {"name": "g", "version": "1", "timeout": 1.0},
        "versions": {},
    }
    session = {"command": "remix eval\n```\n<script>\n", "device": "cpu", "seconds": 1.0, "finished": "now"}
    page = markdown({"run": run, "session": session, "benchmarks": {}, "files": {}, "data": {}})
    outside_code = re.sub(r"^    .*$|(`+).*?\1", "", page, flags=re.MULTILINE)
    assert "<script" not in outside_code
    assert "`" not in outside_code
