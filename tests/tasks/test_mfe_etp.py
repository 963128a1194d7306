"""MFE-ETP's annotations, on small files of the same form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from remix.config import ExactMatchReward, MfeEtpTask
from remix.rewards import RewardSuite
from remix.tasks import load_tasks
from remix.types import Prompt

ACTIONS = ["You are a robot. Choose an action: '''\nnavigate_to,\ngrasp'''.", "As a robot, choose from '''grasp'''."]


def write(folder: Path, kind: str, rows: list[dict[str, Any]], **metadata: Any) -> None:
    (folder / kind / "images").mkdir(parents=True, exist_ok=True)
    for row in rows:
        for name in row["task_instance"]["images_path"]:
            Image.new("RGB", (2, 2)).save(folder / kind / "images" / name)
    value = {"metadata": {"dataset": kind, "split": "core", "num_sample": len(rows), **metadata}, "data": rows}
    (folder / kind / "data.json").write_text(json.dumps(value))


def row(context: str, response: str, images: list[str], **changes: Any) -> dict[str, Any]:
    instance = {"task_name": "bottling_fruit", "context": context, "images_path": images}
    return {"sample_id": 0, "task_instance": instance, "response": response, "task_instruction_id": 1, **changes}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write(folder, "affordance", [row("How do you lift it?", "Grasp", ["a_0.jpg", "a_1.jpg"])], task_instruction=ACTIONS)
    order = row("Order the images from far to near.", "3,1,2", ["b_0.jpg", "b_1.jpg", "b_2.jpg"])
    write(folder, "spatial_perception", [order], task_instruction=["Look.", "Answer."])
    plan = {"task_name": "a", "task_description": "Bottle the fruit.", "images_path": ["c_0.jpg"]}
    write(folder, "task_planning", [{"sample_id": 0, "task_instance": plan}])
    return folder


def load(data: Path, *kinds: str, split: str = "train", **changes: Any) -> list[Prompt]:
    config = MfeEtpTask(path=str(data), kinds=kinds, **{"holdout": 0.0, **changes})
    (task,) = load_tasks([config], split)
    return list(task.prompts)


def test_instruction_context_images_and_response(data):
    one, two = load(data, "affordance", "spatial_perception")
    assert (one.id, one.task, one.answer) == ("mfe_etp/affordance/0", "mfe_etp", "Grasp")
    assert one.content == f"{ACTIONS[1]}\nHow do you lift it?"
    assert one.images == tuple(str(data / "affordance/images" / name) for name in ("a_0.jpg", "a_1.jpg"))
    assert (two.content, two.answer, len(two.images)) == ("Answer.\nOrder the images from far to near.", "3,1,2", 3)
    assert load(data, "affordance")[0].task == "affordance"  # a task of one kind goes by it


def test_its_answers_are_checked_without_a_judge(data):
    prompts = load(data, "affordance", "spatial_perception")
    suite = RewardSuite([ExactMatchReward(normalize=True)])
    answers = [["Grasp", "grasp", "'Grasp'.", "Grasp it", "slice"], ["3,1,2", "3, 1, 2", "[3, 1, 2]", "3,2,1", "312"]]
    for prompt, said in zip(prompts, answers, strict=True):
        scores = suite.score([prompt] * len(said), said, [1] * len(said))
        assert [score.value for score in scores] == [1, 1, 1, 0, 0]
    suite.close()


def test_what_has_no_response_is_refused_or_dropped(data):
    with pytest.raises(
        ValueError, match=r"no response, .* leave 'task_planning' out of `kinds`, or .*`unanswered: drop`"
    ):
        load(data, "affordance", "task_planning")
    assert len(load(data, "affordance", "task_planning", unanswered="drop")) == 1
    with pytest.raises(ValueError, match=r"'task_planning' has no train problems; check .*`kinds`"):
        load(data, "task_planning", unanswered="drop")


def test_a_share_is_held_out_by_image(data):
    rows = [row(f"Question {i}?", "Grasp", [f"d_{i // 4}.jpg"]) for i in range(80)]
    write(data, "operation", rows, task_instruction=ACTIONS)
    train, test = (load(data, "operation", split=split, holdout=0.3) for split in ("train", "test"))
    assert len(train) + len(test) == 80
    assert test
    assert not {p.images for p in train} & {p.images for p in test}


def test_the_default_kinds_have_answers_that_can_be_checked():
    assert MfeEtpTask(path="data").kinds == ("affordance", "operation", "sequence", "spatial_perception")


def test_an_unknown_kind_names_the_nearest(data, tmp_path):
    with pytest.raises(ValueError, match="has no kind 'afordance'; did you mean 'affordance'"):
        load(data, "afordance")
    with pytest.raises(ValueError, match=r"holds no KIND/data.json at all: set `path`"):
        load(tmp_path / "elsewhere", "affordance")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_instruction_id": 2}, r"data\[0\]: task_instruction_id 2 is none of"),
        ({"task_instruction_id": -1}, "task_instruction_id -1 is none of"),
        ({"task_instance": []}, "'task_instance' is a list; it has to be a dict"),
        ({"task_instance": {"context": "?", "images_path": "a_0.jpg"}}, "'images_path' is a str; it has to be a list"),
        ({"task_instance": {"context": "?", "images_path": ["../data.json"]}}, "leads out of the folder of images"),
        ({"task_instance": {"context": "?", "images_path": ["none.jpg"]}}, "no image .*none.jpg"),
        ({"task_instance": {"images_path": ["a_0.jpg"]}}, "no column 'task_description'"),
        ({"response": ["Grasp"]}, "is a list, not text"),
    ],
)
def test_what_is_wrong_with_an_annotation_is_said(data, changes, message):
    path = data / "affordance/data.json"
    value = json.loads(path.read_text())
    value["data"][0].update(changes)
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        load(data, "affordance")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it has to be an object"),
        ({"data": []}, "no column 'metadata'"),
        ({"metadata": {}, "data": 3}, "'data' is a"),
    ],
)
def test_a_file_of_another_form_is_refused(data, value, message):
    (data / "affordance/data.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        load(data, "affordance")
