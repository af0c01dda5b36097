"""Filling the data cache: download once, verify, convert, and write completely or not at all.

Every archive is checked by its md5 before it is opened, wherever it came from. CIFAR is taken in its *binary version*:
the better known Python version is a pickle, and unpickling a file runs whatever code is in it. Nothing is ever
unpickled here.

Instead of archives, a folder may hold their content, at any depth. These layouts are understood:

- CIFAR-10 and -100: the files of the binary version;
- GTSRB as published: `CLASS/TRACK_FRAME.ppm`, `NUMBER.ppm`, and `GT-final_test.csv` with the classes of the latter;
- GTSRB as on Kaggle: `Train/CLASS/CLASS_TRACK_FRAME.png`, `Test/NUMBER.png` and `Test.csv`;
- Tiny ImageNet as published, or with the images of `val` sorted into a folder for each class;
- any data set as the npy files of the cache.

Hashes: CIFAR's are those of its page (https://www.cs.toronto.edu/~kriz/cifar.html); those of GTSRB's test archives are
torchvision's; those of GTSRB's final training archive and of Tiny ImageNet are what public loaders agree on, since
their publishers state none. torchvision's own GTSRB training archive is that of the competition of 2011, with 26,640
images; the benchmark's is the final one, with 39,209 images, which is taken here.
"""

import csv
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np

from vitrap.data.cache import Arrays, cache_folder, is_name, not_written, put_arrays, read_folder
from vitrap.data.sources import Progress, decode
from vitrap.errors import UserError, unknown
from vitrap.files import named_path, open_file, own_draft

BLOCK = 2**20
"""Bytes that are read at a time."""
TIMEOUT = 60
"""Seconds without a byte after which a download fails."""
GTSRB_SIZE = 32
"""Pixels; GTSRB's images have many sizes."""
PACKED = (".zip", ".tar.gz", ".tgz")
"""Endings of archives."""


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        url: where it is published; its last part is the file's name.
        md5: its hash, in hex.
    """

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Origin:
    """How a data set is made.

    Attributes:
        archives: what to download.
        n_train: number of training images.
        n_test: number of test images.
        read: reads the data set from the folder of unpacked archives, with a callback for progress.
        pickled: names of files that only a version for Python has, which is not opened.
    """

    archives: tuple[Archive, ...]
    n_train: int
    n_test: int
    read: Callable[[Path, Progress | None], Arrays]
    pickled: tuple[str, ...] = ()


def prepare(
    name: str,
    source: str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    waiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Path:
    """Put the data set `name` into the cache.

    Of several processes that prepare the same one, each waits for those before it. Whoever reads it meanwhile gets what
    was there before.

    Args:
        name: a data set known by name; with a `source` in the cache format, any name for it.
        source: where to take it from; None for where it is published. A folder in the cache format; a folder
            of the archives, or of their unpacked content; an archive; an archive's URL; or a URL below which
            the archives lie.
        folder: the cache; None for `cache_folder()`.
        progress: called with how far the present step is: bytes of a download, then images decoded.
        waiting: shows, for as long as its block lasts, that another process is being waited for.

    Returns:
        The data set's folder. Without a source, a complete one that exists already is left as it is.

    Raises:
        UserError: the name or the source is unknown, or the source cannot be reached or holds something else.
    """
    if name == "digits":
        raise UserError("data set 'digits' is embedded; there is nothing to prepare")
    local = _local(source)
    stored = local is not None and (local / "train_images.npy").exists()
    if name not in ORIGINS and not (stored and is_name(name)):
        raise unknown("data set", name, ORIGINS)
    if local is not None and not (local.is_file() or local.is_dir()):
        raise UserError(f"no file or folder {local}; give --from a path that exists, or a URL")
    target = (folder or cache_folder()) / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with own_draft(target, waiting) as draft:
            if source is None and _is_whole(target):
                return target
            arrays = read_folder(local) if local is not None and stored else _made(name, source, draft, progress)
            put_arrays(_checked(name, arrays), draft, target)
    except OSError as error:
        if source is None and _is_whole(target):  # in a cache that cannot be written
            return target
        raise not_written(target, error) from error
    return target


def _is_whole(folder: Path) -> bool:
    """Whether a folder is a complete data set."""
    try:
        read_folder(folder)
    except UserError:
        return False
    return True


def _made(name: str, source: str | None, draft: Path, progress: Progress | None) -> Arrays:
    """Make the data set `name` from its archives, which are unpacked in a folder of the draft."""
    scratch = draft / "archives"
    scratch.mkdir()
    return _read(name, _unpacked(ORIGINS[name], source, scratch, progress), source, progress)


def _unpacked(origin: Origin, source: str | None, scratch: Path, progress: Progress | None) -> Path:
    """Unpack the archives, and return the folder of their content: `scratch`, or the user's own folder."""
    local, archives = _local(source), origin.archives
    if local is not None and local.is_dir() and not all((local / a.name).is_file() for a in archives):
        return local
    if source is not None and source.endswith(PACKED) and len(archives) > 1:
        needed = ", ".join(a.name for a in archives)
        raise UserError(f"--from {source} is one archive of several; give the folder or URL that holds {needed}")
    for archive in archives:
        if local is None:
            path = scratch / archive.name
            _download(_address(archive, source), path, progress)
        else:
            path = local / archive.name if local.is_dir() else local
            _refuse_pickled(path, origin)
        _verify(path, archive)
        _unpack(path, scratch)
    return scratch


def _refuse_pickled(path: Path, origin: Origin) -> None:
    """Refuse a file, or a folder with one, of the version for Python of a data set, which is published as pickles."""
    for name in origin.pickled:
        if path.name == name or any(p.is_file() for p in path.rglob(name)):
            raise UserError(
                f"{path} holds the version for Python, which is a pickle, could run any code, and is not opened; "
                f"give the binary version, {origin.archives[0].url}"
            )


def _local(source: str | None) -> Path | None:
    """The path that a source is; None for a URL, or for no source."""
    return None if source is None or "://" in source else named_path(source)


def _read(name: str, root: Path, source: str | None, progress: Progress | None) -> Arrays:
    """Read the data set `name` from its unpacked archives."""
    try:
        return ORIGINS[name].read(root, progress)
    except UserError:
        raise
    except (OSError, KeyError, OverflowError, ValueError, csv.Error) as error:
        _refuse_pickled(root, ORIGINS[name])
        archives = ", ".join(a.name for a in ORIGINS[name].archives)
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{source or 'the archive'} does not hold {name} as published ({why}); "
            f"give --from the folder that holds {archives}, or one in the cache format"
        ) from error


def _checked(name: str, arrays: Arrays) -> Arrays:
    """Refuse data under a known name that are not that data set, by the numbers of images."""
    found = (len(arrays.train_labels), len(arrays.test_labels))
    origin = ORIGINS.get(name)
    if origin is not None and found != (origin.n_train, origin.n_test):
        raise UserError(
            f"{found[0]} training and {found[1]} test images are not {name}, which has {origin.n_train} and "
            f"{origin.n_test}; give the whole set, or prepare npy files of your own under another name"
        )
    return arrays


def _address(archive: Archive, source: str | None) -> str:
    """The URL of an archive: as published, the given one, or one below the given one."""
    if source is None:
        return archive.url
    if not source.startswith(("https://", "http://")):
        raise UserError(f"--from {source} is neither a path nor an http(s) URL; give one of them")
    return source if source.endswith(PACKED) else f"{source.rstrip('/')}/{archive.name}"


def _download(url: str, path: Path, progress: Progress | None) -> None:
    """Download a file."""
    done = 0
    with path.open("wb") as file:
        for block, total in _blocks(url, path.name):
            file.write(block)
            done += len(block)
            if progress is not None:
                progress(done, max(total, done))


def _blocks(url: str, name: str) -> Iterator[tuple[bytes, int]]:
    """The content of a URL, a block at a time, each with the length of the whole, which is 0 where it is unknown."""
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:
            total = getattr(answer, "length", None) or 0  # unlike the header, a number
            while block := answer.read(BLOCK):
                yield block, total
    except (OSError, HTTPException, ValueError) as error:  # the last of an address that is none
        if isinstance(error, HTTPError):
            error.close()  # the error is the server's answer as well, and holds the connection
        reason = error.reason if isinstance(error, URLError) else error
        raise UserError(
            f"cannot download {url} ({reason}); fetch {name} elsewhere and give it with --from PATH"
        ) from error


def _verify(path: Path, archive: Archive) -> None:
    """Refuse a file whose md5 is not the archive's."""
    try:
        with open_file(path) as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give --from another path") from error
    if found != archive.md5:
        raise UserError(
            f"{path.name} has md5 {found}, not {archive.md5}: it is damaged or another file; "
            f"download it again from {archive.url}"
        )


def _unpack(path: Path, scratch: Path) -> None:
    """Unpack an archive into a folder."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                file.extractall(scratch)  # drops absolute paths and ".." by itself
        else:
            with tarfile.open(path) as file:
                file.extractall(scratch, filter="data")
    except Exception as error:  # a damaged archive raises those of the compression, too, of which there is no list
        raise UserError(f"cannot unpack {path} ({error}); make room in {scratch.parent}, or get it again") from error


def _cifar10(root: Path, progress: Progress | None) -> Arrays:
    """CIFAR-10: five files of training images and one of test images."""
    folder = _holding(root, "data_batch_1.bin")
    parts = [_cifar_records(folder / f"data_batch_{i}.bin", 1) for i in range(1, 6)]
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    test = _cifar_records(folder / "test_batch.bin", 1)
    return Arrays(images, labels, *test, None, _lines(folder / "batches.meta.txt"))


def _cifar100(root: Path, progress: Progress | None) -> Arrays:
    """CIFAR-100, with its fine labels."""
    folder = _holding(root, "train.bin")
    train = _cifar_records(folder / "train.bin", 2)
    test = _cifar_records(folder / "test.bin", 2)
    return Arrays(*train, *test, None, _lines(folder / "fine_label_names.txt"))


def _cifar_records(path: Path, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read records of `n_labels` label bytes (the last is the fine label) and 3072 pixels, colour by colour."""
    with open_file(path) as file:
        records = np.frombuffer(file.read(), dtype=np.uint8).reshape(-1, n_labels + 3072)
    images = records[:, n_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, n_labels - 1].astype(np.int64)


def _gtsrb(root: Path, progress: Progress | None) -> Arrays:
    """GTSRB, as published or as on Kaggle: see above."""
    if any(root.rglob("GT-final_test.csv")):
        truth = _classes(_holding(root, "GT-final_test.csv") / "GT-final_test.csv", "Filename", delimiter=";")
        train = sorted(p for p in root.rglob("*.ppm") if "_" in p.stem)
        test = sorted(p for p in root.rglob("*.ppm") if p.name in truth)
    else:
        folder = _holding(root, "Test.csv")
        truth = _classes(folder / "Test.csv", "Path", delimiter=",")
        train = sorted((folder / "Train").glob("*/*_*.png"), key=lambda p: (int(p.parent.name), p.name))
        test = sorted(p for p in (folder / "Test").glob("*.png") if p.name in truth)
    if not train or not test or len(test) != len(truth):
        raise FileNotFoundError(f"{len(train)} training images, {len(test)} of {len(truth)} test images")
    labels = np.array([int(p.parent.name) for p in train], dtype=np.int64)
    tracks = np.array([int(p.stem.split("_")[-2]) for p in train], dtype=np.int64)
    return Arrays(
        train_images=decode(train, GTSRB_SIZE, crop=False, progress=progress),
        train_labels=labels,
        test_images=decode(test, GTSRB_SIZE, crop=False, progress=progress),
        test_labels=np.array([truth[p.name] for p in test], dtype=np.int64),
        train_groups=labels * 1000 + tracks,
    )


def _tiny_imagenet(root: Path, progress: Progress | None) -> Arrays:
    """Tiny ImageNet: the official validation images are the test set, since the official test labels are not public."""
    folder = _holding(root, "wnids.txt")
    wnids = sorted(_lines(folder / "wnids.txt"))
    label = {wnid: i for i, wnid in enumerate(wnids)}
    words = dict(line.split("\t", 1) for line in _lines(folder / "words.txt"))
    train = [(p, label[wnid]) for wnid in wnids for p in _pictures(folder / "train" / wnid)]
    # A script that sorts val/ into folders may leave the annotations where they were.
    unsorted = folder / "val" / "images"
    if (folder / "val" / "val_annotations.txt").exists() and any(file.is_file() for file in unsorted.glob("*")):
        truth = dict(line.split("\t")[:2] for line in _lines(folder / "val" / "val_annotations.txt"))
        test = [(unsorted / name, label[truth[name]]) for name in sorted(truth)]
    else:
        sorted_in = [(p, label[wnid]) for wnid in wnids for p in _pictures(folder / "val" / wnid)]
        test = sorted(sorted_in, key=lambda one: one[0].name)
    if not train or not test:
        raise FileNotFoundError(f"{len(train)} training images, {len(test)} test images")
    return Arrays(
        train_images=decode([p for p, _ in train], None, progress=progress),
        train_labels=np.array([label for _, label in train]),
        test_images=decode([p for p, _ in test], None, progress=progress),
        test_labels=np.array([label for _, label in test]),
        classes=tuple(words.get(wnid, wnid) for wnid in wnids),
    )


def _pictures(folder: Path) -> list[Path]:
    """The images of a class of Tiny ImageNet: those in its folder, or in the folder `images` there."""
    return sorted(folder.rglob("*.JPEG"))


def _classes(table: Path, column: str, delimiter: str) -> dict[str, int]:
    """The class of each file that a csv file of GTSRB has in a column."""
    with open_file(table) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        rows = csv.DictReader(text, delimiter=delimiter, restval="")
        return {row[column].rpartition("/")[2]: int(row["ClassId"]) for row in rows}


def _holding(root: Path, name: str) -> Path:
    """The first folder at or below `root` that holds the file `name`."""
    for path in sorted(root.rglob(name)):
        return path.parent
    raise FileNotFoundError(f"no {name} in it")


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty."""
    with open_file(path) as file:
        return tuple(line.strip() for line in file.read().decode("utf-8-sig").splitlines() if line.strip())


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_ERDA = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"

ORIGINS = {
    "cifar10": Origin(
        (Archive(f"{_TORONTO}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
        50_000,
        10_000,
        _cifar10,
        ("cifar-10-python.tar.gz", "data_batch_1"),
    ),
    "cifar100": Origin(
        (Archive(f"{_TORONTO}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),),
        50_000,
        10_000,
        _cifar100,
        ("cifar-100-python.tar.gz", "train"),
    ),
    "gtsrb": Origin(
        (
            Archive(f"{_ERDA}/GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3"),
            Archive(f"{_ERDA}/GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
            Archive(f"{_ERDA}/GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
        ),
        39_209,
        12_630,
        _gtsrb,
    ),
    "tiny-imagenet": Origin(
        (Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),),
        100_000,
        10_000,
        _tiny_imagenet,
    ),
}
"""How each data set known by name is made."""
