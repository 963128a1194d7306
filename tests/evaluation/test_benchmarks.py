"""The definitions that ship, the problems they lead to, and what is said of wrong ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from remix.evaluation.benchmarks import (
    Benchmark,
    benchmark_names,
    definitions_dir,
    load_benchmarks,
    load_definition,
    load_problems,
    suites,
)
from remix.tasks import hub
from remix.tasks.arithmetic import answer, split_of
from remix.tasks.encode import encode
from tests.tiny import ROOT

DATA = ROOT.parent / "shared" / "data" / "benchmarks"
COUNTS = {
    "aime24": 30,
    "amc23": 40,
    "amc23_83": 83,
    "math500": 500,
    "minerva_math": 272,
    "olympiadbench": 675,
    "gsm8k": 1319,
    "aime_1983_2023": 975,
    "arithmetic": 512,
    "shapes": 384,
}


def one(name: str, **changes: Any) -> Benchmark:
    (benchmark,) = load_benchmarks([name])
    return Benchmark.model_validate({**benchmark.model_dump(), **changes})


def names(*asked: str) -> list[str]:
    return [benchmark.name for benchmark in load_benchmarks(asked)]


def test_what_ships():
    assert definitions_dir() == ROOT / "eval"
    assert set(benchmark_names()) == set(COUNTS)
    assert {benchmark.name: benchmark.count for benchmark in load_benchmarks(benchmark_names())} == COUNTS
    assert names("math") == ["aime24", "amc23_83", "math500", "minerva_math", "olympiadbench"]
    assert names("math_qwen") == ["aime24", "amc23", "math500", "minerva_math", "olympiadbench"]
    for name in suites():
        assert load_benchmarks([name])
        assert name not in benchmark_names()


@pytest.mark.parametrize("name", COUNTS)
def test_every_definition_says_what_a_score_depends_on(name):
    benchmark = one(name)
    assert benchmark.title
    assert benchmark.source
    assert benchmark.licence
    assert benchmark.reflection
    assert benchmark.hub is None or len(benchmark.hub.revision or "") == 40, "pinned to a commit"
    if name in ("aime24", "amc23", "amc23_83"):  # few problems: avg@k
        assert benchmark.samples >= 16
        assert (benchmark.temperature, benchmark.top_p) == (0.6, 0.95)
    else:
        assert benchmark.samples == 1
    if benchmark.generate is None:
        assert "\\boxed{}" in benchmark.template
    assert len((definitions_dir() / f"{name}.yaml").read_text().splitlines()) <= 30


def test_the_minerva_tolerance_is_its_own():
    tolerances = {b.name: b.grader.rel_tolerance for b in load_benchmarks(["math"]) if b.grader.type == "math"}
    assert {name for name, tolerance in tolerances.items() if tolerance} == {"minerva_math"}


def test_names_lists_and_suites_in_order_each_once():
    assert names("gsm8k, aime24", "math_qwen") == ["gsm8k", *names("math_qwen")]
    assert names("math,math_qwen") == [*names("math"), "amc23"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("math50", "unknown benchmark 'math50'; did you mean 'math500'?"),
        ("aime24,olympiad", "unknown benchmark 'olympiad'; did you mean 'olympiadbench'?"),
        ("maths", "unknown benchmark 'maths'; did you mean 'math'?"),
        ("zzz", "unknown benchmark 'zzz'; valid: aime24, aime_1983_2023"),
        ("suites", "unknown benchmark 'suites'"),
        ("../aime24", "unknown benchmark '../aime24'"),
        (" , ", "name a benchmark (aime24, "),
    ],
)
def test_unknown_names(asked, message):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refusal:
        load_benchmarks([asked])
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 1.0}, "unknown key 'temprature'; did you mean 'temperature'?"),
        ({"hub": {"path": "a/b", "split": "test", "revison": "main"}}, "hub: unknown key 'revison'"),
        ({"template": "Think."}, "template must contain {problem}"),
        ({"samples": 4, "temperature": 0.0}, "at temperature 0 all 4 samples are the same"),
        ({"hub": None, "file": None}, "problems come from `generate`, or else"),
        ({"count": 0}, "count: Input should be greater than 0"),
        ({"grader": {"type": "mathematical"}}, "grader: Input tag 'mathematical'"),
        ({"name": "other"}, "its name is 'other'; name the file other.yaml"),
    ],
)
def test_wrong_definitions(tmp_path, changes, message):
    path = tmp_path / "aime24.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load((definitions_dir() / path.name).read_text()), **changes}))
    with pytest.raises(ValueError, match=r"aime24\.yaml: ") as refusal:
        load_definition(path)
    assert message in str(refusal.value)


def test_unreadable_definitions(tmp_path):
    path = tmp_path / "x.yaml"
    for content, message in (("[1, 2]", "a mapping of keys is expected"), ("{", "not readable as YAML")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_definition(path)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"id": f"aime24/{60 + i}", "problem": f"Problem {i}?", "answer": f"{i:03}"} for i in range(count)]


def test_a_local_file(tmp_path):
    write(tmp_path / "aime24.jsonl", numbered(30))
    found = load_problems(one("aime24"), tmp_path)
    prompt = found.prompts[7]
    assert (prompt.id, prompt.content, prompt.answer, prompt.task) == ("aime24/67", "Problem 7?", "7", "aime24")
    assert found.golds[7] == ("7",)
    assert found.source == str(tmp_path / "aime24.jsonl")
    assert found.revision is not None
    assert found.revision.startswith("sha256:")
    # The same problems in another file have the same hash, and other problems another.
    (tmp_path / "aime24.jsonl").unlink()
    with gzip.open(tmp_path / "aime24.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"id": str(60 + i), **row}) + "\n" for i, row in enumerate(numbered(30)))
    again = load_problems(one("aime24"), tmp_path)
    assert (again.prompts, again.sha256) == (found.prompts, found.sha256)
    assert again.revision != found.revision
    write(tmp_path / "aime24.jsonl", [*numbered(29), {"id": "x", "problem": "Another?", "answer": 29}])
    assert load_problems(one("aime24"), tmp_path).sha256 != found.sha256


@pytest.mark.parametrize("count", [0, 29, 31])
def test_a_wrong_count_names_both_numbers(tmp_path, count):
    write(tmp_path / "aime24.jsonl", numbered(count))
    with pytest.raises(ValueError, match=rf"aime24\.jsonl: {count} problems, but aime24 has 30;"):
        load_problems(one("aime24"), tmp_path)


def test_a_missing_file_names_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"math500\.jsonl: no such file.*leave .* out to load HuggingFaceH4/MATH-500"):
        load_problems(one("math500"), tmp_path)
    with pytest.raises(ValueError, match=r"aime24 has no data set on the hub: name .* holds aime24\.jsonl"):
        load_problems(one("aime24", hub=None))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "aime24/60", "problem": "?", "answer": "1"}, "some ids of aime24 occur more than once"),
        ({"id": "x", "problem": "?", "answer": "1/2"}, r"aime24\.jsonl:30: the answer '1/2' is not an integer"),
        ({"id": "x", "problem": "?", "answer": ""}, r"aime24\.jsonl:30: the answer .* is empty"),
        ({"id": "x", "question": "?", "answer": "1"}, r"aime24\.jsonl:30: no column 'problem'"),
    ],
)
def test_wrong_rows(tmp_path, row, message):
    write(tmp_path / "aime24.jsonl", [*numbered(29), row])
    with pytest.raises(ValueError, match=message):
        load_problems(one("aime24"), tmp_path)


def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], split: str) -> str:
    """A data set as the hub stores it, in a folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "stored"
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def from_hub(benchmark: Benchmark, path: str, **keys: Any) -> Benchmark:
    assert benchmark.hub is not None
    changes = {"path": path, "name": None, **keys}
    return one(benchmark.name, hub={**benchmark.hub.model_dump(), **changes})


def test_lists_of_answers_and_dollars(tmp_path, monkeypatch):
    rows = [
        {"id": 1606, "question": "How many?", "final_answer": ["$2$"], "image": b"large"},
        {"id": 1700, "question": "Which?", "final_answer": ["$1$,$-1$", "±1"], "image": None},
    ]
    path = stored(tmp_path, monkeypatch, rows, "train")
    found = load_problems(from_hub(one("olympiadbench"), path, count=2))
    assert found.golds == (("2",), ("1,-1", "±1"))
    assert [prompt.answer for prompt in found.prompts] == ["2", "1,-1"]
    assert [prompt.id for prompt in found.prompts] == ["olympiadbench/1606", "olympiadbench/1700"]
    assert found.source == f"{path}, train"
    assert found.revision == "91184b52131e7fc9455fef848035173aea8cc01a"


def test_answers_after_a_mark(tmp_path, monkeypatch):
    rows = [
        {"question": "Eggs?", "answer": "16 - 3 = <<16-3=13>>13\n#### 1,300"},
        {"question": "Ducks?", "answer": "#### -2"},
    ]
    found = load_problems(from_hub(one("gsm8k"), stored(tmp_path, monkeypatch, rows, "test"), count=2))
    assert [prompt.answer for prompt in found.prompts] == ["1300", "-2"]
    assert [prompt.id for prompt in found.prompts] == ["gsm8k/0", "gsm8k/1"]


def test_rows_that_are_left_out(tmp_path, monkeypatch):
    rows = [{"Year": year, "Question": f"Of {year}?", "Answer": "7"} for year in (1983, 2024, 2023)]
    found = load_problems(from_hub(one("aime_1983_2023"), stored(tmp_path, monkeypatch, rows, "train"), count=2))
    assert [prompt.content for prompt in found.prompts] == ["Of 1983?", "Of 2023?"]


def test_floats_that_are_integers(tmp_path, monkeypatch):
    rows = [{"id": i, "problem": f"{i}?", "answer": float(i - 3)} for i in range(83)]
    found = load_problems(from_hub(one("amc23_83"), stored(tmp_path, monkeypatch, rows, "train")))
    assert [prompt.answer for prompt in found.prompts[:5]] == ["-3", "-2", "-1", "0", "1"]


def test_the_revision_of_what_was_loaded():
    sha = "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
    files = {f"hf://datasets/HuggingFaceH4/MATH-500@{sha}/test.jsonl": {"num_bytes": 1, "checksum": None}}
    assert hub.loaded_revision(SimpleNamespace(info=SimpleNamespace(download_checksums=files))) == sha
    for nothing in (None, {}, {"/home/me/data.parquet": {}}):
        assert hub.loaded_revision(SimpleNamespace(info=SimpleNamespace(download_checksums=nothing))) is None


def test_the_generated_one():
    found = load_problems(one("arithmetic"), Path("nowhere"))
    assert len(found.prompts) == 512
    assert (found.source, found.revision) == ("generated", None)
    assert found == load_problems(one("arithmetic"))
    for prompt in found.prompts:
        assert isinstance(prompt.content, str)
        assert split_of(prompt.content) == "test"
        assert prompt.answer == answer(prompt.content)
    # The problems of the embedded recipes: 3 to 5 digits, added.
    assert {prompt.content.count("+") for prompt in found.prompts if isinstance(prompt.content, str)} == {2, 3, 4}
    assert found.sha256 == load_problems(one("arithmetic")).sha256
    assert found.sha256 != load_problems(one("arithmetic", count=511)).sha256


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
@pytest.mark.parametrize("name", COUNTS)
def test_real_files(name):
    found = load_problems(one(name), DATA)
    assert len(found.prompts) == len(found.golds) == COUNTS[name]
    assert len({prompt.id for prompt in found.prompts}) == COUNTS[name]
    assert all(prompt.id.startswith(f"{name}/") for prompt in found.prompts)
    assert len({(prompt.content, prompt.images) for prompt in found.prompts}) == COUNTS[name]
    assert all(prompt.answer == golds[0] for prompt, golds in zip(found.prompts, found.golds, strict=True))
    assert not any("$" in gold for golds in found.golds for gold in golds) or name in ("math500", "minerva_math")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
def test_the_two_forms_of_amc():
    (small, large) = (load_problems(one(name), DATA) for name in ("amc23", "amc23_83"))
    assert {p.content for p in small.prompts} <= {p.content for p in large.prompts}
    assert large.prompts[0].answer == "142"


def test_the_template_goes_around_the_problem(tmp_path):
    """Through the encoder that training uses: braces in problems and templates stay as they are."""
    from remix.config import PromptConfig

    class Characters:
        chat_template = None

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [list(map(ord, text)) for text in texts]}

        def apply_chat_template(self, *_: Any, **__: Any) -> Any:
            raise AssertionError

    rows = [{**row, "problem": "Find $\\frac{1}{2}${problem}"} if i == 0 else row for i, row in enumerate(numbered(30))]
    write(tmp_path / "aime24.jsonl", rows)
    benchmark = one("aime24")
    config = PromptConfig(template=benchmark.template, system=benchmark.system, max_tokens=1000)
    encoded = encode(load_problems(benchmark, tmp_path).prompts, Characters(), config)
    assert "".join(map(chr, encoded[0].token_ids)) == (
        "Find $\\frac{1}{2}${problem} Let's think step by step and output the final answer within \\boxed{}."
    )
