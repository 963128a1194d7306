"""Training sets without the problems of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remix.config import HubTask, JsonlTask, load_recipe
from remix.tasks import TaskSet, load_tasks
from remix.tasks.benchmark import load_benchmarks
from remix.tasks.exclusion import load_exclusion, normalised, word_runs
from remix.tasks.problems import load_problems
from tests.tiny import ROOT

BENCHMARKS = ROOT.parent / "shared" / "data" / "benchmarks"
REPORT = BENCHMARKS / "contamination.json"

TRAIN = [
    {"id": "t0", "problem": "What is $1+1$ in binary?", "answer": "10"},
    {"id": "t1", "problem": "How many primes lie below 10?", "answer": "4"},
    {"id": "t2", "problem": "Find  the sum of 3 and 4 .", "answer": "7"},
    {"id": "t3", "problem": "∑∏", "answer": "0"},
]


def write(path: Path, rows: object) -> str:
    lines = rows if isinstance(rows, list) else [rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", TRAIN)


def load(split: str = "train", /, **keys: object) -> TaskSet:
    (task,) = load_tasks([JsonlTask(**{"holdout": 0.0, **keys})], split)
    return task


def ids(task: TaskSet) -> list[str]:
    return [prompt.id for prompt in task.prompts]


def test_normal_form_is_letters_and_digits():
    assert normalised("Find $x^{2}$, if  X = 3.\n") == "findx2ifx3"
    assert normalised("Grüße, π!") == "grüsseπ"  # letters of any script; ß folds to ss
    assert normalised("$ - $") == ""


def test_a_file_of_problems(tmp_path, train):
    held = write(
        tmp_path / "held.jsonl",
        [{"problem": "what is 1 + 1 in binary"}, {"problem": "Find the sum of $3$ and $4$."}, {"problem": "()"}],
    )
    task = load(path=train, exclude=[held])
    assert ids(task) == ["t1", "t3"]  # t3 has no letters either, but nothing equals nothing
    assert task.excluded == 2
    assert load(path=train).excluded == 0


def test_lists_of_ids(tmp_path, train):
    plain = write(tmp_path / "ids.json", [["t1", "not there"]])
    assert ids(load(path=train, exclude=[plain])) == ["t0", "t2", "t3"]
    report = {"train": {"math500": {"exact": [["m/1", "t0"], ["m/2", "t3"]], "near": ["m/9"]}, "gsm8k": {"exact": []}}}
    task = load(path=train, exclude=[write(tmp_path / "report.json", report)])
    assert (ids(task), task.excluded) == (["t1", "t2"], 2)


def test_a_benchmark_by_name(tmp_path, train):
    (benchmark,) = load_benchmarks(["aime24"])
    rows = [{"id": str(i), "problem": f"Problem {i}", "answer": str(i)} for i in range(29)]
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    write(
        folder / str(benchmark.file), [*rows, {"id": "x", "problem": "how many primes lie below $10$", "answer": "4"}]
    )
    task = load(path=train, exclude=["aime24"], exclude_dir=str(folder))
    assert (ids(task), task.excluded) == (["t0", "t2", "t3"], 1)


def test_the_held_out_share_is_clean_and_a_split_of_its_own_is_left_alone(tmp_path):
    rows = [{"id": f"q{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(200)]
    path, held = write(tmp_path / "x.jsonl", rows), write(tmp_path / "held.jsonl", rows[:50])
    train, test = (load(split, path=path, holdout=0.3, exclude=[held]) for split in ("train", "test"))
    assert train.excluded + test.excluded == 50
    assert sorted([*ids(train), *ids(test)]) == sorted(f"q{i}" for i in range(50, 200))
    alone = load("test", path=path, eval_path=held, exclude=[held])
    assert (len(alone.prompts), alone.excluded) == (50, 0)
    assert len(load("train", path=path, eval_path=held, exclude=[held]).prompts) == 150


def test_data_sets_of_the_hub_too(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [*TRAIN, {"id": "t4", "problem": "Prove it.", "answer": ""}, {"id": "t5", "problem": "And?", "answer": None}]
    path, held = write(tmp_path / "train.jsonl", rows), write(tmp_path / "held.jsonl", TRAIN[0])
    keys = {"path": path, "holdout": 0.0, "id": "id", "exclude": [held]}
    (task,) = load_tasks([HubTask(**keys, unanswered="drop")], "train")
    assert (ids(task), task.excluded) == (["t1", "t2", "t3"], 1)
    with pytest.raises(ValueError, match=r"row 4: the answer .* is empty"):
        load_tasks([HubTask(**keys)], "train")


def test_rows_without_an_answer_keep_their_number(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"problem": f"p{i}", "answer": a} for i, a in enumerate(["1", " ", None, "0"])])
    assert ids(load(path=path, id=None, unanswered="drop")) == ["x/0", "x/3"]
    with pytest.raises(ValueError, match=r"x.jsonl:2: the answer .* is empty"):
        load(path=path, id=None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("math50", "unknown benchmark 'math50'; did you mean 'math500'?"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("nowhere.json", "nowhere.json: no such file"),
        ("math500", "math500.jsonl: no such file; put the problems of math500 there"),
    ],
)
def test_refusals(tmp_path, train, entry, message):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refusal:
        load(path=train, exclude=[entry], exclude_dir=str(tmp_path))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "content", ["[1, 2]", '{"a": 3}', '{"a": {"b": {}}}', "[", '"t0"', '{"a": {"b": {"exact": ["t0"]}}}']
)
def test_lists_that_are_none(tmp_path, train, content):
    path = tmp_path / "ids.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="neither a list of ids nor a report"):
        load(path=train, exclude=[str(path)])


def test_everything_excluded(tmp_path, train):
    with pytest.raises(ValueError, match=r"task 'train' has no train problems; .* excluded whole by .*ids\.json"):
        load(path=train, exclude=[write(tmp_path / "ids.json", [[row["id"] for row in TRAIN]])])


def test_recipes_of_the_paper_leave_out_its_benchmarks():
    for path in sorted((ROOT / "recipes").glob("r1_distill_qwen_*/*.yaml")):
        (task,) = load_recipe(path).tasks
        assert isinstance(task, HubTask)
        assert (task.exclude, task.unanswered) == (("math",), "drop"), path


TEXT = "a farmer keeps hens and ducks on two meadows that lie beside a river while the neighbour"
WORDS = TEXT.split()


def test_overlap_by_hand(tmp_path):
    """17 words have 5 runs of 13; with the last k words changed, 5 - k of them are left."""
    assert len(WORDS) == 17
    held = write(tmp_path / "held.jsonl", {"problem": " ".join(WORDS) + "."})
    changed = [[*WORDS[: 17 - k], *(["so"] * k)] for k in range(6)]
    rows = [
        {"id": str(k), "problem": "Soon, " + " ".join(words).upper(), "answer": "1"} for k, words in enumerate(changed)
    ]
    path = write(tmp_path / "train.jsonl", rows)
    # At least half of 5 is 3: changed by two words it is a copy, by three it is not.
    assert ids(load(path=path, exclude=[held])) == ["3", "4", "5"]
    assert ids(load(path=path, exclude=[held], exclude_overlap=0.2)) == ["5"]
    assert ids(load(path=path, exclude=[held], exclude_overlap=1.0)) == ["1", "2", "3", "4", "5"]
    assert len(load(path=path, exclude=[held], exclude_overlap=None).prompts) == 6
    # Under 13 words there are no runs: nothing is a copy but the same.
    short = write(tmp_path / "short.jsonl", {"problem": " ".join(WORDS[:12])})
    assert load(path=path, exclude=[short]).excluded == 0


@pytest.mark.skipif(not REPORT.is_file(), reason=f"{REPORT} is not there")
@pytest.mark.parametrize(
    ("name", "file"), [("deepscaler_40k", "deepscaler_40k.jsonl.gz"), ("math_train", "math_train.jsonl")]
)
def test_real_training_sets_lose_what_was_found_in_them(name, file):
    """The search finds exactly what the report lists for each benchmark, which another program wrote."""
    (task,) = load_tasks([JsonlTask(path=str(BENCHMARKS / file), holdout=0.0)], "train")
    report = json.loads(REPORT.read_text())[name]
    texts = {prompt.id: normalised(str(prompt.content)) for prompt in task.prompts}
    dropped_by_any = set[str]()
    for benchmark in ("aime24", "amc23", "amc23_83", "math500", "minerva_math", "olympiadbench", "gsm8k"):
        found = report.get(benchmark, report["gsm8k_test"])
        excluded = load_exclusion([benchmark], str(BENCHMARKS)).texts
        dropped = {identity for identity, text in texts.items() if text in excluded}
        assert dropped == {training for _, training in found["exact"]}, benchmark
        dropped_by_any |= dropped
    assert len(dropped_by_any) == {"deepscaler_40k": 7 + 1, "math_train": 1 + 2}[name]
    keys = {"path": str(BENCHMARKS / file), "holdout": 0.0, "exclude_dir": str(BENCHMARKS)}
    by_suite = load(**keys, exclude=["math"], exclude_overlap=None)
    by_list = load(**keys, exclude=[str(REPORT)])
    assert by_suite.excluded == len(dropped_by_any)
    assert by_suite == by_list
    assert load(**keys, exclude=["math"]).excluded == {"deepscaler_40k": 33, "math_train": 29}[name]


@pytest.mark.skipif(not REPORT.is_file(), reason=f"{REPORT} is not there")
def test_no_near_copy_is_left():
    """Of the 18 + 6 problems that the report calls near, none shares half of its runs with what is kept."""
    path = str(BENCHMARKS / "deepscaler_40k.jsonl.gz")
    kept = load(path=path, exclude=["math500", "olympiadbench"], exclude_dir=str(BENCHMARKS)).prompts
    near = [
        problem
        for benchmark in load_benchmarks(["math500", "olympiadbench"])
        for problem in load_problems(benchmark, BENCHMARKS).prompts
        if problem.id in json.loads(REPORT.read_text())["deepscaler_40k"][benchmark.name]["near"]
    ]
    assert len(near) == 18 + 6
    own = [word_runs(str(problem.content)) for problem in near]
    any_of_them = set().union(*own)
    for prompt in kept:
        runs = word_runs(str(prompt.content)) & any_of_them
        assert all(2 * len(runs & of_problem) < len(of_problem) for of_problem in own), prompt.id
