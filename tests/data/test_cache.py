"""The cache format: what is written comes back; what is not whole is refused in one clear line."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitrap.data.cache import (
    DATASETS,
    Arrays,
    cache_folder,
    cached_names,
    read_cached,
    read_folder,
    write_folder,
)
from vitrap.errors import UserError


def made(n: int = 12, m: int = 6) -> Arrays:
    rng = np.random.default_rng(0)
    return Arrays(
        train_images=rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8),
        train_labels=np.arange(n) % 3,
        test_images=rng.integers(0, 256, (m, 8, 8, 3), dtype=np.uint8),
        test_labels=np.arange(m) % 3,
        train_groups=np.arange(n) // 2,
        classes=("a", "b", "c"),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "made", made())


def test_what_is_written_comes_back(folder: Path) -> None:
    back, arrays = read_folder(folder), made()
    for name, array in vars(arrays).items():
        assert np.array_equal(getattr(back, name), array), name
    assert back.n_classes == 3
    assert isinstance(back.train_images, np.memmap)


def test_groups_and_classes_are_optional(tmp_path: Path) -> None:
    back = read_folder(write_folder(tmp_path / "x", replace(made(), train_groups=None, classes=())))
    assert back.train_groups is None
    assert back.classes == ()
    assert back.n_classes == 3


def test_a_class_beyond_the_labels_counts_if_named(tmp_path: Path) -> None:
    assert read_folder(write_folder(tmp_path / "x", replace(made(), classes=tuple("abcd")))).n_classes == 4


def test_changing_what_was_read_never_changes_the_file(folder: Path) -> None:
    read_folder(folder).train_images[0] = 7
    assert np.array_equal(read_folder(folder).train_images, made().train_images)


def test_a_class_name_is_what_stands_after_the_tab(folder: Path) -> None:
    (folder / "classes.txt").write_text("n01\tgoldfish, carp\nn02\tcentipede\nn03\tstork\n")
    assert read_folder(folder).classes == ("goldfish, carp", "centipede", "stork")


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_labels_of_any_integer_type(folder: Path, kind: type) -> None:
    np.save(folder / "train_labels.npy", made().train_labels.astype(kind))
    labels = read_folder(folder).train_labels
    assert labels.dtype == np.int64
    assert np.array_equal(labels, made().train_labels)


def store(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, array, allow_pickle=True)


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def archive(folder: Path) -> None:
    with (folder / "test_labels.npy").open("wb") as file:
        np.savez(file, labels=made().test_labels)


ZEROS = np.zeros((12, 8, 8, 3), dtype=np.uint8)
BROKEN = {
    "missing": (lambda f: (f / "test_labels.npy").unlink(), "test_labels.npy is missing"),
    "truncated": (cut("train_images.npy", 500), "train_images.npy is truncated"),
    "header cut": (cut("train_labels.npy", 20), "train_labels.npy is truncated"),
    "empty file": (cut("test_images.npy", 0), "test_images.npy is truncated"),
    "pickle": (store("train_labels.npy", np.array([{}], dtype=object)), "no npy file of numbers"),
    "archive": (archive, "no npy file of numbers"),
    "float images": (store("train_images.npy", ZEROS / 255), "float64, not uint8"),
    "channels first": (
        store("train_images.npy", ZEROS.transpose(0, 3, 1, 2)),
        r"\(12, 3, 8, 8\), not n h w 3",
    ),
    "grey": (store("train_images.npy", ZEROS[..., :1]), "repeat a grey image's one channel"),
    "flat": (store("train_images.npy", ZEROS[..., 0]), r"\(12, 8, 8\), not n h w 3; put channels last"),
    "no images": (store("train_images.npy", ZEROS[:0]), "train_images.npy in .* is empty"),
    "no pixels": (
        store("test_images.npy", np.zeros((6, 0, 0, 3), np.uint8)),
        "test_images.npy in .* is empty",
    ),
    "float labels": (store("train_labels.npy", np.zeros(12)), "float64, not integers"),
    "one-hot labels": (store("train_labels.npy", np.eye(12, dtype=int)), r"\(12, 12\), not n"),
    "negative label": (store("test_labels.npy", np.arange(6) - 1), "holds -1; number classes from 0"),
    "too few labels": (store("train_labels.npy", np.zeros(11, int)), "12 train images but 11 train labels"),
    "too few groups": (store("train_groups.npy", np.zeros(11, int)), "12 train images but 11 train groups"),
    "float groups": (store("train_groups.npy", np.zeros(12)), "train_groups.npy holds float64"),
    "other size": (store("test_images.npy", np.zeros((6, 9, 8, 3), np.uint8)), "store one size"),
    "too few names": (lambda f: (f / "classes.txt").write_text("a\nb\n"), "names only 2 classes"),
    "odd names": (lambda f: (f / "classes.txt").write_bytes(b"\xff\xfe\xff"), "not readable as UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_whole_is_refused_in_one_line(folder: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder .*nowhere; it must hold"):
        read_folder(tmp_path / "nowhere")


def test_a_write_replaces_the_whole_folder(folder: Path) -> None:
    write_folder(folder, replace(made(8, 4), train_groups=None))
    back = read_folder(folder)
    assert len(back.train_labels) == 8
    assert back.train_groups is None, "the old folder's groups stayed"
    assert [f.name for f in folder.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    folder = tmp_path / "made"
    if earlier:
        write_folder(folder, made())
    save, calls = np.save, []

    def interrupted(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, made(8, 4))
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == (["made"] if earlier else [])
    if earlier:
        assert len(read_folder(folder).train_labels) == 12


def test_arrays_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="12 train images but 3 train labels"):
        write_folder(tmp_path / "x", replace(made(), train_labels=np.zeros(3, int)))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*set VITRAP_DATA"):
        write_folder(tmp_path / "file" / "x", made())


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("VITRAP_DATA")
    assert cache_folder().parts[-2:] == ("vitrap", "data")


def test_names_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path / "none"))
    assert cached_names() == []
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path))
    write_folder(tmp_path / "mine", made())
    (tmp_path / ".mine-draft").mkdir()
    (tmp_path / "notes.txt").touch()
    assert cached_names() == ["mine"]
    assert len(read_cached("mine").train_labels) == 12


def test_a_known_name_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"not in the data cache {tmp_path}; run `vitrap data prepare cifar10`"):
        read_cached("cifar10")
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(UserError, match="train_images.npy is missing.* run `vitrap data prepare cifar10`"):
        read_cached("cifar10")


@pytest.mark.parametrize("name", ["cifar11", "../cifar10", "", ".", "..", ".hidden", "npz:x"])
def test_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path))
    with pytest.raises(UserError, match="unknown data set") as caught:
        read_cached(name)
    for known in (*DATASETS, "npy:PATH", "imagefolder:PATH"):
        assert known in str(caught.value)


def test_naming_the_data_sets_never_imports_torch() -> None:
    code = "import sys, vitrap.data, vitrap.data.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
