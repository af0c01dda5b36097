"""Files and folders: whole or not at all, whatever fails on the way."""

import errno
import json
import os
from pathlib import Path

import pytest

from vitrap.errors import UserError
from vitrap.files import open_file, place_file, read_bytes, read_json, whole_folder, write_bytes, write_json


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
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
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
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755


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
