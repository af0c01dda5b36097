"""The data cache: one folder per data set, with plain npy files that are memory-mapped. Never imports torch.

A data set is the folder `NAME/` in `$VITRAP_DATA` (by default the user's cache folder), which holds
- `{train,test}_images.npy`, uint8 `n h w 3`, with the same `h w` in both;
- `{train,test}_labels.npy`, any integer type, `n`, from 0;
- `train_groups.npy`, integers, `n`, if known: images of one group show the same object;
- `classes.txt`, if known: on each line a class name, or a key, a tab and the name.

The classes are those that `classes.txt` names, no more than there are training images; some may have no image. Without
that file they are those of the training labels, which then leave out no number from 0 to the greatest. A class with
test images must have training images, too.

Nothing in it is ever unpickled. A folder appears under its name in one step, once all of it is written, and whoever
reads it sees the old set or the new one.
"""

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8
from platformdirs import user_cache_path

from vitrap.errors import UserError, unknown
from vitrap.files import current_location, named_path, open_file, own_draft, replace_folder

DATASETS = {
    "digits": "handwritten digits, 8x8 grey, 10 classes, 1,797 images; embedded",
    "cifar10": "CIFAR-10, 32x32, 10 classes, 50,000 + 10,000 images",
    "cifar100": "CIFAR-100, 32x32, 100 classes, 50,000 + 10,000 images",
    "gtsrb": "German traffic signs, resized to 32x32, 43 classes, 39,209 + 12,630 images, tracks known",
    "tiny-imagenet": "Tiny ImageNet, 64x64, 200 classes, 100,000 + 10,000 images",
}
"""The data sets known by name, with a description."""

Pixels = UInt8[np.ndarray, "_ _ _ 3"]
Numbers = Int64[np.ndarray, " _"]

NAME_BYTES = 200
"""The longest name of a data set: what a file name may have, less what the name of a draft adds."""
MAGIC = b"\x93NUMPY"
"""What an npy file begins with."""
FIELDS = {
    "descr": r"""['"]([<>|=]?[biufc]\d+)['"]""",
    "fortran_order": "(True|False)",
    "shape": r"\(([\dL,\s]*)\)",
}
"""The fields of an npy file's header, and how an array of numbers fills them in."""
HEADER_BYTES = 10_000
"""The longest header that is read, as in NumPy."""
FORMAT = "it must hold {train,test}_images.npy (uint8 n h w 3) and {train,test}_labels.npy (integers)"


@dataclass(frozen=True)
class Arrays:
    """A data set as it is stored.

    Attributes:
        train_images: training images, `n h w 3`; a memory map where they were read from a file.
        train_labels: training labels, `n`, from 0.
        test_images: test images, `m h w 3`, of the training images' height and width.
        test_labels: test labels, `m`, from 0.
        train_groups: group of each training image, `n`; None where unknown.
        classes: names of the classes, () where unknown.
        passed_over: files of an image folder that are no images, by their paths in it.
    """

    train_images: Pixels
    train_labels: Numbers
    test_images: Pixels
    test_labels: Numbers
    train_groups: Numbers | None = None
    classes: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    @property
    def n_classes(self) -> int:
        """Number of classes: of the named ones, or else one more than the greatest training label."""
        return len(self.classes) or int(self.train_labels.max()) + 1


def cache_folder() -> Path:
    """The folder of the cache: `$VITRAP_DATA`, or else `vitrap/data` in the user's cache folder."""
    chosen = os.environ.get("VITRAP_DATA")
    return named_path(chosen) if chosen else user_cache_path("vitrap") / "data"


def cached_names() -> list[str]:
    """The names of the data sets in the cache, sorted."""
    folder = cache_folder()
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(f.name for f in found if f.is_dir() and is_name(f.name))


def is_name(name: str) -> bool:
    """Whether `name` can be a folder of the cache: one path component, printable, not hidden, without a colon."""
    return (
        name.isprintable()
        and 0 < len(name.encode()) <= NAME_BYTES
        and Path(name).name == name
        and not name.startswith(".")
        and ":" not in name
    )


def read_cached(name: str) -> Arrays:
    """Read the data set `name` from the cache.

    Raises:
        UserError: it is not in the cache, or is incomplete.
    """
    folder = cache_folder() / name
    if not is_name(name) or (name not in DATASETS and not current_location(folder).is_dir()):
        raise unknown("data set", name, {*DATASETS, *cached_names(), "npy:PATH", "imagefolder:PATH"})
    remedy = f"run `vitrap data prepare {name}`" if name in DATASETS else FORMAT
    if not current_location(folder).is_dir():
        raise UserError(f"data set {name!r} is not in the data cache {cache_folder()}; {remedy}")
    return read_folder(folder, remedy)


def read_folder(folder: Path, remedy: str = FORMAT) -> Arrays:
    """Read a folder in the cache format, memory-mapped (copy on write: the files never change).

    Args:
        folder: the folder.
        remedy: what the error message should advise.

    Raises:
        UserError: the folder or a file is missing, truncated, or holds something else.
    """
    while True:
        place = current_location(folder)
        version = _version(place)
        read = _read(place, remedy)
        # Where the folder was replaced while it was read, the files may be some of the old set, some of the new one.
        if version == _version(current_location(folder)):
            break
    if isinstance(read, UserError):
        raise read
    return read


def write_folder(folder: Path, arrays: Arrays) -> Path:
    """Write a data set as `folder`, completely or not at all; an existing folder is replaced.

    Raises:
        UserError: the arrays do not fit together, or the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with own_draft(folder) as draft:
            put_arrays(arrays, draft, folder)
    except OSError as error:
        raise not_written(folder, error) from error
    return folder


def put_arrays(arrays: Arrays, draft: Path, folder: Path) -> None:
    """Write a data set as `folder`, as `write_folder` does, within the folder's draft.

    Raises:
        UserError: the arrays do not fit together.
        OSError: they cannot be written.
    """
    _check(arrays, folder)
    new = draft / "new"
    new.mkdir()
    for name, array in vars(arrays).items():
        if isinstance(array, np.ndarray):
            np.save(new / f"{name}.npy", array, allow_pickle=False)
    if arrays.classes:
        (new / "classes.txt").write_text("\n".join(arrays.classes) + "\n", encoding="utf-8")
    replace_folder(new, folder)


def not_written(folder: Path, error: OSError) -> UserError:
    """The error that a data set cannot be written."""
    why = error.strerror or error
    return UserError(f"cannot write {folder} ({why}); make room there or set VITRAP_DATA to another folder")


def _version(place: Path) -> tuple[Path, int, int] | None:
    """What tells a folder from those that stood in its place before or after it; None where there is none."""
    try:
        found = place.stat()
    except OSError:
        return None
    return place, found.st_ino, found.st_mtime_ns


def _read(folder: Path, remedy: str) -> Arrays | UserError:
    """Read a folder in the cache format, or say why it cannot be read."""
    if not folder.is_dir():
        return UserError(f"no folder {folder}; {remedy}")
    classes = folder / "classes.txt"
    groups = folder / "train_groups.npy"
    try:
        arrays = Arrays(
            train_images=_images(folder / "train_images.npy", remedy),
            train_labels=_numbers(folder / "train_labels.npy", remedy),
            test_images=_images(folder / "test_images.npy", remedy),
            test_labels=_numbers(folder / "test_labels.npy", remedy),
            train_groups=_numbers(groups, remedy) if groups.exists() else None,
            classes=_names(classes) if classes.exists() else (),
        )
        _check(arrays, folder)
    except UserError as error:
        return error
    return arrays


def _load(path: Path, remedy: str) -> np.ndarray:
    """Map an npy file of numbers."""
    if not path.exists():
        raise UserError(f"{path.name} is missing in {path.parent}; {remedy}")
    try:
        with open_file(path) as file:
            kind, shape, order, start = _header(file.read(HEADER_BYTES))
            size = os.fstat(file.fileno()).st_size
            needed = start + math.prod(shape) * kind.itemsize
            if size < needed:
                raise ValueError(f"it has {size} of {needed} bytes")
            # Nothing can be mapped of a file without numbers.
            return np.memmap(file, kind, "c", start, shape, order) if math.prod(shape) else np.empty(shape, kind)
    except (OSError, OverflowError, TypeError, ValueError, struct.error) as error:
        raise UserError(f"{path} is truncated or no npy file of numbers ({_line(error)}); {remedy}") from error


def _header(head: bytes) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"], int]:
    """Parse the beginning of an npy file, of version 1 to 3 of the format.

    NumPy's own parser evaluates the text as Python, and there is no list of the errors that it then raises.

    Returns:
        Type, shape and order of the array, and the byte at which it begins.

    Raises:
        ValueError, TypeError, struct.error: it is no header of an array of numbers.
    """
    if head[:6] != MAGIC or head[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("it does not begin like one")
    kind, begin = ("<H", 10) if head[6] == 1 else ("<I", 12)
    (length,) = struct.unpack(kind, head[8:begin])
    if len(head) < begin + length:
        raise ValueError(f"its header shall have {length} bytes")
    text = head[begin : begin + length].decode("utf-8" if head[6] == 3 else "latin-1")
    found = [re.search(rf"""['"]{field}['"]\s*:\s*{value}""", text) for field, value in FIELDS.items()]
    descr, fortran, shape = (match[1] if match else "" for match in found)
    if not all(found):
        raise ValueError(f"its header is {text.strip()[:100]!r}")
    sides = tuple(int(side.rstrip("L")) for side in shape.replace(",", " ").split())
    return np.dtype(descr), sides, "F" if fortran == "True" else "C", begin + length


def _images(path: Path, remedy: str) -> Pixels:
    """Map a file of images."""
    array = _load(path, remedy)
    if array.dtype != np.uint8:
        raise UserError(f"{path} holds {array.dtype}, not uint8; store pixels as 0 to 255 in 8 bits")
    if array.ndim != 4 or array.shape[-1] != 3:
        grey = "; repeat a grey image's one channel three times" if array.shape[-1:] == (1,) else ""
        raise UserError(f"{path} has shape {array.shape}, not n h w 3{grey or '; put channels last'}")
    return array


def _numbers(path: Path, remedy: str) -> Numbers:
    """Read a file of labels or groups."""
    array = _load(path, remedy)
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{path} holds {array.dtype}, not integers; store class or group numbers")
    if array.ndim != 1:
        raise UserError(f"{path} has shape {array.shape}, not n; store one number an image")
    if array.max(initial=0) > np.iinfo(np.int64).max:
        raise UserError(f"{path} holds {array.max()}, more than 63 bits can; number classes and groups from 0")
    return np.array(array, dtype=np.int64)


def _names(path: Path) -> tuple[str, ...]:
    """Read the names of the classes."""
    try:
        with open_file(path) as file:
            lines = file.read().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = _line(error)
        raise UserError(f"{path} is not readable as UTF-8 text ({reason}); mend or remove it") from error
    return tuple(line.split("\t")[-1].strip() for line in lines if line.strip())


def _check(arrays: Arrays, folder: Path) -> None:
    """Refuse arrays that do not fit together."""
    for part in ("train", "test"):
        images = getattr(arrays, f"{part}_images")
        labels = getattr(arrays, f"{part}_labels")
        if not len(images) or 0 in images.shape:
            raise UserError(f"{part}_images.npy in {folder} is empty; a data set needs at least one image")
        if len(images) != len(labels):
            raise UserError(
                f"{folder} has {len(images)} {part} images but {len(labels)} {part} labels; store one label an image"
            )
        if labels.min() < 0:
            raise UserError(f"{part}_labels.npy in {folder} holds {labels.min()}; number classes from 0")
        if arrays.classes and labels.max() >= len(arrays.classes):
            raise UserError(
                f"{part}_labels.npy in {folder} holds {labels.max()}, but classes.txt names only "
                f"{len(arrays.classes)} classes; name each class on a line"
            )
    _check_classes(arrays, folder)
    n = len(arrays.train_labels)
    groups = arrays.train_groups
    if groups is not None and len(groups) != n:
        raise UserError(f"{folder} has {n} train images but {len(groups)} train groups; store one an image")
    train = arrays.train_images.shape[1:3]
    test = arrays.test_images.shape[1:3]
    if train != test:
        raise UserError(f"{folder} has train images of {train} pixels, test images of {test}; store one size")


def _check_classes(arrays: Arrays, folder: Path) -> None:
    """Refuse classes that have no training image, but for those that are named and have no test image either."""
    trained = np.unique(arrays.train_labels)
    if not arrays.classes and trained[-1] != len(trained) - 1:
        first = int(np.flatnonzero(trained != np.arange(len(trained)))[0])
        empty = int(trained[-1]) + 1 - len(trained)
        others = f" and {empty - 1} others below {trained[-1]}" if empty > 1 else ""
        raise UserError(
            f"train_labels.npy in {folder} has no image of class {first}{others}; "
            "number classes from 0 without gaps, or name them all in classes.txt"
        )
    untrained = np.setdiff1d(arrays.test_labels, trained)
    if len(untrained):
        raise UserError(
            f"test_labels.npy in {folder} holds {untrained[0]}, of which there is no training image; "
            "leave such images out"
        )
    n = len(arrays.train_labels)
    if len(arrays.classes) > n:
        raise UserError(
            f"classes.txt in {folder} names {len(arrays.classes)} classes for {n} training images; "
            "name only those that have some"
        )


def _line(error: Exception) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())
