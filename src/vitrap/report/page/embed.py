"""`embed`: turns a run's `pictures.png` into a data address, so that the page needs no other file."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitrap.data.picture import open_picture

PIXELS = 20_000_000
"""Greatest number of pixels of a picture; a larger one is refused, for no run draws such a picture."""


@dataclass(frozen=True)
class Picture:
    """An image as part of the page: its data address and its size in pixels."""

    address: str
    width: int
    height: int


def embed(file: Path) -> Picture:
    """A PNG as a data address; losslessly compressed as WebP where that is smaller.

    Raises:
        UserError: it cannot be read as a picture; the message names it and says why.
    """
    with open_picture(file, ("PNG",)) as image:
        if image.width * image.height > PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        content = file.read_bytes()
        draft = io.BytesIO()
        image.convert("RGB" if _opaque(image) else "RGBA").save(draft, "WEBP", lossless=True, quality=60, method=4)
    kind, smaller = ("webp", draft.getvalue()) if len(draft.getvalue()) < len(content) else ("png", content)
    return Picture(f"data:image/{kind};base64,{base64.b64encode(smaller).decode()}", image.width, image.height)


def _opaque(image: Image.Image) -> bool:
    """Whether no pixel is transparent."""
    return "A" not in image.getbands() or image.getchannel("A").getextrema() == (255, 255)
