"""Data sets through `datasets`, offline: local folders and files stand for those of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remix.config import HubTask
from remix.tasks import load_tasks
from remix.types import Prompt

ROWS = [{"question": f"{i}+{i}", "answer": str(2 * i), "difficulty": i} for i in range(20)]


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set as the hub stores it: one Parquet file per split."""
    from datasets import Dataset

    path = tmp_path / "sums"
    (path / "data").mkdir(parents=True)
    Dataset.from_list(ROWS).to_parquet(path / "data" / "train-00000-of-00001.parquet")
    Dataset.from_list(ROWS[:5]).to_parquet(path / "data" / "test-00000-of-00001.parquet")
    return path


def load(side: str = "train", /, **keys: object) -> tuple[Prompt, ...]:
    (task,) = load_tasks([HubTask(**{"problem": "question", "holdout": 0.0, **keys})], side)
    return task.prompts


def test_a_folder_with_splits(folder):
    train = load(path=str(folder))
    assert len(train) == 20
    assert train[3] == Prompt("sums/3", "3+3", "6", "sums")
    assert [p.answer for p in load("test", path=str(folder), eval_split="test")] == ["0", "2", "4", "6", "8"]


def test_limit_slices_and_columns(folder):
    assert len(load(path=str(folder), limit=7)) == 7
    assert len(load(path=str(folder), limit=700)) == 20
    assert [p.content for p in load(path=str(folder), split="train[5:7]")] == ["5+5", "6+6"]
    assert load(path=str(folder), answer="difficulty", id="question")[2] == Prompt("2+2", "2+2", "2", "sums")


def test_holdout_without_an_evaluation_split(folder):
    train = {p.content for p in load("train", path=str(folder), holdout=0.3)}
    test = {p.content for p in load("test", path=str(folder), holdout=0.3)}
    assert len(train) + len(test) == 20
    assert not train & test


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_single_file(folder, tmp_path, suffix):
    if suffix == "parquet":
        path = folder / "data" / "train-00000-of-00001.parquet"
    else:
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [p.answer for p in load(path=str(path))] == [row["answer"] for row in ROWS]


def test_what_is_wrong_is_said_in_one_line(folder, tmp_path):
    def refusal(**keys: object) -> str:
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
            load(**keys)
        return str(caught.value)

    message = refusal(path=str(folder), split="validation")
    assert "split validation) cannot be loaded" in message
    assert "check `path`" in message
    assert "cannot be loaded" in refusal(path=str(tmp_path / "nowhere" / "at" / "all"))
    message = refusal(path=str(folder), problem="questoin")
    assert "row 0: no column 'questoin' among 'question', 'answer', 'difficulty'; did you mean 'question'?" in message
    (tmp_path / "x.txt").write_text("hello")
    assert "files are read by suffix, one of .parquet" in refusal(path=str(tmp_path / "x.txt"))


def test_what_was_fetched_before_is_there_without_a_network(folder, tmp_path):
    """What `datasets` keeps of a data set of the hub; of a local one it differs in the folder's name alone."""
    load(path=str(folder))
    (made,) = (tmp_path / "cache").glob("*/default*/0.0.0/*/dataset_info.json")
    kept = tmp_path / "cache" / "owner___sums" / "default" / "0.0.0" / ("a" * 40)
    kept.parent.mkdir(parents=True)
    made.parent.rename(kept)
    assert [p.answer for p in load(path="owner/sums")][:3] == ["0", "2", "4"]
