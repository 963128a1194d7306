"""Images by reference: whatever a file holds, an image comes out, or a message that names the file."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from remix.tasks import shapes
from remix.tasks.images import FORMATS, open_image


def encoded(format: str, image: Image.Image | None = None) -> bytes:
    data = io.BytesIO()
    (image or Image.effect_noise((40, 30), 80).convert("RGB")).save(data, format)
    return data.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_as_rgb(tmp_path, format):
    path = tmp_path / "image"  # what it is tells the content, not the name
    path.write_bytes(encoded(format))
    image = open_image(str(path))
    assert (image.mode, image.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "image.png"
    Image.new(mode, (3, 2)).save(path)
    assert open_image(str(path)).mode == "RGB"


def test_a_photograph_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise to see it upright
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    image.save(tmp_path / "image.png", exif=exif)
    upright = open_image(str(tmp_path / "image.png"))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0)  # what was left is on top


def test_a_drawn_picture_goes_by_its_name():
    reference = "shapes:count/test/3/17"
    assert open_image(reference).tobytes() == shapes.paint(shapes.scene(reference)).tobytes()
    with pytest.raises(ValueError, match="'shapes:count/dev/3/17' names no drawn picture"):
        open_image("shapes:count/dev/3/17")
    with pytest.raises(ValueError, match="unknown kind of shapes task 'cuont'; did you mean 'count'"):
        open_image("shapes:cuont/test/3/17")


@pytest.mark.parametrize("reference", ["none.png", "", ".", "a\0b", "x" * 5000])
def test_what_is_no_file_is_named(reference):
    with pytest.raises(ValueError, match=r"image .*: no such file; relative paths start at"):
        open_image(reference)


def test_what_is_no_image_is_named(tmp_path):
    for name, content in [("a.png", b"not an image"), ("b.jpg", b""), ("c.png", b"%!PS-Adobe-3.0 EPSF-3.0\n")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not an image; only BMP, GIF"):
            open_image(str(tmp_path / name))


def test_a_program_that_draws_is_not_run(tmp_path):
    # A whole EPS file, which Pillow would hand to Ghostscript.
    (tmp_path / "a.eps").write_bytes(encoded("EPS"))
    with pytest.raises(ValueError, match=r"a.eps: not an image"):
        open_image(str(tmp_path / "a.eps"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP"])
def test_half_an_image_is_named(tmp_path, format):
    whole = encoded(format)
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half: cannot be read .*; copy the file anew"):
        open_image(str(tmp_path / "half"))


@pytest.mark.parametrize("side", [9000, 30_000])  # Pillow itself would warn of the second, and load the first
def test_a_decompression_bomb_is_not_unpacked(tmp_path: Path, side: int):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"bomb.png: too large .*; scale it down"):
        open_image(str(tmp_path / "bomb.png"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_images_open_or_are_named(tmp_path, format):
    rng = random.Random(format)
    whole = encoded(format)
    path = tmp_path / "damaged"
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(min(len(damaged), rng.choice([30, 200, 4000])))] = rng.randrange(256)
        path.write_bytes(damaged)
        message = str(path)
        try:
            mode = open_image(str(path)).mode
        except ValueError as error:
            mode, message = "RGB", str(error)
        assert mode == "RGB"
        assert str(path) in message
