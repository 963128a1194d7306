"""The folder of an evaluation: what it keeps, whom it lets in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from remix.evaluation.exam import Response
from remix.evaluation.storage import Store

IDENTITY = {"model": {"path": "/a", "weights": "1"}, "adapter": None, "benchmarks": {"sums": {"samples": 2}}}
FIRST = Response("sums/0", 0, 5, "half \ud83d a character", 3, False, "correct", "x\udc00")


def test_chunks_come_back(tmp_path: Path) -> None:
    with Store(tmp_path / "out", IDENTITY, resume=False) as store:
        store.begin()
        store.add("sums", [FIRST, replace(FIRST, sample=1)])
    with Store(tmp_path / "out", IDENTITY, resume=True) as store:
        store.add("sums", [replace(FIRST, problem="sums/1", verdict="no_answer", extracted=None)])
        found = store.responses("sums")
        assert store.responses("other") == {}
    assert [*found] == [("sums/0", 0), ("sums/0", 1), ("sums/1", 0)]
    assert found["sums/0", 0] == replace(FIRST, text="half ? a character", extracted="x?")
    assert found["sums/1", 0].extracted is None
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.parquet")) == ["00000.parquet", "00001.parquet"]


def test_a_half_written_chunk_is_no_chunk(tmp_path: Path) -> None:
    with Store(tmp_path, IDENTITY, resume=False) as store:
        store.begin()
        store.add("sums", [FIRST])
        (tmp_path / "generations/sums/00001.parquet.tmp").write_bytes(b"PAR1 and then the power went")
        assert len(store.responses("sums")) == 1
        store.add("sums", [replace(FIRST, sample=1)])
        assert len(store.responses("sums")) == 2


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        Store(tmp_path / "out", IDENTITY, resume=False),
        pytest.raises(ValueError, match="another process is writing there"),
    ):
        Store(tmp_path / "out", IDENTITY, resume=True)


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "out", IDENTITY, resume=True):
        assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()


def test_differences_are_named(tmp_path: Path) -> None:
    with Store(tmp_path, IDENTITY, resume=False) as store:
        store.begin()
    # The same bytes at another place are the same model.
    Store(tmp_path, {**IDENTITY, "model": {"path": "/b", "weights": "1"}}, resume=True).close()
    other = {**IDENTITY, "model": {"path": "/b", "weights": "2"}, "benchmarks": {"sums": {"samples": 4}, "more": {}}}
    with pytest.raises(ValueError, match="holds another evaluation") as error:
        Store(tmp_path, other, resume=True)
    for named in ('model.path was "/a", now "/b"', 'model.weights was "1", now "2"', "sums.samples was 2, now 4",
                  "benchmarks.more was not there, now {}"):  # fmt: skip
        assert named in str(error.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        Store(tmp_path / "out", IDENTITY, resume=True)
