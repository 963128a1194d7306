"""The page as a browser shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remix import cli
from remix.types import Score
from tests.reporting.making import make_run, steps

PATIENCE = 120_000
"""Milliseconds, on a machine that has other things to do."""


@pytest.fixture(scope="module")
def pages(real_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a real run, of several by hand, and of one whose every text is an attack."""
    folder = tmp_path_factory.mktemp("pages")
    evil = "<img src=https://example.com/x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    rows = steps(12, reward__mean=0.5, entropy=[0.5 * 0.5**step for step in range(12)], **{f"reward__{evil}": 0.1})
    for row in rows:
        row |= {"eval/pass@1": 0.5, f"eval/{evil}/pass@1": 0.4, "eval/b/pass@1": 0.6, "reward/b": 0.2}
    said = {0: [(evil * 20, evil, Score(1.0, "correct"))]}
    hostile = make_run(folder / "hostile", rows, said=said, recipe={"model": {"path": evil}})
    seeds = [
        make_run(folder / f"{name}-{seed}", rows, recipe={"seed": seed, "optimizer": {"lr": lr}}, result={})
        for name, lr in (("slow", 1e-6), (evil.replace("/", ""), 1e-5))
        for seed in (1, 2)
    ]
    runs = {"real": [real_run], "hostile": [hostile], "several": seeds}
    for name, of in runs.items():
        assert cli.main(["report", *map(str, of), "--out", str(folder / f"{name}.html")]) == 0
    return {name: folder / f"{name}.html" for name in runs}


class Shown:
    """A page that is open, with all that it said and asked for."""

    def __init__(self, page: Any, file: Path) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(file.as_uri(), timeout=PATIENCE)
        self.wait_for("steps")

    def wait_for(self, axis: str) -> None:
        self.page.wait_for_selector(f"html[data-drawn={axis}]", timeout=PATIENCE)

    def look(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture
def show(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    contexts = []

    def shown(name: str, width: int = 1400, scheme: str = "light") -> Shown:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        return Shown(contexts[-1].new_page(), pages[name])

    yield shown
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["real", "hostile", "several"])
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
def test_all_is_drawn_and_nothing_asked_for(show: Any, name: str, width: int, scheme: str) -> None:
    shown = show(name, width, scheme)
    assert shown.said == []
    assert len(shown.asked) == 1
    assert shown.asked[0].startswith("file:")
    assert shown.look("document.title") != "owned"
    # A curve of each chart has a length, in a colour of the page.
    lengths = shown.look(
        """[...document.querySelectorAll('.chart')].map(chart => Math.max(
            ...[...chart.querySelectorAll('.mark-line path, .mark-area path')].map(path => path.getTotalLength())))"""
    )
    assert len(lengths) >= 2
    assert min(lengths) > 20
    assert shown.look("document.documentElement.scrollWidth") <= width
    beyond = """[...document.querySelectorAll('.chart svg .role-legend, .chart svg .role-axis')].filter(part =>
        part.getBoundingClientRect().right > part.closest('svg').getBoundingClientRect().right + 1).length"""
    assert shown.look(beyond) == 0, "a legend or an axis is cut off"


def test_light_dark_and_paper(show: Any) -> None:
    colours = """[getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector('#chart-reward .mark-line path')).stroke,
        getComputedStyle(document.querySelector('#chart-reward .role-axis-label text')).fill]"""
    shown = show("real")
    light = shown.look(colours)
    assert light == ["rgb(246, 247, 248)", "rgb(0, 114, 178)", "rgb(93, 103, 112)"]
    shown.page.emulate_media(color_scheme="dark")
    assert shown.look(colours) == ["rgb(18, 21, 24)", "rgb(86, 168, 224)", "rgb(160, 169, 178)"]
    shown.page.emulate_media(color_scheme="dark", media="print")
    assert shown.look(colours)[1:] == light[1:]


def test_the_switch_draws_against_rollouts(show: Any) -> None:
    shown = show("real")
    title = "document.querySelector('#chart-reward .role-axis-title text').textContent"
    assert shown.look(title) == "training steps"
    shown.page.get_by_text("rollouts", exact=True).locator("visible=true").and_(
        shown.page.locator("fieldset span")
    ).click(timeout=PATIENCE)
    shown.wait_for("rollouts")
    assert shown.look(title) == "rollouts"
    assert shown.said == []


def test_a_point_says_its_numbers(show: Any) -> None:
    shown = show("several")
    chart = shown.page.locator("#chart-reward svg")
    chart.scroll_into_view_if_needed(timeout=PATIENCE)  # how far down it is goes by the length of the runs' names
    box = chart.bounding_box(timeout=PATIENCE)
    shown.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shown.page.locator("#vg-tooltip-element.visible").wait_for(timeout=PATIENCE)
    rows = "[...document.querySelectorAll('#vg-tooltip-element tr')]"
    said = dict(shown.look(f"{rows}.map(row => [...row.children].map(cell => cell.textContent))"))
    assert list(said) == ["curve", "value", "from", "to", "after step", "rollouts"]
    assert said["curve"].startswith("GRPO, lr 1e-0")
    assert (said["value"], said["from"], said["to"]) == ("0.5", "0.5", "0.5")
    assert int(said["rollouts"].replace(",", "")) == 100 * int(said["after step"])
    assert shown.said == []
