"""Opening picture files, and turning each into 8-bit RGB as a viewer shows it. Never imports torch.

A file is told by its content, and only `FORMATS` are tried: for others Pillow starts other programs (Ghostscript for
PostScript, say). A pipe or a device in place of a file is refused before it is opened.

What decides how a picture looks:

- orientation: the picture is turned upright, as its EXIF or XMP says;
- several pictures in a file (an animation, pages): the first one, also where an animation does not show it;
- transparency: the picture is laid over white;
- 16 bits a channel: the high byte of each value;
- a colour profile (ICC): the colours are converted to sRGB; CMYK without one, by Pillow's plain formula;
- a colour space that EXIF names without a profile is passed over, as web browsers do.

Refused, since it leaves open what is black, white or transparent: values of 32 bits, fractions and signed ones (modes I
and F), 12 bits, the mode LAB, a PNG's gamma, primaries or coding points (cICP) other than those of sRGB, a grey value
or a 16-bit colour that stands for "transparent", and a colour profile that is broken or made for another mode.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from math import isclose
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from vitrap.errors import UserError
from vitrap.files import open_file

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are read, by Pillow's names."""
SUFFIXES = frozenset({
    ".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp",
})  # fmt: skip
"""The endings of their files, in lower case."""
PIXELS = 2**26
"""Greatest number of pixels of a picture, assumed: decoded, it takes 200 MB. Small files can claim any number."""
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes with at most 8 bits a channel that are read."""
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of grey with 16 bits."""
GAMMA = 1 / 2.2
SRGB_CODES = bytes((1, 13, 0, 1))
"""sRGB in PNG's chunk cICP: primaries, transfer, matrix and full range by the numbers of ITU-T H.273."""
PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""sRGB's white, red, green and blue, as x and y each, in the order of PNG."""


@contextmanager
def open_picture(path: Path, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Open a picture file for the block; its pixels are decoded when they are first used.

    Raises:
        UserError: it is no regular file, no picture in one of the `formats`, has more than `PIXELS` pixels, or is found
            damaged within the block; the message names the file.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        # What Pillow warns of is refused below (too many pixels), or does not matter (odd metadata).
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=formats) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {PIXELS:,}")
            yield image
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a readable image (none of {', '.join(formats)}); mend or remove it") from error
    except Exception as error:  # a damaged file raises whatever Pillow's decoder ran into
        reason = " ".join(str(error).split()).partition(" <")[0] or type(error).__name__  # not the name of an object
        raise UserError(f"{path} is not a readable image ({reason}); mend or remove it") from error


def read_picture(path: Path) -> Image.Image:
    """Read a picture file as 8-bit RGB, as this module's docstring says.

    Raises:
        UserError: it cannot be read, or leaves open how it looks; the message names the file and Pillow's mode.
    """
    with open_picture(path) as file:
        if doubt := _doubt(file) or _doubt_of_codes(path, file):
            raise UserError(f"{path} is a picture of mode {file.mode} that {doubt}; save it in 8 bits and sRGB")
        image = ImageOps.exif_transpose(file)
        if _has_sixteen_bits(file):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        colours = _in_srgb(image, file.info.get("icc_profile"))
        if not image.has_transparency_data:
            return colours
        shown = Image.new("RGB", image.size, "white")
        shown.paste(colours, mask=image.convert("RGBA").getchannel("A"))
        return shown


def _doubt(image: Image.Image) -> str:
    """What a picture has that leaves open how it looks, in words; empty where nothing does."""
    sixteen = _has_sixteen_bits(image)
    if image.mode not in EIGHT_BITS and not sixteen:
        return "does not say which values are black and white"
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        if tags.get(SAMPLEFORMAT, (1,))[0] != 1:
            return "has signed values"
        if sixteen and (tags.get(BITSPERSAMPLE), tags.get(PHOTOMETRIC_INTERPRETATION)) != ((16,), 1):
            return "has other values than 16 bits with 0 as black"
    # A PNG may name a transparent grey or colour. Pillow does not scale that as it does the pixels.
    key = image.info.get("transparency")
    eight_bits = image.mode == "RGB" and "16" not in str(getattr(image, "tile", ""))
    if image.format == "PNG" and image.mode != "P" and key is not None and not eight_bits:
        return "lets one of its values stand for transparent"
    if not {"icc_profile", "srgb"} & image.info.keys() and not _is_srgb(image):
        return "has another gamma or other primaries than sRGB"
    return ""


def _doubt_of_codes(path: Path, image: Image.Image) -> str:
    """The same of a PNG's coding points, which Pillow passes over."""
    if image.format != "PNG":
        return ""
    with open_file(path) as file:
        file.seek(8)  # the signature
        # Each chunk has its length, its kind, its content and four bytes of a checksum; pixels begin with IDAT.
        while len(head := file.read(8)) == 8 and (kind := head[4:]) != b"IDAT":
            if kind == b"cICP":
                return "" if file.read(4) == SRGB_CODES else "has coding points (cICP) other than those of sRGB"
            file.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
    return ""


def _has_sixteen_bits(image: Image.Image) -> bool:
    """Whether a picture is grey with 16 bits; older versions of Pillow have mode I for them, too."""
    return image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _is_srgb(image: Image.Image) -> bool:
    """Whether the gamma and the primaries that a PNG states, if it does, are those of sRGB."""
    gamma = image.info.get("gamma", GAMMA)
    primaries = image.info.get("chromaticity", PRIMARIES)
    near = (isclose(found, wanted, abs_tol=0.01) for found, wanted in zip(primaries, PRIMARIES, strict=True))
    return isclose(gamma, GAMMA, rel_tol=0.05) and all(near)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture's colours as RGB; what is transparent keeps the colour that is stored for it."""
    if not profile:
        return image.convert("RGB")
    space = ImageCms.core.profile_frombytes(profile).xcolor_space.strip()
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
    grey = image.mode in ("1", "L", "LA")
    if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not grey):
        raise ValueError(f"its mode is {image.mode}, its colour profile is for {space}")
    return _conversion(profile, mode).apply(image.convert(mode))


@lru_cache(maxsize=16)  # all pictures of a camera have one profile, and preparing it takes longer than using it
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """What converts colours of a profile to sRGB."""
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(source, srgb, mode, "RGB")
