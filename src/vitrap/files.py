"""Reads regular files alone, and writes files and folders whole or not at all.

If the process is killed while it writes, what was there before is unchanged.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from vitrap.errors import UserError
from vitrap.formats import parse_json

MOST_BYTES = 2**28
"""Greatest size of a text file, such as one of records."""


def open_file(path: str | Path, most: int | None = None) -> BufferedReader:
    """Open a regular file for reading. A pipe or a device is refused, since reading it might never end.

    Args:
        path: the file.
        most: its greatest size in bytes; None for any.

    Raises:
        OSError: it is not there, cannot be read, is no regular file or too large, or no file can have such a name.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
    except ValueError as error:  # the name has a NUL, or is no Unicode text
        raise OSError(errno.EINVAL, "no file can have such a name") from error
    try:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than {most:,}")
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        OSError: as for `open_file`.
    """
    with open_file(path, most) as file:
        return file.read()


def read_json(path: Path) -> Any:
    """The content of a JSON file that vitrap wrote.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        return parse_json(read_bytes(path))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{str(path)!r} is damaged ({error})") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON; NaN and infinity are refused.

    Raises:
        ValueError: a number is not finite; the file is as it was.
    """
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a draft beside `path` for the block to write; at the end it is flushed to disk and renamed to `path`.

    If the block raises an error, the draft is removed.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        _sync(draft)
        draft.chmod(0o644)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a draft folder for the block to fill with files; at the end it is renamed to `folder`.

    If the block raises an error, the draft is removed.

    Args:
        folder: a new or an empty folder.
        replace: whether a folder that is there is replaced.

    Raises:
        OSError: the folder is not empty by then, and is not to be replaced.
    """
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        put_in_place(draft, folder, replace)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def put_in_place(draft: Path, folder: Path, replace: bool = False) -> None:
    """Flush the files of a draft folder, which has no subfolders, to disk, and rename the draft to `folder`.

    With `replace`, a reader sees the old folder, the new one or, for a moment, none.

    Raises:
        OSError: `folder` is not empty, and is not to be replaced.
    """
    for file in draft.iterdir():
        _sync(file)
    draft.chmod(0o755)
    if not replace:
        os.rename(draft, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        with suppress(FileNotFoundError):
            os.rename(folder, aside / folder.name)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def place_file(source: Path, target: Path) -> None:
    """Put a file at another place: as a hard link where the file system has them, else as a copy."""
    draft = target.with_name(f".{target.name}-{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        os.link(source, draft)
    except OSError:
        shutil.copyfile(source, draft)
    os.replace(draft, target)
    draft.unlink(missing_ok=True)  # POSIX: renaming one link of a file to another of the same file does nothing


def _sync(file: Path) -> None:
    """Flush a file to disk."""
    with file.open("rb") as written:
        os.fsync(written.fileno())
