"""Writes files and folders whole or not at all: if the process is killed, what was there before is unchanged."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


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
