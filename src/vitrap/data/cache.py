"""The data cache: one folder per data set, with plain npy files that are memory-mapped. Never imports torch.

A data set is the folder `NAME/` in `$VITRAP_DATA` (by default the user's cache folder), which holds
- `{train,test}_images.npy`, uint8 `n h w 3`, with the same `h w` in both;
- `{train,test}_labels.npy`, any integer type, `n`, from 0;
- `train_groups.npy`, integers, `n`, if known: images of one group show the same object;
- `classes.txt`, if known: on each line a class name, or a key, a tab and the name.

Nothing in it is ever unpickled. A folder appears under its name in one step, once all of it is written.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from platformdirs import user_cache_path

from vitrap.errors import UserError, unknown
from vitrap.files import whole_folder

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
        """Number of classes: of the named ones, or else one more than the greatest label."""
        return len(self.classes) or int(max(self.train_labels.max(), self.test_labels.max())) + 1


def cache_folder() -> Path:
    """The folder of the cache: `$VITRAP_DATA`, or else `vitrap/data` in the user's cache folder."""
    chosen = os.environ.get("VITRAP_DATA")
    return Path(chosen).expanduser() if chosen else user_cache_path("vitrap") / "data"


def cached_names() -> list[str]:
    """The names of the data sets in the cache, sorted."""
    folder = cache_folder()
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(f.name for f in found if f.is_dir() and is_name(f.name))


def is_name(name: str) -> bool:
    """Whether `name` can be a folder of the cache: one path component, not hidden, without a colon."""
    return bool(name) and Path(name).name == name and not name.startswith(".") and ":" not in name


def read_cached(name: str) -> Arrays:
    """Read the data set `name` from the cache.

    Raises:
        UserError: it is not in the cache, or is incomplete.
    """
    folder = cache_folder() / name
    if not is_name(name) or (name not in DATASETS and not folder.is_dir()):
        raise unknown("data set", name, {*DATASETS, *cached_names(), "npy:PATH", "imagefolder:PATH"})
    remedy = f"run `vitrap data prepare {name}`" if name in DATASETS else FORMAT
    if not folder.is_dir():
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
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; {remedy}")
    classes = folder / "classes.txt"
    groups = folder / "train_groups.npy"
    arrays = Arrays(
        train_images=_images(folder / "train_images.npy", remedy),
        train_labels=_numbers(folder / "train_labels.npy", remedy),
        test_images=_images(folder / "test_images.npy", remedy),
        test_labels=_numbers(folder / "test_labels.npy", remedy),
        train_groups=_numbers(groups, remedy) if groups.exists() else None,
        classes=_names(classes) if classes.exists() else (),
    )
    _check(arrays, folder)
    return arrays


def write_folder(folder: Path, arrays: Arrays) -> Path:
    """Write a data set as `folder`, completely or not at all; an existing folder is replaced.

    Raises:
        UserError: the arrays do not fit together, or the folder cannot be written.
    """
    _check(arrays, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder, replace=True) as draft:
            for name, array in vars(arrays).items():
                if isinstance(array, np.ndarray):
                    np.save(draft / f"{name}.npy", array, allow_pickle=False)
            if arrays.classes:
                (draft / "classes.txt").write_text("\n".join(arrays.classes) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror or error}); make room there or set VITRAP_DATA to another folder"
        ) from error
    return folder


def _load(path: Path, remedy: str) -> np.ndarray:
    """Map an npy file."""
    if not path.exists():
        raise UserError(f"{path.name} is missing in {path.parent}; {remedy}")
    try:
        return np.lib.format.open_memmap(path, mode="c")  # unlike np.load, takes nothing but npy files
    except (ValueError, EOFError, OSError) as error:
        reason = _line(error)
        raise UserError(f"{path} is truncated or no npy file of numbers ({reason}); {remedy}") from error


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
    return np.array(array, dtype=np.int64)


def _names(path: Path) -> tuple[str, ...]:
    """Read the names of the classes."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
    n = len(arrays.train_labels)
    groups = arrays.train_groups
    if groups is not None and len(groups) != n:
        raise UserError(f"{folder} has {n} train images but {len(groups)} train groups; store one an image")
    train = arrays.train_images.shape[1:3]
    test = arrays.test_images.shape[1:3]
    if train != test:
        raise UserError(f"{folder} has train images of {train} pixels, test images of {test}; store one size")


def _line(error: Exception) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())
