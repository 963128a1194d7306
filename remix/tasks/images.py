"""Images by reference: a prompt names them, and they are opened where their pixels are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def open_image(reference: str) -> Image:
    """The image in RGB. Raises ValueError where the file is missing or is no image."""
    from PIL import Image as Images

    try:
        with Images.open(reference) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Images.DecompressionBombError) as error:
        raise ValueError(f"image {reference}: does not open ({error}); mend the file or leave its row out") from error
