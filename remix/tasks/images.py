"""From an image's reference, as prompts and rollout logs hold it, to its pixels."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from remix.config.block import quotable
from remix.tasks import shapes

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Those that Pillow decodes by itself: others hand the file to a program (EPS runs Ghostscript)."""
MOST_PIXELS = 2**26
"""A file of a few kilobytes can hold an image of gigabytes; a photograph has a quarter of this."""


def open_image(reference: str) -> Image.Image:
    """The image, RGB and upright. `reference` is a file's path, or a drawn picture's name ("shapes:count/train/0/17").

    Raises ValueError where there is no such file, or it holds no image, half of one, or one that is too large.
    """
    if reference.startswith(shapes.SCHEME):
        return shapes.draw(reference)
    name = quotable(reference)
    if not os.path.isfile(reference):  # unlike Path.is_file, False for what cannot be a path
        raise ValueError(f"image {name}: no such file; relative paths start at the working directory, {Path.cwd()}")
    try:
        with Image.open(reference, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"image {name}: not an image; only {', '.join(FORMATS)} files are read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {name}: too large ({error}); scale it down to {MOST_PIXELS:,} pixels") from error
    except Exception as error:  # of Pillow's decoders, which raise whatever broken bytes lead to
        raise ValueError(f"image {name}: cannot be read ({error}); copy the file anew") from error
