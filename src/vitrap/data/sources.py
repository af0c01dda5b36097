"""Opening a data set by name: reading it, holding parts out, limiting the rest, and moving it to a device.

The order is fixed: the hold-out is drawn from the whole training set first, then `limit` thins what remains. So the
held-out parts are the same images at every limit, and a smaller limit's training set is part of a larger one's. Neither
draw depends on the run's seed: all seeds of an experiment share their data, and only weights, order and poison differ.

A set whose pixels are together larger than `pixels_limit` stays on disk: its image sets are mapped from the file.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from vitrap.contracts import ImageSet
from vitrap.data.cache import Arrays, Numbers, Pixels, read_cached, read_folder
from vitrap.data.picture import SUFFIXES, read_picture
from vitrap.errors import UserError, some_of
from vitrap.files import named_path
from vitrap.images import CHUNK, pixels_limit, scratch
from vitrap.memory import memory_limit
from vitrap.tensors.pixels import to_bytes

DIGITS_SIZE = 16
"""Pixels: twice the digits' own size, so that patches of 4 px make sixteen tokens."""
DIGITS_TEST = 450
"""Test images of the digits: 45 of each class."""

SYSTEM = (".", "@eaDir", "__MACOSX")
"""Beginnings of the names of hidden files, and of folders in which operating systems keep their own pictures."""
LAYOUT = "imagefolder:PATH must hold {train,test}/CLASS/* images"

Progress = Callable[[int, int], None]
"""Called with the amount done and the total amount, both in the unit of the present step (bytes or images)."""


@dataclass(frozen=True)
class World:
    """An opened data set: training set, test set, and three parts held out of the training set.

    Attributes:
        train: the victim's training set, without the held-out parts.
        test: the whole test set, which is only used for measuring.
        choose: held out, to choose recipes and strengths.
        clean: held out, the defender's clean images.
        threshold: held out, to set false-positive thresholds.
        name: the name that it was opened by.
        fingerprint: sha256 (hex) of its content before any draw: pixels, labels, groups, number of classes.
        passed_over: files of an image folder that are no images, by their paths in it.
    """

    train: ImageSet
    test: ImageSet
    choose: ImageSet
    clean: ImageSet
    threshold: ImageSet
    name: str
    fingerprint: str
    passed_over: tuple[str, ...] = ()


def open_data(
    name: str,
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    holdout: float = 0.1,
    device: torch.device | str = "cpu",
) -> World:
    """Open a data set.

    Args:
        name: `digits`, a folder of the data cache (`cifar10`, `gtsrb`, ...), `npy:PATH` (a folder in the
            cache format) or `imagefolder:PATH` (a folder of `{train,test}/CLASS/*` images; without `test`, of
            `{train,val}/CLASS/*`).
        size: working resolution in pixels; None for the native one.
        limit: number of training images to use, balanced over the classes; None for all.
        seed: seed of the hold-out and of the limit; not the run's seed, see above.
        holdout: share of the training set to hold out, in three equal parts of whole groups.
        device: where the tensors go, except the pixels of a set that is larger than the memory limit.

    Raises:
        UserError: the name is unknown, the data are missing or incomplete, or an argument does not fit them.
    """
    if size is not None and size < 1:
        raise UserError(f"data.size = {size} is out of range: it must be at least 1 pixel")
    arrays = _read(name, size)
    groups = arrays.train_groups
    generator = torch.Generator().manual_seed(seed)
    # Hold out first, then limit: see above.
    choose, clean, threshold, rest = hold_out(len(arrays.train_labels), groups, holdout, generator)
    if limit is not None:
        rest = rest[balanced(arrays.train_labels[rest], limit, generator)]
    # The pixels are copied into memory, or mapped where those in use are together too many.
    used = sum(map(len, (arrays.test_labels, choose, clean, threshold, rest)))
    mapped = used * math.prod(arrays.train_images.shape[1:]) > pixels_limit(torch.device(device))
    maker = _ImageSetMaker(arrays, _side(arrays, name, size), torch.device(device), mapped)
    return World(
        train=maker.train(rest),
        test=maker.test(),
        choose=maker.train(choose),
        clean=maker.train(clean),
        threshold=maker.train(threshold),
        name=name,
        fingerprint=fingerprint(arrays),
        passed_over=arrays.passed_over,
    )


def hold_out(
    n: int, groups: Numbers | None, share: float, generator: torch.Generator
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Split `n` images at random into three equal parts, together the share `share`, and the rest; groups stay whole.

    The draw does not look at classes, so a class may be missing from a part. With groups, the size of a part is as near
    to a third of the share as whole groups allow.

    Returns:
        Row numbers, sorted: first, second, third part, rest.

    Raises:
        UserError: the share is out of range, or the set is too small for it.
    """
    if not 0 <= share < 1:
        raise UserError(f"data.holdout = {share} is out of range: it must be in [0, 1)")
    # Units (groups, or single images) in random order. The number of images before a unit gives its part: 0, 1 or 2 by
    # thirds of `held`, and 3, the rest, from there on.
    unit = _shuffled_units(n, groups, generator)
    sizes = np.bincount(unit)
    held = max(round(n * share), 1)
    before = np.cumsum(sizes) - sizes
    part = np.minimum(before * 3 // held, 3)[unit] if share else np.full(n, 3)
    rows = [np.flatnonzero(part == k) for k in range(4)]
    if not len(rows[3]) or (share and not all(map(len, rows))):
        what = "images" if groups is None else "groups"
        raise UserError(
            f"data.holdout = {share} cannot be drawn from {len(sizes)} {what}: "
            "three parts and the rest need one each; make it larger"
        )
    return rows[0], rows[1], rows[2], rows[3]


def balanced(labels: Numbers, limit: int, generator: torch.Generator) -> Numbers:
    """Draw a class-balanced subset of `limit` images.

    In turn, the class with the fewest images so far gives its next one, in random order within the class (of equal
    classes, the one with the lowest number). What a small class cannot give, the others do. A smaller limit's images
    are among a larger one's. Groups play no part: a few frames of every track teach more than all frames of a few, and
    no held-out image shares a group with these images.

    Args:
        labels: class of each image.
        limit: number of images; where there are fewer, all are taken.
        generator: a random stream on the CPU.

    Returns:
        Row numbers, sorted.

    Raises:
        UserError: the limit is less than the number of classes.
    """
    classes = len(np.unique(labels))
    if limit < classes:
        raise UserError(
            f"data.limit = {limit} is too small for an image of each of {classes} classes; make it at least {classes}"
        )
    # Shuffle, sort by class, and number the images within each class: an image's number is the round that takes it.
    order = torch.randperm(len(labels), generator=generator).numpy()
    by_class = order[np.argsort(labels[order], kind="stable")]
    first = np.searchsorted(labels[by_class], labels[by_class])
    rounds = np.arange(len(labels)) - first
    in_order = by_class[np.lexsort((labels[by_class], rounds))]
    return np.sort(in_order[:limit])


def fingerprint(arrays: Arrays) -> str:
    """The sha256 (hex) of a data set's content: its arrays with shapes and types, and the number of classes."""
    digest = hashlib.sha256(f"classes {arrays.n_classes}".encode())
    for name, array in vars(arrays).items():
        if isinstance(array, np.ndarray):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def decode(
    paths: Sequence[Path], size: int | None, crop: bool = True, progress: Progress | None = None
) -> UInt8[np.ndarray, "n s t 3"]:
    """Read image files as RGB, as a viewer shows them (`data/picture.py` says how), on all cores.

    Args:
        paths: the files, at least one.
        size: height and width of the result; None for the files' own, which must then be the same for all.
        crop: whether to scale an image's shorter side to `size` and cut out the middle, or else to squeeze the whole
            image.
        progress: called with the number of images that are done.

    Raises:
        UserError: a file is no readable image or leaves open how it looks, or the sizes differ where `size` is None.
    """
    out: np.ndarray | None = None
    # The filter of warnings is the process's: it is set here, since `read_picture` in several threads would mix it up.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, image in enumerate(pool.map(_decode_one, paths, repeat(size), repeat(crop))):
            if out is None:
                out = _empty_array(len(paths), *image.shape)
            if image.shape != out.shape[1:]:
                raise UserError(
                    f"images differ in size ({paths[0]} is {_by(out.shape[2], out.shape[1])}, "
                    f"{paths[i]} is {_by(image.shape[1], image.shape[0])}); give data.size"
                )
            out[i] = image
            if progress is not None:
                progress(i + 1, len(paths))
    assert out is not None, "paths is empty"
    return out


@dataclass(frozen=True)
class _ImageSetMaker:
    """Makes image sets from rows of an opened data set.

    Attributes:
        arrays: the data set.
        size: working size.
        device: where the tensors go.
        mapped: whether the pixels stay in the file.
    """

    arrays: Arrays
    size: int
    device: torch.device
    mapped: bool

    def train(self, rows: Numbers) -> ImageSet:
        """Some training images."""
        groups = _pick(self.arrays.train_groups, rows)
        return self._image_set(self.arrays.train_images, self.arrays.train_labels, rows, groups)

    def test(self) -> ImageSet:
        """All test images."""
        rows = np.arange(len(self.arrays.test_labels))
        return self._image_set(self.arrays.test_images, self.arrays.test_labels, rows, None)

    def _image_set(self, images: Pixels, labels: Numbers, rows: Numbers, groups: Numbers | None) -> ImageSet:
        return ImageSet(
            pixels=_as_stored(images) if self.mapped else _channels_first(images, rows),
            labels=torch.from_numpy(labels[rows]),
            index=torch.from_numpy(rows),
            n_classes=self.arrays.n_classes,
            size=self.size,
            groups=None if groups is None else torch.from_numpy(groups),
            classes=self.arrays.classes,
            pixel_row=torch.from_numpy(rows) if self.mapped else None,
        ).to(self.device)


def _read(name: str, size: int | None) -> Arrays:
    """Read the data set that a name means: see `open_data`."""
    kind, colon, path = name.partition(":")
    if name == "digits":
        return _digits(size or DIGITS_SIZE)
    if colon and kind == "npy":
        return read_folder(named_path(path))
    if colon and kind == "imagefolder":
        return _image_folder(named_path(path), size)
    return read_cached(name)


def _digits(size: int) -> Arrays:
    """The embedded digits, enlarged to `size` pixels: 1,347 training images, and 45 test images of each class.

    They are the test set of UCI's Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998, CC BY 4.0), in the
    order of scikit-learn's copy, 8 x 8 px, grey values from 0 to 16. The split is always the same. Writers are not
    known, so the same hand may be on both sides of it.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        grey, labels = stored["images"], stored["labels"].astype(np.int64)
    small = torch.from_numpy(grey).float()[:, None] / 16
    large = functional.interpolate(small, (size, size), mode="bilinear").expand(-1, 3, -1, -1)
    images = to_bytes(large).permute(0, 2, 3, 1).contiguous().numpy()
    test = balanced(labels, DIGITS_TEST, torch.Generator().manual_seed(0))
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Arrays(images[train], labels[train], images[test], labels[test], classes=tuple("0123456789"))


def _image_folder(root: Path, size: int | None) -> Arrays:
    """Read a folder of `{train,test}/CLASS/*` images; `val` stands in for a `test` that is not there.

    An image is a file with an ending of `SUFFIXES`, at any depth below its class folder, unless it or a folder on the
    way is hidden or an operating system's own. All other files are passed over, and named in the result.
    """
    part = "val" if (root / "val").is_dir() and not (root / "test").is_dir() else "test"
    train = _list_folder(root / "train")
    test = _list_folder(root / part)
    if odd := sorted(train.keys() ^ test.keys()):
        raise UserError(f"class folder {odd[0]!r} is in only one of {root}/train and {root}/{part}; make both alike")
    images, labels, read = [], [], []
    for found in (train, test):
        files = [path for paths in found.values() for path in paths]
        read += files
        images.append(decode(files, size))
        labels.append(np.repeat(np.arange(len(found)), [len(paths) for paths in found.values()]))
    height, width = images[0].shape[1:3]
    other_height, other_width = images[1].shape[1:3]
    if (height, width) != (other_height, other_width):
        raise UserError(
            f"images of {root}/train are {_by(width, height)}, of {root}/{part} {_by(other_width, other_height)};"
            " give data.size"
        )
    passed_over = _passed_over(root, read)
    return Arrays(images[0], labels[0], images[1], labels[1], classes=tuple(train), passed_over=passed_over)


def _list_folder(root: Path) -> dict[str, list[Path]]:
    """The image files at any depth of each class folder; folders and files are in order of their names."""
    if not root.is_dir():
        deeper = [folder.parent for folder in sorted(root.parent.glob(f"*/{root.name}")) if folder.is_dir()]
        hint = f"; did you mean imagefolder:{deeper[0]}?" if deeper else ""
        raise UserError(f"no folder {root}{hint}; {LAYOUT}")
    names = sorted(name for name in next(os.walk(root, onerror=_unreadable))[1] if not name.startswith(SYSTEM))
    if not names:
        images = sum(map(_is_image, root.iterdir()))
        held = f", which holds {images} images itself" if images else ""
        raise UserError(f"no class folder in {root}{held}; {LAYOUT}")
    found = {name: [path for path in _files(root / name) if _is_image(path.relative_to(root))] for name in names}
    if empty := [name for name, paths in found.items() if not paths]:
        folder = root / empty[0]
        others = [str(path.relative_to(folder)) for path in _files(folder)]
        held = f" ({some_of(others)} passed over)" if others else ""
        raise UserError(f"no image in {folder}{held}; add some ({', '.join(sorted(SUFFIXES))}) or remove the folder")
    return found


def _is_image(path: Path) -> bool:
    """Whether a file is an image of a data set, by its name and those of its folders."""
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(SYSTEM) for part in path.parts)


def _files(folder: Path) -> list[Path]:
    """All files below a folder, in order of their names; a folder that is a link counts as a file."""
    found = []
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        links = (name for name in folders if Path(place, name).is_symlink())
        found += [Path(place, name) for name in (*files, *links)]
    return sorted(found)


def _passed_over(root: Path, images: Sequence[Path]) -> tuple[str, ...]:
    """The files below a folder that are not among the images that were read."""
    read = {place for image in images for place in (image, *image.parents)}
    return tuple(str(path.relative_to(root)) for path in _files(root) if path not in read)


def _unreadable(error: OSError) -> NoReturn:
    """Refuse a folder that cannot be listed."""
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}); mend its permissions") from error


def _decode_one(path: Path, size: int | None, crop: bool) -> UInt8[np.ndarray, "s t 3"]:
    """Read one image file: see `decode`."""
    image = read_picture(path)
    if size is not None and image.size != (size, size):
        fit = ImageOps.fit if crop else Image.Image.resize
        image = fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _side(arrays: Arrays, name: str, size: int | None) -> int:
    """The working size: the given one, or the native side of square images."""
    height, width = arrays.train_images.shape[1:3]
    if size is None and height != width:
        raise UserError(f"images of {name} are {_by(width, height)}, not square; give data.size")
    return size or height


def _shuffled_units(n: int, groups: Numbers | None, generator: torch.Generator) -> Int[np.ndarray, " n"]:
    """The unit of each image (its group, or itself where groups are unknown), numbered in random order."""
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(unit.max(initial=-1)) + 1
    return torch.randperm(count, generator=generator).numpy()[unit]


def _as_stored(images: Pixels) -> UInt8[Tensor, "k 3 h w"]:
    """All images of a file, mapped and not copied."""
    if not images.flags.c_contiguous:
        raise UserError(
            "images above the memory limit are read from their npy files, which must be in C order, and are not; save"
            " them with numpy.ascontiguousarray, or raise --memory"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _channels_first(images: Pixels, rows: Numbers) -> UInt8[Tensor, "k 3 h w"]:
    """A copy of the images of `rows`, in memory."""
    out = torch.empty((len(rows), 3, *images.shape[1:3]), dtype=torch.uint8)
    for start in range(0, len(rows), CHUNK):
        some = images[rows[start : start + CHUNK]]
        out[start : start + CHUNK] = torch.from_numpy(some).permute(0, 3, 1, 2)
    return out


def _empty_array(*shape: int) -> UInt8[np.ndarray, "..."]:
    """An empty array for decoded images: in memory or, above the memory limit, in a scratch file."""
    if math.prod(shape) <= memory_limit():
        return np.empty(shape, dtype=np.uint8)
    return scratch(*shape).numpy()


def _pick(groups: Numbers | None, rows: Numbers) -> Numbers | None:
    """The groups of some rows, where groups are known."""
    return None if groups is None else groups[rows]


def _by(width: int, height: int) -> str:
    """A size in words."""
    return f"{width}x{height}"
