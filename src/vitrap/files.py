"""Reads regular files alone, and writes files and folders whole or not at all.

If the process is killed while it writes, what was there before is unchanged. All that vitrap keeps is written here, in
Python, so that a full disk is an `OSError` that names the file. Modes of files and folders follow the process's umask.

What is written is a draft first, beside its final place:

- A file: `write_json` and `write_bytes` or, where others write to a path, `whole_file`.
- A new folder: `whole_folder`.
- A folder that others may be reading: within `own_draft` fill a new one, and put it there by `replace_folder`. Readers
  find the content by `current_location`, also while it is being replaced.
- A folder that the caller has filled under a lock of its own: `put_in_place`.
"""

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from vitrap.errors import UserError
from vitrap.formats import parse_json

LOCK = "lock"
"""In a draft folder: the file that its process holds locked."""
OLD = "old"
"""In a draft folder: the folder that is being replaced."""


def named_path(written: str) -> Path:
    """The path that a user wrote, where `~` is a home folder; nothing need be there.

    Raises:
        UserError: no file can have this path.
    """
    try:
        path = Path(written).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # raises an error for a NUL and for names that are too long
    except (OSError, RuntimeError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{written[:100]!r} is no path that can be read ({why}); give another") from error
    return path


PATH_RESERVE = 128
"""Bytes of a path's length that are kept free for names inside a folder."""
SUFFIX = 8 * "[0-9a-f]"
"""Matches how the name of a draft ends."""
DRAFTS = ".*-" + SUFFIX
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
        os.fspath(folder).encode()  # safetensors takes no path that is not Unicode text
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
        # The system tells only by trying which names and paths are too long, and it tries what is there alone.
        missing = folder.absolute().parts[len(there.absolute().parts) :]
        for place in (*(there / name for name in missing), folder / ("x" * PATH_RESERVE)):
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
    """Yield a draft beside `path` for the block to make; at the end it is flushed to disk and renamed to `path`.

    The draft never outlasts the block.

    Raises:
        OSError: it cannot be written; the error names `path`, and what was there is as it was.
    """
    draft = _draft(path)
    with named_errors(path):
        _clear_drafts(path)
        with draft.open("wb") as held:
            _hold(held)
            try:
                yield draft
                _sync(draft)
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)


def _hold(file: BinaryIO) -> bool:
    """Lock a file for as long as it is open here; False where another process has it, or the system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _clear_drafts(path: Path) -> None:
    """Remove the drafts of a file whose processes were killed: those that nobody holds."""
    for left in path.parent.glob(glob.escape(_draft_name(path)) + SUFFIX):
        with suppress(OSError), left.open("rb") as draft:
            if _hold(draft):
                left.unlink()


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Have an error of the system within the block name `path`; that of a write names nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _draft(path: Path) -> Path:
    """A new name for a draft of a file or a folder, beside it; the longest of names leaves no room for more."""
    return path.with_name(_draft_name(path) + secrets.token_hex(4))


def _draft_name(path: Path) -> str:
    """How the names of a file's or folder's drafts begin."""
    return f".{path.name[:50]}-"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a draft folder for the block to fill with files; at the end it is renamed to `folder`.

    Two processes that make the same folder do so one after the other. However the block ends, the draft is removed.

    Args:
        folder: a new or an empty folder.

    Raises:
        OSError: the folder is not empty by then.
    """
    with own_draft(folder) as draft:
        new = draft / "new"
        new.mkdir()
        yield new
        put_in_place(new, folder)


@contextmanager
def own_draft(folder: Path, waiting: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[Path]:
    """Yield a folder beside `folder`, `.NAME-draft`, in which this process alone makes `folder`; then remove it.

    The draft holds a lock, which the system gives back when the process dies. So a process that needs the same draft
    waits for the other one, and what a killed process left is removed by the next.

    Args:
        folder: the folder to make; that which it is in must be there.
        waiting: shows, for as long as its block lasts, that another process is being waited for.
    """
    draft = draft_of(folder)
    with _locked(draft, waiting):
        _put_back(folder)
        _clear(draft)
        try:
            yield draft
        finally:
            _put_back(folder)
            _clear(draft)
            # Last, when nothing is left to disturb: from here on another process may take the draft.
            (draft / LOCK).unlink()
            with suppress(OSError):
                draft.rmdir()


def replace_folder(new: Path, folder: Path) -> None:
    """Flush the files of `new`, a folder in the draft of `folder`, to disk, and rename `new` to `folder`.

    What was there before can be found by `current_location` until then, also if the process is killed in between.
    Whoever has its files open or mapped keeps them.
    """
    for file in new.iterdir():
        _sync(file)
    if folder.exists():
        os.rename(folder.resolve(), draft_of(folder) / OLD)
    os.rename(new, folder.resolve())


def current_location(folder: Path) -> Path:
    """Where the content of `folder` is now: there or, while `replace_folder` is half done, in its draft."""
    if folder.exists():
        return folder
    old = draft_of(folder) / OLD
    return old if old.exists() else folder


def draft_of(folder: Path) -> Path:
    """The draft of a folder; a link to a folder shares the draft of what it leads to."""
    place = folder.resolve()
    return place.with_name(f".{place.name}-draft")


def _put_back(folder: Path) -> None:
    """Undo a `replace_folder` that is half done."""
    if (there := current_location(folder)) != folder:
        os.rename(there, folder.resolve())


def _clear(draft: Path) -> None:
    """Remove all that is in a draft but its lock."""
    for left in draft.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        elif left.name != LOCK:
            left.unlink()


@contextmanager
def _locked(draft: Path, waiting: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Make a draft folder, and hold its lock within the block."""
    while True:
        with _open_lock(draft) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with waiting():
                    fcntl.flock(lock, fcntl.LOCK_EX)
            # A process that was waited for has removed its lock file: then this was a lock on nothing.
            if _is_in_place(lock, draft / LOCK):
                yield
                return


def _is_in_place(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _open_lock(draft: Path) -> BinaryIO:
    """Open the lock file of a draft folder, which is made where it is missing."""
    while True:
        draft.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process removed the folder just now
            return (draft / LOCK).open("ab")


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
    _clear_drafts(target)
    draft = _draft(target)
    try:
        os.link(source, draft)
    except OSError:
        with whole_file(target) as copy:
            shutil.copyfile(source, copy)
        return
    with named_errors(target):
        os.replace(draft, target)
        draft.unlink(missing_ok=True)  # POSIX does not rename one link of a file to another link of the same file


def _sync(file: Path) -> None:
    """Flush a file to disk."""
    with file.open("rb") as written:
        os.fsync(written.fileno())
