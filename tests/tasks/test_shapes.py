"""Drawn pictures: every answer is read from the pixels again, and train and test never share a picture."""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from remix.config import ShapesTask
from remix.config.data import ShapesKind
from remix.tasks import load_tasks, shapes
from remix.tasks.images import open_image
from remix.types import Prompt

NAMES = {rgb: name for name, rgb in shapes.COLOURS.items()}

# What a person reads as each digit, dot by dot.
DIGITS = {
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": ".#. ##. .#. .#. .#. .#. ###",
    "2": ".###. #...# ....# ..##. .#... #.... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. .#... .#... .#...",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
}


def masks(reference: str) -> dict[str, np.ndarray]:
    """By colour, where it is on the picture: [32, 32] bool. The background is whatever is dark grey."""
    pixels = np.asarray(open_image(reference))
    assert pixels.shape == (32, 32, 3)
    found = {
        NAMES[rgb]: (pixels == rgb).all(-1) for rgb in {tuple(map(int, p)) for p in pixels.reshape(-1, 3)} & {*NAMES}
    }
    background = pixels[~np.any([*found.values()], axis=0)]
    assert (background == background[0, 0]).all()
    assert background[0, 0] <= 60
    return found


def cropped(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def pieces(mask: np.ndarray) -> int:
    """Connected pieces, corners touching included."""
    left, count = {(int(y), int(x)) for y, x in np.argwhere(mask)}, 0
    while left:
        count, border = count + 1, [left.pop()]
        while border:
            y, x = border.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            border += near
    return count


def only(found: dict[str, np.ndarray]) -> np.ndarray:
    (mask,) = found.values()
    return mask


def shape_of(mask: np.ndarray) -> str:
    box = cropped(mask)
    widths = box.sum(1).tolist()
    if box.all():
        return "square"
    if not box[len(box) // 2, box.shape[1] // 2]:
        return "ring"
    if not np.array_equal(box, box[::-1]):
        return "triangle"
    if len(set(widths)) == 2:
        return "cross"
    return "diamond" if widths[0] == 1 else "circle"


def place_of(mask: np.ndarray) -> str:
    y, x = np.argwhere(mask).min(0) + np.argwhere(mask).max(0) - 31  # twice the way from the middle
    if max(abs(x), abs(y)) <= 5:
        return "middle"
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def side_of(mask: np.ndarray) -> str:
    """Opposite the base of a triangle, the one edge of its box that it fills."""
    box = cropped(mask)
    edges = {"bottom": box[0], "top": box[-1], "right": box[:, 0], "left": box[:, -1]}
    (side,) = [side for side, edge in edges.items() if edge.all()]
    return side


def digit_of(mask: np.ndarray) -> str:
    box = cropped(mask)
    dot = len(box) // 7
    dots = box.reshape(7, dot, -1, dot)
    assert (dots.all((1, 3)) == dots.any((1, 3))).all()
    drawn = " ".join("".join(".#"[on] for on in row) for row in dots.any((1, 3)).astype(int))
    (digit,) = [digit for digit, glyph in DIGITS.items() if glyph == drawn]
    return digit


def column_of(mask: np.ndarray) -> float:
    return float(np.argwhere(mask)[:, 1].mean())


READ: dict[str, Callable[[dict[str, np.ndarray]], str]] = {
    "colour": lambda found: next(iter(found)),
    "shape": lambda found: shape_of(only(found)),
    "where": lambda found: place_of(only(found)),
    "point": lambda found: side_of(only(found)),
    "bigger": lambda found: max(found, key=lambda colour: found[colour].sum()),
    "smaller": lambda found: min(found, key=lambda colour: found[colour].sum()),
    "left": lambda found: min(found, key=lambda colour: column_of(found[colour])),
    "odd": lambda found: next(colour for colour in found if pieces(found[colour]) == 1),
    "count": lambda found: str(pieces(np.any([*found.values()], axis=0))),
    "digit": lambda found: digit_of(only(found)),
}
"""The answer to each kind's question, from the pixels alone."""


@pytest.mark.parametrize("kind", READ)
def test_answers_are_true_to_the_pixels(kind):
    for split in ("train", "test"):
        for prompt in shapes.make_prompts(kind, split, 150, seed=5):
            assert READ[kind](masks(prompt.images[0])) == prompt.answer, prompt.images


@pytest.mark.parametrize("kind", ["bigger", "smaller", "left"])
def test_a_pair_is_of_one_shape_and_two_sizes(kind):
    for prompt in shapes.make_prompts(kind, "train", 50, seed=1):
        found = masks(prompt.images[0])
        small, big = sorted(found.values(), key=np.sum)
        assert shape_of(small) == shape_of(big)
        assert big.sum() > 1.5 * small.sum()
        assert pieces(small | big) == 2


def test_the_kinds_of_the_recipe_are_all_of_them():
    assert [*READ] == [*shapes.KINDS]
    assert set(typing.get_args(ShapesKind)) == set(shapes.KINDS)


@pytest.mark.parametrize("kind", READ)
def test_no_answer_is_a_good_guess(kind):
    prompts = shapes.make_prompts(kind, "train", 2000, seed=0)
    counts, words = Counter(p.answer for p in prompts), shapes.answers(kind)
    assert set(counts) == set(words)
    fair = len(prompts) / len(words)
    assert all(0.7 * fair < count < 1.3 * fair for count in counts.values()), counts
    assert all(answer.isalnum() for answer in words)  # one word, which exact_match compares


def test_kinds_that_share_pictures_disagree():
    """Which figure is the bigger, or the left one, says nothing of the other: half of the pairs, give or take."""
    found = [masks(p.images[0]) for p in shapes.make_prompts("bigger", "train", 400, seed=2)]
    assert 0.4 < np.mean([READ["bigger"](f) == READ["left"](f) for f in found]) < 0.6
    # And a triangle's place is not where it points.
    found = [masks(p.images[0]) for p in shapes.make_prompts("point", "train", 400, seed=2)]
    assert np.mean([READ["point"](f) == READ["where"](f) for f in found]) < 0.35


def pixels(prompts: list[Prompt]) -> list[bytes]:
    return [open_image(prompt.images[0]).tobytes() for prompt in prompts]


def test_train_and_test_share_no_picture_whatever_the_kind_or_seed():
    train, test = (
        {
            picture
            for kind in ("colour", "shape", "where", "digit")
            for seed in (0, 1)
            for picture in pixels(shapes.make_prompts(kind, split, 1000, seed))
        }
        for split in ("train", "test")
    )
    # Pictures do repeat, by chance: without a rule test ones would have been among the train ones.
    assert len(train) < 0.99 * 8000
    assert not train & test


def test_a_reference_is_all_that_a_picture_needs():
    whole = shapes.make_prompts("odd", "train", 30, seed=9)
    assert shapes.make_prompts("odd", "train", 12, seed=9) == whole[:12]
    assert pixels(whole) == pixels(whole)
    assert whole[7] == Prompt(
        "shapes/odd/train/9/7", "what colour is the odd one?", whole[7].answer, "odd", images=("shapes:odd/train/9/7",)
    )
    assert shapes.scene(whole[7].images[0]).answer == whole[7].answer
    assert pixels(whole) != pixels(shapes.make_prompts("odd", "train", 30, seed=10))


@pytest.mark.parametrize(
    "reference",
    ["shapes:", "shapes:odd/train/1", "shapes:odd/train/-1/2", "shapes:odd/train/1/2/3", "shapes:odd/train/1/2\n"],
)
def test_what_names_no_picture_is_refused(reference):
    with pytest.raises(ValueError, match="names no drawn picture"):
        shapes.draw(reference)


def test_the_tasks_of_a_recipe():
    configs = [ShapesTask(kind="count", size=50, seed=3), ShapesTask(kind="left", size=2000)]
    count, left = load_tasks(configs, "train")
    assert (count.name, len(count.prompts), left.name, len(left.prompts)) == ("count", 50, "left", 2000)
    assert count.prompts[0].images == ("shapes:count/train/3/0",)
    count, left = load_tasks(configs, "test")
    assert (len(count.prompts), len(left.prompts)) == (50, 1024)
    assert count.prompts[0].images == ("shapes:count/test/3/0",)
