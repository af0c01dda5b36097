"""Files and folders: whole or not at all, whatever fails on the way."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.full_disk import files_of_at_most
from vitrap.errors import UserError
from vitrap.files import check_file, check_folder, place_file, whole_folder, write_bytes, write_json


def content(folder: Path) -> dict[str, str]:
    """All files below a folder, hidden ones included."""
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


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
    def fill(replace: bool) -> None:
        with whole_folder(tmp_path / "folder", replace) as draft:
            (draft / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("0")
    with pytest.raises(KeyboardInterrupt):
        fill(True)
    assert content(tmp_path) == {"folder/old": "0"}


def test_a_folder_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    for text, replace in (("0", False), ("1", True)):
        with whole_folder(tmp_path / "folder", replace) as draft:
            (draft / text).write_text(text)
    assert content(tmp_path) == {"folder/1": "1"}

    def overwrite() -> None:
        with whole_folder(tmp_path / "folder") as draft:
            (draft / "2").write_text("2")

    with pytest.raises(OSError, match="not empty"):
        overwrite()
    assert content(tmp_path) == {"folder/1": "1"}
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]
