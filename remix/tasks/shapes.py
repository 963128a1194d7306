"""Drawn pictures of 32 x 32 pixels and questions about them: the embedded vision-language benchmark.

    kind      picture                               question                          answer
    colour    one figure                            what colour is it?                a colour
    shape     one figure                            what shape is it?                 a shape
    where     one figure                            where is it?                      left, right, top, bottom, middle
    point     one triangle                          where does it point?              left, right, top, bottom
    bigger    two figures of one shape              what colour is the bigger one?    a colour
    smaller   two figures of one shape              what colour is the smaller one?   a colour
    left      two figures of one shape              what colour is the left one?      a colour
    odd       three to six, one of another colour   what colour is the odd one?       a colour
    count     one to six figures                    how many are there?               1 to 6
    digit     one digit                             what digit is it?                 0 to 9

Kinds share their pictures and their answers' words (a left figure may point to the right, the bigger one is not the
left one), so that what one kind teaches can undo another. A picture is named by a reference that tells all of it,
"shapes:KIND/SPLIT/SEED/INDEX", and is drawn from that alone. A picture belongs to `train` or `test` by a hash of what
is on it, so no kind, seed or size can leak one into the other.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from remix.config.block import nearest, quotable
from remix.tasks.rows import Split
from remix.types import Prompt

SCHEME = "shapes:"
SIDE = 32
"""Pixels of a picture's width and height."""
TEST_SHARE = 4
"""One picture in so many is held out for `test`."""

COLOURS = {
    "red": (230, 30, 30),
    "green": (20, 170, 40),
    "blue": (40, 70, 250),
    "yellow": (245, 230, 30),
    "purple": (160, 40, 200),
    "cyan": (50, 220, 230),
    "orange": (250, 140, 20),
    "white": (255, 255, 255),
}
BACKGROUNDS = range(0, 61, 5)
"""Levels of grey, all darker than any figure."""
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIDES = ("top", "right", "bottom", "left")
"""Clockwise: what a triangle points to after so many quarter turns."""
PLACES = {"middle": (15, 15), "top": (15, 8), "right": (23, 15), "bottom": (15, 23), "left": (8, 15)}
"""Centres of a single figure, each up to a pixel off either way."""

# Digits of 5 x 7 pixels of their own, a row each, so that no font's version changes a picture.
_GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing on a picture."""

    shape: str
    """One of `SHAPES`, or a digit."""
    colour: str
    """One of `COLOURS`."""
    x: int
    y: int
    """Pixels of the centre, from the left and from the top."""
    size: int
    """Pixels from the centre to the edge; of a digit, pixels of each of its dots."""
    turn: int = 0
    """Quarter turns clockwise."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is on a picture, and the answer to its kind's question."""

    background: int
    """Level of grey, 0 to 255."""
    figures: tuple[Figure, ...]
    """None touches another."""
    answer: str


def make_prompts(kind: str, split: Split, size: int, seed: int) -> list[Prompt]:
    """The first `size` questions of one kind, split and seed; a smaller size is a prefix of a larger one."""
    places = [f"{kind}/{split}/{seed}/{index}" for index in range(size)]
    return [
        Prompt(f"shapes/{place}", question(kind), scene(SCHEME + place).answer, kind, images=(SCHEME + place,))
        for place in places
    ]


def question(kind: str) -> str:
    return _known(kind)[1]


def answers(kind: str) -> tuple[str, ...]:
    """All answers that the kind's question may have."""
    return _known(kind)[2]


def draw(reference: str) -> Image.Image:
    """The picture of a reference, RGB. Raises ValueError on what is none."""
    return paint(scene(reference))


def scene(reference: str) -> Scene:
    """What is on the picture of a reference."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(
            f"'{quotable(reference)}' names no drawn picture; "
            "one is named as in 'shapes:colour/train/0/17': kind, train or test, seed, index"
        )
    compose = _known(match["kind"])[0]
    rng = random.Random(reference)
    while True:
        found = compose(rng)
        if split_of(found) == match["split"]:
            return found


def split_of(found: Scene) -> Split:
    """Where a picture belongs, by what is on it alone."""
    figures = sorted(f"{f.shape} {f.colour} {f.x} {f.y} {f.size} {f.turn}" for f in found.figures)
    text = f"{found.background};" + ";".join(figures)
    return "test" if hashlib.sha256(text.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def paint(found: Scene) -> Image.Image:
    """The pixels, without anti-aliasing: every pixel has the background's colour or a figure's."""
    image = Image.new("RGB", (SIDE, SIDE), (found.background,) * 3)
    pen = ImageDraw.Draw(image)
    for figure in found.figures:
        _paint(pen, figure, (found.background,) * 3)
    return image


def _paint(pen: ImageDraw.ImageDraw, figure: Figure, background: tuple[int, int, int]) -> None:
    x, y, size, fill = figure.x, figure.y, figure.size, COLOURS[figure.colour]
    box = (x - size, y - size, x + size, y + size)
    match figure.shape:
        case "circle":
            pen.ellipse(box, fill)
        case "ring":
            hole = size // 2
            pen.ellipse(box, fill)
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), background)
        case "square":
            pen.rectangle(box, fill)
        case "cross":
            arm = size // 3
            pen.rectangle((x - size, y - arm, x + size, y + arm), fill)
            pen.rectangle((x - arm, y - size, x + arm, y + size), fill)
        case "diamond":
            pen.polygon([(x, y - size), (x + size, y), (x, y + size), (x - size, y)], fill)
        case "triangle":
            corners = [(0, -size), (size, size), (-size, size)]
            for _ in range(figure.turn):
                corners = [(-down, right) for right, down in corners]
            pen.polygon([(x + right, y + down) for right, down in corners], fill)
        case digit:
            for row, dots in enumerate(_GLYPHS[digit].split()):
                for column, dot in enumerate(dots):
                    if dot == "1":
                        left, top = x + (2 * column - 5) * size // 2, y + (2 * row - 7) * size // 2
                        pen.rectangle((left, top, left + size - 1, top + size - 1), fill)


# --- what is on the pictures of each kind -------------------------------------------------------------------------


def _one(rng: random.Random, shape: str) -> tuple[int, str, Figure]:
    """Background, place and figure of a picture of one figure."""
    place = rng.choice([*PLACES])
    x, y = (centre + rng.randint(-1, 1) for centre in PLACES[place])
    figure = Figure(shape, rng.choice([*COLOURS]), x, y, rng.randint(5, 6))
    return rng.choice(BACKGROUNDS), place, figure


def _colour(rng: random.Random) -> Scene:
    background, _, figure = _one(rng, rng.choice(SHAPES))
    return Scene(background, (figure,), figure.colour)


def _shape(rng: random.Random) -> Scene:
    background, _, figure = _one(rng, rng.choice(SHAPES))
    return Scene(background, (figure,), figure.shape)


def _where(rng: random.Random) -> Scene:
    background, place, figure = _one(rng, rng.choice(SHAPES))
    return Scene(background, (figure,), place)


def _point(rng: random.Random) -> Scene:
    background, _, figure = _one(rng, "triangle")
    turn = rng.randrange(4)
    return Scene(background, (Figure("triangle", figure.colour, figure.x, figure.y, figure.size, turn),), SIDES[turn])


def _pair(rng: random.Random) -> tuple[int, Figure, Figure]:
    """Background, the bigger and the smaller figure of a picture of two, side by side."""
    shape, colours = rng.choice(SHAPES), rng.sample([*COLOURS], 2)
    columns = rng.sample((8, 23), 2)
    sizes = rng.randint(6, 7), rng.randint(3, 4)
    bigger, smaller = (
        Figure(shape, colour, x, rng.randint(size, SIDE - 1 - size), size)
        for colour, x, size in zip(colours, columns, sizes, strict=True)
    )
    return rng.choice(BACKGROUNDS), bigger, smaller


def _bigger(rng: random.Random) -> Scene:
    background, bigger, smaller = _pair(rng)
    return Scene(background, (bigger, smaller), bigger.colour)


def _smaller(rng: random.Random) -> Scene:
    background, bigger, smaller = _pair(rng)
    return Scene(background, (bigger, smaller), smaller.colour)


def _left(rng: random.Random) -> Scene:
    background, *pair = _pair(rng)
    return Scene(background, tuple(pair), min(pair, key=lambda figure: figure.x).colour)


def _several(rng: random.Random, fewest: int) -> tuple[int, list[Figure], str]:
    """Background, figures of one shape on a grid of 3 x 3, and the colour of one that differs where there are three."""
    number, shape = rng.randint(fewest, 6), rng.choice(SHAPES)
    common, odd = rng.sample([*COLOURS], 2)
    cells = rng.sample(range(9), number)
    centres = [(5 + 10 * (cell % 3) + rng.randint(-1, 1), 5 + 10 * (cell // 3) + rng.randint(-1, 1)) for cell in cells]
    colours = [odd if number >= 3 and place == 0 else common for place in range(number)]
    figures = [Figure(shape, colour, x, y, 3) for colour, (x, y) in zip(colours, centres, strict=True)]
    return rng.choice(BACKGROUNDS), figures, odd


def _odd(rng: random.Random) -> Scene:
    background, figures, odd = _several(rng, fewest=3)
    return Scene(background, tuple(figures), odd)


def _count(rng: random.Random) -> Scene:
    background, figures, _ = _several(rng, fewest=1)
    return Scene(background, tuple(figures), str(len(figures)))


def _digit(rng: random.Random) -> Scene:
    digit = rng.choice([*_GLYPHS])
    x, y = (16 + rng.randint(-2, 2) for _ in range(2))
    return Scene(rng.choice(BACKGROUNDS), (Figure(digit, rng.choice([*COLOURS]), x, y, 3),), digit)


_COLOUR_WORDS = tuple(COLOURS)
KINDS: dict[str, tuple[Callable[[random.Random], Scene], str, tuple[str, ...]]] = {
    "colour": (_colour, "what colour is it?", _COLOUR_WORDS),
    "shape": (_shape, "what shape is it?", SHAPES),
    "where": (_where, "where is it?", tuple(PLACES)),
    "point": (_point, "where does it point?", SIDES),
    "bigger": (_bigger, "what colour is the bigger one?", _COLOUR_WORDS),
    "smaller": (_smaller, "what colour is the smaller one?", _COLOUR_WORDS),
    "left": (_left, "what colour is the left one?", _COLOUR_WORDS),
    "odd": (_odd, "what colour is the odd one?", _COLOUR_WORDS),
    "count": (_count, "how many are there?", tuple("123456")),
    "digit": (_digit, "what digit is it?", tuple(_GLYPHS)),
}
"""By kind: what draws a scene, the question, and the answers that it may have."""

_REFERENCE = re.compile(SCHEME + r"(?P<kind>[a-z]+)/(?P<split>train|test)/\d{1,19}/\d{1,19}")


def _known(kind: str) -> tuple[Callable[[random.Random], Scene], str, tuple[str, ...]]:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of shapes task '{quotable(kind)}'; {nearest(kind, KINDS)}")
    return KINDS[kind]
