"""CoIN's annotations in their training and their test form, on small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from remix.config import CoinTask
from remix.tasks import load_tasks
from remix.tasks.images import open_image
from remix.types import Prompt


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of twenty one-pixel images, in folders of their own as data sets have them."""
    for number in range(20):
        path = tmp_path / f"cl_dataset/COCO2014/train2014/{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1), (number, 0, 0)).save(path)
    return tmp_path / "cl_dataset"


def write(path: Path, rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return str(path)


def image(number: int) -> str:
    return f"COCO2014/train2014/{number:02}.png"


def load(path: str, images: Path, split: str = "train", **changes: Any) -> list[Prompt]:
    (task,) = load_tasks([CoinTask(path=path, images=str(images), **{"holdout": 0.0, **changes})], split)
    return list(task.prompts)


def test_the_training_form(tmp_path, images):
    rows = [
        {"id": "7", "image": image(0), "conversations": turns("<image>\nWhat is it?\nUse one word.", "cat")},
        {
            "id": 7,
            "image": image(1),
            "conversations": turns("What is it?\n<image>", " a dog ", "And its colour?", "red"),
        },
        {"id": "9", "conversations": turns("Which is a metal?\nA. Tin\nB. Tea", "A")},
    ]
    path = write(tmp_path / "GQA/train.json", rows)
    one, two, three, four = load(path, images)
    assert (one.content, one.answer, one.task) == ("What is it?\nUse one word.", "cat", "GQA")
    assert one.images == (str(images / image(0)),)
    assert open_image(one.images[0]).getpixel((0, 0)) == (0, 0, 0)
    assert (two.content, two.answer) == ("What is it?", "a dog")
    # A later question comes with all before it.
    assert three.content == (
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "And its colour?"},
    )
    assert (three.answer, three.images) == ("red", two.images)
    assert (four.content, four.answer, four.images) == ("Which is a metal?\nA. Tin\nB. Tea", "A", ())
    assert [p.id for p in (one, two, three, four)] == [
        "GQA/train/0", "GQA/train/1/0", "GQA/train/1/1", "GQA/train/2",
    ]  # fmt: skip
    assert [p.answer for p in load(path, images, limit=2)] == ["cat", "a dog"]


def test_the_test_form(tmp_path, images):
    train = write(
        tmp_path / "Grounding/train.json", [{"image": image(0), "conversations": turns("Where?", "[0,0,1,1]")}]
    )
    rows = [
        {
            "question_id": 0,
            "image": image(1),
            "text": "Where is the cat?",
            "answer_bbox": "[0.1,0.2,0.3,0.4]",
            "size": [9],
        },
        {"question_id": 1, "image": image(2), "text": "How many?\nUse one word.", "answer": 3},
    ]
    held_out = write(tmp_path / "Grounding/test.json", rows)
    box, number = load(train, images, "test", eval_path=held_out)
    assert (box.id, box.content, box.answer) == ("Grounding/test/0", "Where is the cat?", "[0.1,0.2,0.3,0.4]")
    assert (number.answer, number.images) == ("3", (str(images / image(2)),))
    assert [p.id for p in load(train, images, eval_path=held_out)] == ["Grounding/train/0"]


def test_an_image_is_held_out_with_all_its_questions(tmp_path, images):
    rows = [
        {"image": image(number), "conversations": turns(f"Question {question}?", "yes")}
        for number in range(20)
        for question in range(5)
    ]
    path = write(tmp_path / "VQAv2/train.json", rows)
    train, test = (load(path, images, split, holdout=0.3) for split in ("train", "test"))
    kept, held_out = ({p.images[0] for p in prompts} for prompts in (train, test))
    assert len(train) + len(test) == 100
    assert (len(train), len(test)) == (5 * len(kept), 5 * len(held_out))
    assert held_out
    assert not kept & held_out
    moved = tmp_path / "moved"
    images.rename(moved)  # the same images elsewhere are held out again
    assert {Path(p.images[0]).name for p in load(path, moved, "test", holdout=0.3)} == {Path(p).name for p in held_out}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "none.png"}, r"train.json\[0\]: no image .*none.png; set the folder"),
        ({"image": "../secret.png"}, "leads out of the folder of images"),
        ({"image": "COCO2014/../../secret.png"}, "leads out of the folder of images"),
        ({"image": "/etc/passwd"}, "leads out of the folder of images"),
        ({"image": "..\\secret.png"}, "leads out of the folder of images"),
        ({"image": ["a.png"]}, "is no image's path"),
        ({"image": "a\0.png"}, "is no image's path"),
        ({"conversations": "What?"}, r"conversations: a str; it has to be a list"),
        ({"conversations": ["What?"]}, r"conversations\[0\]: a str; each annotation has to be an object"),
        ({"conversations": []}, "0 turns; each question"),
        ({"conversations": turns("What?")}, "1 turns; each question of 'human' needs an answer"),
        ({"conversations": turns("a", "b")[::-1]}, "from 'gpt'; turns have to be those of 'human' and 'gpt'"),
        (
            {"conversations": [{"from": "human", "value": 3}, *turns("", "b")[1:]]},
            "'value' is a int; it has to be a str",
        ),
        ({"conversations": turns("<image>", "b")}, "the question is empty or names several images"),
        ({"conversations": turns("<image> <image> both?", "b")}, "the question is empty or names several images"),
        ({"conversations": turns("What?", " ")}, "the answer is empty; .* `unanswered: drop`"),
    ],
)
def test_what_is_wrong_with_an_annotation_is_said(tmp_path, images, row, message):
    (tmp_path / "secret.png").write_bytes((images / image(0)).read_bytes())
    path = write(tmp_path / "GQA/train.json", [{"image": image(0), "conversations": turns("What?", "a"), **row}])
    with pytest.raises(ValueError, match=message):
        load(path, images)


def test_what_is_wrong_with_a_test_annotation_is_said(tmp_path, images):
    path = write(tmp_path / "GQA/test.json", [{"question_id": 3, "image": image(0), "text": "What?"}])
    with pytest.raises(ValueError, match=r"test.json\[0\]: no column 'answer' among 'question_id', 'image', 'text'"):
        load(path, images)
    path = write(tmp_path / "GQA/test.json", [{"image": image(0), "text": "What?", "answer": ["a", "b"]}])
    with pytest.raises(ValueError, match="is a list, not text"):
        load(path, images)


def test_unanswered_questions_are_dropped_where_that_is_asked(tmp_path, images):
    rows = [{"image": image(0), "conversations": turns("What?", "")}, {"text": "What?", "answer": None}]
    rows += [{"text": "What?", "answer": "a"}]
    prompts = load(write(tmp_path / "GQA/train.json", rows), images, unanswered="drop")
    assert [p.id for p in prompts] == ["GQA/train/2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b'{"a": 1}', "a dict; it has to be a list"),
        (b"[1]", r"\[0\]: a int; each annotation has to be an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "has no train problems"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, images, content, message):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(str(path), images)


def test_a_missing_file_and_a_pickle_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match="no such file"):
        load(str(tmp_path / "none.json"), images)
    (tmp_path / "train.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="pickle"):
        load(str(tmp_path / "train.pkl"), images)
