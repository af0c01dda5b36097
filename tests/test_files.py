"""Files and folders: whole or not at all, whatever fails on the way."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.full_disk import files_of_at_most
from vitrap.errors import UserError
from vitrap.files import (
    LOCK,
    check_file,
    check_folder,
    current_location,
    named_path,
    open_file,
    own_draft,
    place_file,
    read_bytes,
    read_json,
    replace_folder,
    whole_folder,
    write_bytes,
    write_json,
)


def content(folder: Path) -> dict[str, str]:
    """All files below a folder, hidden ones included."""
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def circle(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "link")
    return folder / "link"


ODD = {
    "a pipe": (pipe, "it is a pipe or a device, not a file"),
    "a device": (lambda folder: Path("/dev/zero"), "it is a pipe or a device, not a file"),
    "a folder": (lambda folder: folder, "Is a directory"),
    "a circle of links": (circle, "Too many levels of symbolic links"),
    "a name with a NUL": (lambda folder: folder / "a\0b", "no file can have such a name"),
    "a name of no text": (lambda folder: folder / "\ud800", "no file can have such a name"),
    "a long name": (lambda folder: folder / ("x" * 300), "File name too long"),
    "nothing": (lambda folder: folder / "none", "No such file or directory"),
}


@pytest.mark.parametrize("kind", ODD)
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    make, said = ODD[kind]
    path = make(tmp_path)
    with pytest.raises(OSError, match=said):
        open_file(path)
    with pytest.raises(UserError, match=said):
        read_json(path)


def test_a_file_larger_than_its_format_allows_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, more than 4"):
        read_bytes(tmp_path / "file", 4)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write_bytes(tmp_path / "file", text.encode())
        assert content(tmp_path) == {"file": text}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "file", b"content")
        place_file(tmp_path / "file", tmp_path / "link")
        with whole_folder(tmp_path / "folder") as draft:
            write_bytes(draft / "file", b"content")
    finally:
        os.umask(before)
    modes = {str(f.relative_to(tmp_path)): f.stat().st_mode & 0o777 for f in tmp_path.rglob("*")}
    file = 0o666 & ~umask
    assert modes == {"file": file, "link": file, "folder": 0o777 & ~umask, "folder/file": file}


@pytest.mark.parametrize("way", ["write", "copy"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "source").write_text("x" * 100_000)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "other device")))
    before = content(tmp_path)
    ways = {"write": partial(write_bytes, content=b"x" * 100_000), "copy": partial(place_file, tmp_path / "source")}
    with files_of_at_most(50_000), pytest.raises(OSError, match=f"{re.escape(repr(str(tmp_path / 'file')))}$"):
        ways[way](tmp_path / "file")
    assert content(tmp_path) == before


LONG = "x" * 300
PLACES = ("file", "file/below", LONG, f"new/{LONG}", "a/" * 2100, "link", "link/below", "nul\0")


@pytest.mark.parametrize("check", [check_folder, check_file])
@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_written_is_refused(tmp_path: Path, place: str, check: Callable[..., None]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    if (place, check) == ("file", check_file):
        check(tmp_path / place, "it", "give another")  # it would be replaced
        return
    with pytest.raises(UserError, match=r"^it cannot be written \(.+\); give another$") as refusal:
        check(tmp_path / place, "it", "give another")
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("check", [check_folder, check_file])
def test_what_can_be_written_is_not_refused_and_nothing_is_made(tmp_path: Path, check: Callable[..., None]) -> None:
    for place in ("new", "x" * 255, "new/er", "é" * 100):
        check(tmp_path / place, "it", "give another")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(error))
    for check in (check_folder, check_file):
        with pytest.raises(UserError, match=r"it cannot be written \(Read-only file system\)"):
            check(tmp_path / "new", "it", "give another")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("x" * 255), b"content")
    assert content(tmp_path) == {"x" * 255: "content"}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    write_bytes(tmp_path / "file", b"old")

    def fail(*args: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        write_bytes(tmp_path / "file", b"new")
    assert content(tmp_path) == {"file": "old"}


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1.5, None, "α"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1.5, None, "α"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert sorted(content(tmp_path)) == ["a.json"]


@pytest.mark.parametrize("linkable", [True, False])
def test_a_file_is_placed_over_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linkable: bool) -> None:
    if not linkable:
        monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(errno.EXDEV, "other device")))
    (tmp_path / "source").write_text("new")
    (tmp_path / "target").write_text("old")
    place_file(tmp_path / "source", tmp_path / "target")
    assert content(tmp_path) == {"source": "new", "target": "new"}
    assert (tmp_path / "target").samefile(tmp_path / "source") == linkable


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "new") as draft:
        (draft / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    assert content(tmp_path) == {"new/a": "1"}


def test_a_folder_that_cannot_be_filled_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "folder") as draft:
            (draft / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_whole_folder_never_takes_the_place_of_another(tmp_path: Path) -> None:
    def fill(name: str) -> None:
        with whole_folder(tmp_path / "folder") as draft:
            (draft / name).write_text(name)

    fill("1")
    with pytest.raises(OSError, match="not empty"):
        fill("2")
    assert content(tmp_path) == {"folder/1": "1"}
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]


def remake(folder: Path, text: str) -> None:
    with own_draft(folder) as draft:
        (draft / "new").mkdir()
        (draft / "new" / text).write_text(text)
        replace_folder(draft / "new", folder)


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_is_replaced_where_it_lies(tmp_path: Path, link: bool) -> None:
    folder = tmp_path / "folder"
    if link:
        (tmp_path / "disk").mkdir()
        folder.symlink_to(tmp_path / "disk" / "folder")
    for text in ("1", "2"):
        remake(folder, text)
        assert content(folder.resolve()) == {text: text}
    assert folder.is_symlink() == link
    assert [f.name for f in tmp_path.glob("**/.*")] == []


def test_a_replacement_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    remake(folder, "1")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            assert content(current_location(folder)) == {"1": "1"}, "a reader found nothing"
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        remake(folder, "2")
    assert content(tmp_path) == {"folder/1": "1"}


def test_who_wants_the_same_draft_waits_and_finds_it_empty(tmp_path: Path) -> None:
    folder, told, order = tmp_path / "folder", Event(), []

    @contextmanager
    def waiting() -> Iterator[None]:
        told.set()
        yield

    def second() -> None:
        with own_draft(folder, waiting) as draft:
            order.append("second")
            assert [f.name for f in draft.iterdir()] == [LOCK]

    thread = Thread(target=second)
    with own_draft(folder) as draft:
        (draft / "half").write_text("half")
        thread.start()
        told.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [{}, {"new/a": "1"}, {"old/a": "0"}, {"lock": "", "archives/b/c": "2"}])
def test_what_a_killed_process_left_is_cleared_or_put_back(tmp_path: Path, left: dict[str, str]) -> None:
    for name, text in left.items():
        path = tmp_path / ".folder-draft" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with own_draft(tmp_path / "folder") as draft:
        assert [f.name for f in draft.iterdir()] == [LOCK]
    assert content(tmp_path) == ({"folder/a": "0"} if "old/a" in left else {})
    assert not (tmp_path / ".folder-draft").exists()


@pytest.mark.parametrize("written", ["~nobody-of-this-name/x", "a\0b", "x" * 300])
def test_what_is_no_path_is_refused(written: str) -> None:
    with pytest.raises(UserError, match="is no path that can be read .*; give another"):
        named_path(written)
