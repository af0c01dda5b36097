"""Pictures are read as a viewer shows them, or refused in one line."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from vitrap.data.picture import FORMATS, PIXELS, SUFFIXES, read_picture
from vitrap.errors import UserError

RAMP = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def seen(content: bytes, folder: Path, name: str = "x.png") -> np.ndarray:
    """What is read of a file with this content."""
    (folder / name).write_bytes(content)
    image = read_picture(folder / name)
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def grey(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., None].repeat(3, -1)


def png(depth: int, colour: int, rows: bytes, side: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of raw rows, with further chunks before its pixels."""
    head = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def profile(space: str = "sRGB") -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def swapped() -> bytes:
    """sRGB's profile with the columns of red and blue exchanged, as of a device whose channels are called otherwise."""
    content = bytearray(profile())
    table = {bytes(content[i : i + 4]): i for i in range(132, 132 + 12 * struct.unpack(">I", content[128:132])[0], 12)}
    red, blue = table[b"rXYZ"], table[b"bXYZ"]
    content[red : red + 4], content[blue : blue + 4] = content[blue : blue + 4], content[red : red + 4]
    return bytes(content)


def white_is_0(pixels: np.ndarray) -> bytes:
    """A TIFF whose photometric interpretation (tag 262) is 0 in place of 1."""
    tag = struct.pack("<HHI", 262, 3, 1)
    content = saved(Image.fromarray(pixels), "TIFF")
    assert tag + b"\1" in content
    return content.replace(tag + b"\1", tag + b"\0")


WIDE = RAMP.astype(np.uint16) * 257
DOTS = Image.fromarray(RAMP).convert("1")
PALETTE = Image.fromarray(COLOURS).quantize(16)
SHOWN = {
    "grey": (saved(Image.fromarray(RAMP), "PNG"), grey(RAMP)),
    "1 bit": (saved(DOTS, "PNG"), np.asarray(DOTS.convert("RGB"))),
    "16 bits png": (saved(Image.fromarray(WIDE), "PNG"), grey(RAMP)),
    "16 bits tiff": (saved(Image.fromarray(WIDE), "TIFF"), grey(RAMP)),
    "16 bits tiff, big-endian": (saved(Image.fromarray(WIDE.astype(">u2")), "TIFF"), grey(RAMP)),
    "16 bits pgm": (b"P5 16 16 65535\n" + WIDE.astype(">u2").tobytes(), grey(RAMP)),
    "12 bits pgm": (b"P5 16 16 4095\n" + (RAMP * 4095.0 / 255).round().astype(">u2").tobytes(), grey(RAMP)),
    "5 levels pgm": (b"P5 2 1 4\n\x00\x04", grey(np.array([[0, 255]], dtype=np.uint8))),
    "16 bits colour": (
        png(16, 2, (b"\0" + bytes([200, 1, 30, 2, 60, 3]) * 4) * 4, 4),
        np.full((4, 4, 3), (200, 30, 60), dtype=np.uint8),
    ),
    "palette": (saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "gif": (saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
    "bmp": (saved(Image.fromarray(COLOURS), "BMP"), COLOURS),
    "webp": (saved(Image.fromarray(COLOURS), "WEBP", lossless=True), COLOURS),
    "grey and opaque": (saved(Image.fromarray(RAMP).convert("LA"), "PNG"), grey(RAMP)),
    "white is 0": (white_is_0(255 - RAMP), grey(RAMP)),
    "cmyk": (
        saved(Image.new("RGB", (4, 4), (200, 30, 60)).convert("CMYK"), "TIFF"),
        np.full((4, 4, 3), (200, 30, 60), dtype=np.uint8),
    ),
    "sRGB's profile": (saved(Image.fromarray(COLOURS), "PNG", icc_profile=profile()), COLOURS),
    "another profile": (saved(Image.fromarray(COLOURS), "PNG", icc_profile=swapped()), COLOURS[..., ::-1]),
    "a palette's profile": (
        saved(PALETTE, "PNG", icc_profile=swapped()),
        np.asarray(PALETTE.convert("RGB"))[..., ::-1],
    ),
    "grey with a profile of colours": (saved(Image.fromarray(RAMP), "TIFF", icc_profile=profile()), grey(RAMP)),
    "sRGB's gamma": (png(8, 0, b"\0\x07" * 1, 1, (b"gAMA", struct.pack(">I", 45455))), grey(np.array([[7]], np.uint8))),
    "sRGB's coding points": (
        png(8, 0, b"\0\x07", 1, (b"cICP", bytes((1, 13, 0, 1)))),
        grey(np.array([[7]], np.uint8)),
    ),
    "gamma overruled": (
        png(8, 0, b"\0\x07", 1, (b"gAMA", struct.pack(">I", 100000)), (b"sRGB", b"\0")),
        grey(np.array([[7]], np.uint8)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_a_picture_is_what_a_viewer_shows(tmp_path: Path, name: str) -> None:
    content, truth = SHOWN[name]
    found = seen(content, tmp_path)
    assert found.shape == truth.shape
    assert np.abs(found.astype(int) - truth).max() <= (1 if "profile" in name else 0)


TURNED = {
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, 1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}  # fmt: skip
"""How a camera that was held so stores an upright picture."""


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_picture_is_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    bar = np.zeros((16, 24, 3), dtype=np.uint8)
    bar[:8], bar[8:, :8] = 255, 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](bar)))
    found = seen(saved(stored, kind, exif=exif, **({"quality": 98} if kind == "JPEG" else {})), tmp_path)
    assert found.shape == bar.shape
    assert np.abs(found.astype(int) - bar).max() <= 4


@pytest.mark.parametrize("bits", ["I;16", "L"])
def test_a_grey_picture_is_upright_too(tmp_path: Path, bits: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(np.rot90(WIDE if bits == "I;16" else RAMP, 1))
    assert np.array_equal(seen(saved(Image.fromarray(stored), "PNG", exif=exif), tmp_path), grey(RAMP))


def half(mode: str) -> Image.Image:
    """Red, whose left half is transparent; or grey."""
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((0, 200, 0, 0), (0, 0, 4, 8))
    return image.convert(mode)


def two_colours() -> Image.Image:
    """The first colour of a palette on the left, the second on the right."""
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 200, 0, 200, 0, 0])
    image.paste(0, (0, 0, 4, 8))
    return image


CLEAR = {
    "RGBA": saved(half("RGBA"), "PNG"),
    "LA": saved(half("LA"), "PNG"),
    "webp": saved(half("RGBA"), "WEBP", lossless=True, exact=True),
    "gif": saved(half("RGBA"), "GIF"),
    "tiff": saved(half("RGBA"), "TIFF"),
    "palette": saved(two_colours(), "PNG", transparency=0),
    "a palette's bytes": saved(two_colours(), "PNG", transparency=b"\0\xff"),
    "colour": saved(Image.fromarray(np.uint8([[(1, 2, 3)] * 4 + [(200, 0, 0)] * 4])), "PNG", transparency=(1, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_transparent_is_white(tmp_path: Path, name: str) -> None:
    found = seen(CLEAR[name], tmp_path)
    assert (found[:, :4] == 255).all()
    assert not (found[:, 4:] == 255).all(-1).any()


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    found = seen(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"), tmp_path)
    assert abs(int(found[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize(("kind", "more"), [("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})])
def test_of_several_pictures_the_first_is_read(tmp_path: Path, kind: str, more: dict[str, bool]) -> None:
    first, *rest = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0)))
    found = seen(saved(first, kind, save_all=True, append_images=rest, **more), tmp_path)
    assert (found == (255, 0, 0)).all()


DOUBTFUL = {
    "32 bits": saved(Image.fromarray(WIDE.astype(np.int32)), "TIFF"),
    "fractions": saved(Image.fromarray(RAMP / np.float32(255)), "TIFF"),
    "fractions, pfm": b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0, 1),
    "lab": saved(Image.new("LAB", (4, 4), (128, 128, 128)), "TIFF"),
    "16 bits, white is 0": white_is_0(WIDE),
    "gamma": png(8, 0, b"\0\x07", 1, (b"gAMA", struct.pack(">I", 100000))),
    "primaries": png(8, 0, b"\0\x07", 1, (b"cHRM", struct.pack(">8I", 31270, 32900, 73470, 26530, 0, 100000, 0, 0))),
    "coding points": png(8, 0, b"\0\x07", 1, (b"cICP", bytes((12, 13, 0, 1)))),
    "a transparent grey": saved(Image.fromarray(RAMP), "PNG", transparency=16),
    "a transparent grey of 4 bits": png(4, 0, b"\0\x0f\0\x0f", 2, (b"tRNS", b"\0\x0f")),
    "a transparent colour of 16 bits": png(16, 2, b"\0" + b"\2\1" * 3, 1, (b"tRNS", b"\2\1" * 3)),
    "a transparent black of 16 bits": png(16, 2, b"\0" + b"\0\1" * 3, 1, (b"tRNS", b"\0\0" * 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_leaves_open_how_it_looks_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError, match=r"x\.png is a picture of mode .* that .*; save it in 8 bits and sRGB"
    ) as caught:
        seen(DOUBTFUL[name], tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(Image.fromarray(COLOURS), "TIFF", icc_profile=b"x" * 200), "cannot open profile"),
        (saved(Image.fromarray(COLOURS).convert("CMYK"), "TIFF", icc_profile=profile()), "mode is CMYK, .* for RGB"),
        (saved(Image.fromarray(COLOURS), "TIFF", icc_profile=profile("LAB")), "for Lab"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n", "none of BMP, GIF"),
        (saved(Image.fromarray(COLOURS), "TGA"), "none of BMP, GIF"),
        (saved(Image.fromarray(COLOURS), "ICO"), "none of BMP, GIF"),
        (b"P5 100000 100000 255\n", "10000000000 pixels. exceeds limit"),
        (b"P5 10000 10000 255\n", "10000 x 10000 pixels are more than"),
        (b"<html>404</html>", "none of BMP, GIF"),
        (b"", "none of BMP, GIF"),
    ],
)
def test_what_is_no_picture_to_read_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"x\.png is not a readable image \(.*{message}") as caught:
        seen(content, tmp_path)
    assert "\n" not in str(caught.value)


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript for PostScript, whatever the file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError):
        seen(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n", tmp_path)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)]
)
def test_only_a_file_is_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x.png is not a readable image \((it is no regular file|.*symbolic link)"):
        read_picture(tmp_path / "x.png")


WHOLE = {kind: saved(Image.fromarray(COLOURS), kind) for kind in FORMATS}


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_a_damaged_picture_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    """Bytes changed, cut off and put at the end: the outcome is a picture of bounded size, or one line."""
    content = bytearray(WHOLE[kind])
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)):
        content[at] = byte
    cut = data.draw(st.integers(0, len(content)))
    with suppress(UserError):
        found = seen(bytes(content[:cut]) + data.draw(st.binary(max_size=20)), tmp_path_factory.getbasetemp())
        assert found.size <= 3 * PIXELS


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200), st.sampled_from([content[:k] for content in WHOLE.values() for k in (0, 4, 16)]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, rest: bytes, head: bytes) -> None:
    with suppress(UserError):
        seen(head + rest, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("kind", sorted(WHOLE))
def test_half_a_picture_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="is not a readable image"):
        seen(WHOLE[kind][: len(WHOLE[kind]) * 2 // 3], tmp_path)


def test_all_endings_of_the_formats_count() -> None:
    """Pillow's own endings, but for those of formats within a format, which no data set uses."""
    Image.init()
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert known - SUFFIXES <= {".pfm"}
    assert all(ending == ending.lower() for ending in SUFFIXES)
