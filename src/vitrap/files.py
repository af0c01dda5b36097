"""Files and folders that appear whole or not at all: who is killed on the way leaves what was there before."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON; NaN and infinity are refused.

    Raises:
        ValueError: a number is not finite; the file is as it was.
    """
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file."""
    with whole_file(path) as draft:
        draft.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within the block a draft beside `path` is written; at its end the draft, on the disk by then, takes its place.

    Where the block ends in an error, the draft is removed.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        _to_disk(draft)
        draft.chmod(0o644)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Within the block a draft of a flat folder is filled; at its end the draft takes the place of `folder`.

    Where the block ends in an error, the draft is removed.

    Args:
        folder: a new or an empty one.
        replace: what is there goes.

    Raises:
        OSError: the folder holds something by then, and is not to be replaced.
    """
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        put_in_place(draft, folder, replace)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def put_in_place(draft: Path, folder: Path, replace: bool = False) -> None:
    """Rename a flat folder, once its files are on the disk.

    With `replace`, a reader sees the old folder, the new one or, briefly, none.

    Raises:
        OSError: `folder` holds something, and is not to be replaced.
    """
    for file in draft.iterdir():
        _to_disk(file)
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
    """Put a file at another place, without a second copy on disk where the system can."""
    draft = target.with_name(f".{target.name}-{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        os.link(source, draft)
    except OSError:
        shutil.copyfile(source, draft)
    os.replace(draft, target)
    draft.unlink(missing_ok=True)  # a rename between two links of one file does nothing, by POSIX


def _to_disk(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())
