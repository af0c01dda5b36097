"""Writes files and folders whole or not at all: if the process is killed, what was there before is unchanged.

All that vitrap keeps is written here, in Python, so that a full disk is an `OSError` that names the file. Modes of
files and folders follow the process's umask.
"""

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitrap.errors import UserError

LONGEST = 128
"""Bytes that must be left of the longest path for what is written into a folder."""
DRAFTS = ".*-" + 8 * "[0-9a-f]"
"""Matches the names of drafts in a folder."""


def check_folder(folder: Path, named: str, remedy: str) -> None:
    """Refuse a folder that cannot be made, or written into, before any work is done; nothing is made yet.

    Args:
        folder: the folder; those above it may be missing, too.
        named: what it is called in the message.
        remedy: what to do about it.

    Raises:
        UserError: naming it and why.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
        # The system tells only by trying which names and paths are too long, and it tries what is there alone.
        missing = folder.absolute().parts[len(there.absolute().parts) :]
        for place in (*(there / name for name in missing), folder / ("x" * LONGEST)):
            with suppress(FileNotFoundError):
                place.lstat()
        if missing and (there / missing[0]).is_symlink():
            raise FileNotFoundError(errno.ENOENT, "it is a link to nothing")
    except (OSError, ValueError) as error:  # the second where a name has a NUL
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{named} cannot be written ({why}); {remedy}") from error


def check_file(path: Path, named: str, remedy: str) -> None:
    """Refuse a file that cannot be written, or that is a folder or a device; arguments and error as `check_folder`."""
    check_folder(path.parent, named, remedy)
    if not os.path.exists(path):
        check_folder(path, named, remedy)  # its name may be too long
    elif not path.is_file():
        raise UserError(f"{named} cannot be written (it is there, and no file); {remedy}")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


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
    """Yield a draft beside `path` for the block to make; at the end it is flushed to disk and renamed to `path`.

    The draft never outlasts the block.

    Raises:
        OSError: it cannot be written; the error names `path`, and what was there is as it was.
    """
    draft = _draft(path)
    with named_errors(path):
        try:
            yield draft
            _sync(draft)
            os.replace(draft, path)
        finally:
            # Even after the renaming: POSIX does not rename one link of a file to another link of the same file.
            with suppress(OSError):
                draft.unlink()


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Have an error of the system within the block name `path`; that of a write names nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _draft(path: Path) -> Path:
    """A new name for a draft of a file or a folder, beside it; the longest of names leaves no room for more."""
    return path.with_name(f".{path.name[:50]}-{secrets.token_hex(4)}")


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
    draft = _draft(folder)
    draft.mkdir()
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
    with whole_file(target) as draft:
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


def _sync(file: Path) -> None:
    """Flush a file to disk."""
    with file.open("rb") as written:
        os.fsync(written.fileno())
