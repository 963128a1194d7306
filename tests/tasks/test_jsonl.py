"""Local files: columns, limits, the held-out share, and what is said about a broken file."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from remix.config import JsonlTask
from remix.tasks import load_tasks
from remix.types import Prompt

BENCHMARKS = Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(count: int) -> list[dict[str, object]]:
    return [{"id": f"q{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]


def load(split: str = "train", **keys: object) -> tuple[Prompt, ...]:
    (task,) = load_tasks([JsonlTask(**{"holdout": 0.0, **keys})], split)
    return task.prompts


def refuses(path: str, **keys: object) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refusal:
        load(path=path, **keys)
    return str(refusal.value)


def test_rows_become_prompts_in_order(tmp_path):
    path = write(tmp_path / "sums.jsonl", *numbered(2))
    assert load(path=path) == (
        Prompt("q0", "What is 0 + 0?", "0", "sums"),
        Prompt("q1", "What is 1 + 1?", "2", "sums"),
    )


def test_columns_numbers_and_row_ids(tmp_path):
    path = write(tmp_path / "x.jsonl", {"q": "2+2?", "a": 4}, {"q": "1/2?", "a": 0.5})
    prompts = load(path=path, problem="q", answer="a", id=None)
    assert [(p.id, p.answer) for p in prompts] == [("x/0", "4"), ("x/1", "0.5")]


def test_an_id_of_zero_is_an_id(tmp_path):
    assert load(path=write(tmp_path / "x.jsonl", {"id": 0, "problem": "p", "answer": 0}))[0].id == "0"


def test_gzip_blank_lines_and_unicode(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    row = json.dumps({"id": "é", "problem": "√4 {x}", "answer": "2"}, ensure_ascii=False)
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.write(f"\n{row}\n\n")
    assert load(path=str(path)) == (Prompt("é", "√4 {x}", "2", "x"),)


def test_a_conversation_as_problem(tmp_path):
    turns = [{"role": "user", "content": "1+1?"}]
    (prompt,) = load(path=write(tmp_path / "x.jsonl", {"id": "a", "problem": turns, "answer": "2"}))
    assert prompt.content == ({"role": "user", "content": "1+1?"},)


def test_limit_is_the_first_rows_and_not_those_of_the_evaluation(tmp_path):
    path, held = write(tmp_path / "x.jsonl", *numbered(10)), write(tmp_path / "test.jsonl", *numbered(7))
    assert [p.id for p in load(path=path, limit=3)] == ["q0", "q1", "q2"]
    assert len(load("test", path=path, eval_path=held, limit=3)) == 7
    assert len(load("train", path=path, eval_path=held, holdout=0.5)) == 10  # nothing is cut off


def test_holdout_parts_the_file_and_follows_the_text_alone(tmp_path):
    rows = numbered(1000)
    path = write(tmp_path / "x.jsonl", *rows)
    train = {p.id for p in load("train", path=path, holdout=0.1)}
    test = {p.id for p in load("test", path=path, holdout=0.1)}
    assert not train & test
    assert len(train | test) == 1000
    assert 70 <= len(test) <= 130  # binomial, standard deviation 9.5
    # Fewer rows, another order, other ids: each problem stays on its side.
    half = [{**row, "id": f"new-{row['id']}"} for row in reversed(rows[:500])]
    kept = {p.id for p in load("test", path=write(tmp_path / "y.jsonl", *half), holdout=0.1)}
    assert kept == {f"new-q{i}" for i in range(500) if f"q{i}" in test}
    # A larger share only adds.
    assert test <= {p.id for p in load("test", path=path, holdout=0.3)}


def test_copies_of_a_problem_stay_together(tmp_path):
    rows = [{"id": f"{i}-{copy}", "problem": f"p{i}", "answer": "1"} for i in range(50) for copy in "ab"]
    test = {p.id for p in load("test", path=write(tmp_path / "x.jsonl", *rows), holdout=0.5)}
    assert 0 < len(test) < 100
    assert all((f"{i}-a" in test) == (f"{i}-b" in test) for i in range(50))


def test_missing_file(tmp_path):
    message = refuses(str(tmp_path / "no.jsonl"))
    assert "no.jsonl: no such file" in message
    assert "working directory" in message


def test_a_line_that_is_not_json(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1, "problem": "p", "answer": "a"}\n{"id": 2,\n')
    assert "x.jsonl:2: not JSON" in refuses(str(path))
    path.write_text("[1, 2]\n")
    assert "x.jsonl:1: a list; each line has to be one JSON object" in refuses(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": 1, "problem": "p", "answer": ' + b"9" * 5000 + b"}", "not JSON"),  # more digits than Python reads
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"id": "\xff"}', "not UTF-8"),
        (b'{"id": 1, "problem": "p", "answer": NaN}', "the answer (column 'answer') is no finite number"),
        (b'{"id": 1, "problem": "p", "answer": 1e999}', "the answer (column 'answer') is no finite number"),
        (b'{"id": "a\\ud800", "problem": "p", "answer": "a"}', "the id (column 'id') is not text: it holds half"),
        (b'{"id": 1, "problem": "\\ud800", "answer": "a"}', "the problem (column 'problem') is not text"),
        (
            b'{"id": 1, "problem": [{"role": "user", "content": "\\ud800"}], "answer": "a"}',
            "the problem (column 'problem') is a list, not text",
        ),
        (b'{"\\ud800": 1}', r"no column 'id' among '\ud800'"),
        (b'{"' + b"k" * 50_000 + b'": 1}', "no column 'id'"),
    ],
)
def test_every_refusal_names_its_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": 0, "problem": "p", "answer": "a"}\n' + line + b"\n")
    found = refuses(str(path))
    assert f"x.jsonl:2: {message}" in found
    assert found.isprintable()
    assert len(found) < 3000


def test_a_whole_number_of_many_digits_is_an_answer(tmp_path):
    path = write(tmp_path / "x.jsonl", {"id": 1, "problem": "p", "answer": 10**400})
    assert load(path=path)[0].answer == str(10**400)


@pytest.mark.parametrize("damage", [lambda stream: stream[:-20], lambda stream: b"x" + stream, lambda _: b"{}\n"])
def test_a_broken_gzip_stream(tmp_path, damage):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"id": 0, "problem": "p", "answer": "a"}\n' * 1000)))
    assert re.search(r"x\.jsonl\.gz:\d+: cannot be read \(.*\); copy the file anew", refuses(str(path), id=None))


def test_a_name_too_long_for_a_file(tmp_path):
    assert "no such file" in refuses(str(tmp_path / ("x" * 300)))


def test_missing_column_names_the_nearest(tmp_path):
    path = write(tmp_path / "x.jsonl", {"id": "1", "problem_text": "p", "answer": "a"})
    message = refuses(path)
    assert "x.jsonl:1: no column 'problem' among 'id', 'problem_text', 'answer'" in message
    assert "did you mean 'problem_text'?" in message
    assert "null to number the rows" in refuses(write(tmp_path / "y.jsonl", {"problem": "p", "answer": "a"}))


@pytest.mark.parametrize(
    ("key", "cell", "found"),
    [("answer", None, "empty"), ("answer", " ", "empty"), ("problem", "", "empty"), ("answer", ["1"], "a list")],
)
def test_empty_cells_name_the_row(tmp_path, key, cell, found):
    rows = [*numbered(2), {"id": "z", "problem": "p", "answer": "a", key: cell}]
    message = refuses(write(tmp_path / "x.jsonl", *rows))
    assert f"x.jsonl:3: the {key} (column '{key}') is {found}" in message


def test_duplicate_ids_name_both_rows(tmp_path):
    path = write(tmp_path / "x.jsonl", *numbered(2), {"id": "q0", "problem": "p", "answer": "a"})
    message = refuses(path)
    assert "x.jsonl:3: the id 'q0' is also that of" in message
    assert "x.jsonl:1;" in message


def test_nothing_left_on_one_side(tmp_path):
    path = write(tmp_path / "x.jsonl", *numbered(3))
    assert "task 'x' has no train problems" in refuses(path, holdout=1.0)
    with pytest.raises(ValueError, match=r"task 'x' has no test problems.*`eval_path`.*`holdout: 0`"):
        load("test", path=path, holdout=1e-9)
    with pytest.raises(ValueError, match="no task has held-out problems"):
        load("test", path=path, holdout=0.0)
    assert "is not empty" in refuses(write(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(
    ("name", "rows"), [("gsm8k_train.jsonl", 7473), ("math_train.jsonl", 7498), ("deepscaler_40k.jsonl.gz", 40309)]
)
def test_real_files_load_whole(name, rows):
    path = BENCHMARKS / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    train = load("train", path=str(path), holdout=0.02)
    test = load("test", path=str(path), holdout=0.02)
    assert len(train) + len(test) == rows
    assert 0.015 * rows < len(test) < 0.025 * rows
    assert not {p.content for p in train} & {p.content for p in test}


def test_images_are_paths_beside_the_file(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/c.png", "d.png"):
        (tmp_path / name).touch()
    rows = [{"problem": "p", "answer": 1, "pics": pics} for pics in ("a.png", ["b/c.png", "d.png"], [], None)]
    prompts = load(path=write(tmp_path / "x.jsonl", *rows), id=None, images="pics")
    inside = [tuple(str(tmp_path / name) for name in names) for names in (["a.png"], ["b/c.png", "d.png"])]
    assert [p.images for p in prompts] == [*inside, (), ()]
    assert load(path=write(tmp_path / "y.jsonl", *rows), id=None)[0].images == ()


@pytest.mark.parametrize("pics", ["/etc/hostname", "../a.png", ["b/../../a.png"]])
def test_no_path_leads_out_of_the_files_folder(tmp_path, pics):
    (tmp_path / "a.png").touch()
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "x.jsonl", {"problem": "p", "answer": 1, "pics": pics})
    assert "leads out of the folder" in refuses(path, id=None, images="pics")


def test_an_image_that_is_missing_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl", {"problem": "p", "answer": 1, "pics": "gone.png"})
    assert "gone.png" in refuses(path, id=None, images="pics")


@pytest.mark.parametrize("pics", [3, [3], [""], {"path": "a.png"}])
def test_what_is_no_path_is_refused(tmp_path, pics):
    path = write(tmp_path / "x.jsonl", {"problem": "p", "answer": 1, "pics": pics})
    assert "x.jsonl:1: the images (column 'pics') hold" in refuses(path, id=None, images="pics")
    assert "no column 'picture'" in refuses(path, id=None, images="picture")


def test_one_question_about_many_pictures_is_on_both_sides(tmp_path):
    """The held-out share is cut by question and pictures, whatever folder they lie in."""
    rows = [{"problem": "What colour?", "answer": "red", "pics": f"{i}.png"} for i in range(200)]
    sides = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for row in rows:
            (tmp_path / folder / row["pics"]).touch()
        path = write(tmp_path / folder / "x.jsonl", *rows)
        held_out = load("test", path=path, id=None, images="pics", holdout=0.3)
        assert 30 < len(held_out) < 90
        sides.append([p.id for p in held_out])
    assert sides[0] == sides[1]
