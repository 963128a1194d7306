"""The page of a real run and of runs by hand: what stands in it, and that text stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from remix import cli
from remix.reporting import vega
from remix.reporting.charts import of_lines, of_run
from remix.reporting.lines import group
from remix.reporting.runs import read_run
from remix.types import Score
from tests.reporting.making import make_run, steps

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'</pre></style>{{ 3 ** 17 }}var(--x)\u202e\x1b[2J"


class Tags(HTMLParser):
    """The tags of a page, its text, and what its scripts of data hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.data: Any = None
        self._in: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        self._in = dict(attributes).get("type", tag)

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, text: str) -> None:
        if self._in == "application/json":
            self.data = json.loads(text)
        elif self._in not in ("script", "style"):
            self.text += text


def report(*words: str | Path) -> int:
    return cli.main(["report", *map(str, words)])


def test_the_page_of_a_real_run(real_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert report(real_run, "--out", out, "--png", tmp_path / "png") == 0
    assert str(out) in capsys.readouterr().out
    page = Tags(out.read_text(encoding="utf-8"))
    charts = {chart["name"]: chart for chart in page.data}
    assert set(charts) >= {
        "reward", "pass_at_1", "length", "entropy", "kl", "lambda", "ratio", "clip_fraction", "ess", "replay_age",
        "mismatch", "time",
    }  # fmt: skip
    run = read_run(real_run)
    assert [row["value"] for row in charts["reward"]["rows"]] == pytest.approx(
        [row.metrics["reward/mean"] for row in run.rows], rel=1e-4
    )
    assert [(row["steps"], row["rollouts"]) for row in charts["reward"]["rows"]] == [
        (row.steps, row.rollouts) for row in run.rows
    ]
    assert [row["steps"] for row in charts["pass_at_1"]["rows"]] == [0, 1, 2, 3]
    assert all(row["low"] <= row["value"] <= row["high"] for row in charts["pass_at_1"]["rows"])
    assert {row["series"] for row in charts["ess"]["rows"]} == {"lag 0", "lag 1"}
    shaded, dashed = charts["reward"]["against"]["rollouts"]["layer"][:2]
    end = run.rows[1].rollouts
    assert shaded["data"]["values"] == [{"rollouts": 0.0, "end": end}]
    assert dashed["data"]["values"] == [{"rollouts": end}]
    assert "off_policy_fraction: 0.5" in page.text
    assert "Before training" in page.text
    assert "After 2 steps" in page.text
    pictures = sorted((tmp_path / "png").iterdir())
    assert [path.name for path in pictures] == sorted(f"{name}_by_{axis}.png" for name in charts for axis in vega.AXES)
    with Image.open(pictures[0]) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_text_stays_text(tmp_path: Path) -> None:
    rows = steps(3, **{f"eval/{EVIL}/pass@1": 0.5, "eval/b/pass@1": 0.5, "eval/pass@1": 0.5, f"reward/{EVIL}": 1.0})
    for row in rows:
        row["reward/other"] = row["reward/mean"] = 0.5
    said = {0: [(EVIL, EVIL, Score(0.0, "wrong"))]}
    name = "<b>&name"
    run = make_run(
        tmp_path / name, rows, said=said, phases=[EVIL] * 3, recipe={"model": {"path": EVIL}, "note": EVIL, "seed": 1}
    )
    other = make_run(tmp_path / "other", rows, recipe={"seed": EVIL, "model": {"path": EVIL}})
    for number, runs in enumerate(([run], [run, other])):
        out = tmp_path / f"{number}.html"
        assert report(*runs, "--out", out, "--png", tmp_path / "png") == 0
        text = out.read_text(encoding="utf-8")
        page = Tags(text)
        assert page.tags.count("script") == 3
        assert not {"img", "b"} & set(page.tags)
        assert not {name for name in page.attributes if name.startswith("on")}
        assert "<script>alert(1)</script><img src=x onerror=alert(1)>" in page.text
        assert "129140163" not in page.text  # no template within a text
        assert name in page.text
        shown = json.dumps(page.data, ensure_ascii=False) + page.text
        assert not re.search("[\u202e\x1b]", shown)


def test_a_page_asks_for_nothing(real_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    report(real_run, "--out", out)
    text = out.read_text(encoding="utf-8")
    assert re.search(r"<meta[^>]*Content-Security-Policy[^>]*default-src 'none'", text)
    assert not {"src", "href", "link"} & Tags(text).attributes
    assert len(text) < 2_000_000


def test_a_run_under_way_without_an_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps(9, reward__mean=0.5, time__step=60.0))
    (run / "recipe.yaml").unlink()
    out = tmp_path / "page.html"
    assert report(run, "--out", out) == 0
    text = " ".join(Tags(out.read_text(encoding="utf-8")).text.split())
    for said in ("not measured", "Nothing was evaluated", "not finished", "9:00", "no recipe.yaml"):
        assert said in text


def test_seeds_make_a_band_and_a_table(tmp_path: Path) -> None:
    runs = []
    for seed, end in ((1, 0.6), (2, 0.8)):
        rows = steps(4, reward__mean=0.1 * seed)
        rows[1]["eval/pass@1"], rows[3]["eval/pass@1"] = 0.4, end
        result = {"base_pass_at_1": 0.2}
        runs.append(make_run(tmp_path / str(seed), rows, recipe={"seed": seed}, result=result))
    out = tmp_path / "page.html"
    assert report(*runs, "--out", out) == 0
    page = Tags(out.read_text(encoding="utf-8"))
    charts = {chart["name"]: chart for chart in page.data}
    assert charts["pass_at_1"]["rows"][-1] == {
        "series": "GRPO", "steps": 4, "rollouts": 400, "value": 0.7, "low": 0.6, "high": 0.8
    }  # fmt: skip
    text = " ".join(page.text.split())
    assert "2 runs, 1 line" in text
    # 100%: 0.7, the mean. One never gets there; of 50%, 0.45, they are a quarter and an eighth of 200 further.
    assert "not reached(1 of 2 reached it)" in text
    assert re.search(r"23[78]\(225 to 250\)", text)


def test_a_request_that_cannot_be_met_writes_nothing(
    real_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for words in ((tmp_path,), (real_run, "--out", tmp_path), (real_run, "--out", tmp_path / "no" / "page.html")):
        assert report(*words) == 2
    assert report(real_run, "--out", tmp_path / "page.html", "--png", file) == 2
    assert capsys.readouterr().err.count("error: ") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_charts_show_what_there_is(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, steps(3, reward__mean=0.5, verdict__no_answer=0.0, unknown=1.0)))
    assert [chart.name for chart in of_run(run)] == ["reward"]
    assert [chart.name for chart in of_lines(group([run]))] == ["reward"]
