"""The cache format: what is written comes back; what is not whole is refused in one clear line."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitrap.data import cache
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
    "labels from 1": (store("train_labels.npy", np.arange(12) % 3 + 1), "no image of class 0; number classes from 0"),
    "a label left out": (store("train_labels.npy", np.arange(12) % 3 * 2), "no image of class 1 and 1 others below 4"),
    "255 for no class": (store("train_labels.npy", np.r_[np.arange(11) % 3, 255]), "class 3 and 251 others below 255"),
    "10**10": (store("train_labels.npy", np.r_[np.arange(11) % 3, 10**10]), "class 3 and 9999999996 others"),
    "uint64": (store("train_labels.npy", np.full(12, 2**63, np.uint64)), "9223372036854775808, more than 63 bits"),
    "untrained": (store("train_labels.npy", np.arange(12) % 2), "test_labels.npy in .* holds 2, of which there is no"),
    "too many names": (lambda f: (f / "classes.txt").write_text("a\n" * 13), "names 13 classes for 12 training"),
    "too few labels": (store("train_labels.npy", np.zeros(11, int)), "12 train images but 11 train labels"),
    "too few groups": (store("train_groups.npy", np.zeros(11, int)), "12 train images but 11 train groups"),
    "float groups": (store("train_groups.npy", np.zeros(12)), "train_groups.npy holds float64"),
    "other size": (store("test_images.npy", np.zeros((6, 9, 8, 3), np.uint8)), "store one size"),
    "too few names": (lambda f: (f / "classes.txt").write_text("a\nb\n"), "names only 2 classes"),
    "odd names": (lambda f: (f / "classes.txt").write_bytes(b"\xff\xfe\xff"), "not readable as UTF-8"),
}

UNNAMED = {"labels from 1", "a label left out", "255 for no class", "10**10", "untrained"}
"""Cases that are refused where `classes.txt` does not name the classes."""


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_whole_is_refused_in_one_line(folder: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    if case in UNNAMED:
        (folder / "classes.txt").unlink()
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


@pytest.mark.parametrize("name", ["train_images.npy", "train_labels.npy", "train_groups.npy", "classes.txt"])
def test_a_pipe_in_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name} is .*a pipe or a device"):
        read_folder(folder)


def test_a_named_class_may_be_empty_but_not_where_it_is_tested(folder: Path) -> None:
    np.save(folder / "train_labels.npy", np.arange(12) % 2)
    with pytest.raises(UserError, match="holds 2, of which there is no training image"):
        read_folder(folder)
    np.save(folder / "test_labels.npy", np.arange(6) % 2)
    assert read_folder(folder).n_classes == 3


def test_lines_of_class_names_end_where_an_editor_ends_them(folder: Path) -> None:
    (folder / "classes.txt").write_bytes("\ufeffa\r\nb\u2028b\r\nc\x0cc\r\n".encode())
    assert read_folder(folder).classes == ("a", "b\u2028b", "c\x0cc")


# ---- npy files of any content


def npy(version: tuple[int, int], header: bytes, rest: bytes) -> bytes:
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + rest


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set for many tests, which put back what they change: writing one anew waits for the disk."""
    return write_folder(tmp_path_factory.mktemp("shared") / "made", made())


def outcome(folder: Path, content: bytes, name: str = "train_labels.npy") -> str | np.ndarray:
    """The array that is read of a file with this content, or the line with which it is refused."""
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        return np.array(getattr(read_folder(folder), name.removesuffix(".npy")))
    except UserError as error:
        return str(error)
    finally:
        (folder / name).write_bytes(before)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(
    ("kind", "order"), [("<i8", "C"), (">i8", "C"), ("<u2", "C"), ("|u1", "C"), ("|i1", "F"), (">u4", "F")]
)
def test_every_version_type_and_byte_order_is_read(
    shared: Path, version: tuple[int, int], kind: str, order: str
) -> None:
    labels = made().train_labels.astype(kind)
    header = f"{{'shape': (12,), 'fortran_order': {order == 'F'}, \"descr\" : \"{kind}\"}}".encode()
    assert np.array_equal(outcome(shared, npy(version, header, labels.tobytes())), made().train_labels)


def test_images_in_fortran_order_are_read(folder: Path) -> None:
    np.save(folder / "train_images.npy", np.asfortranarray(made().train_images))
    assert np.array_equal(read_folder(folder).train_images, made().train_images)


SIDES = st.integers(-2, 20).map(str) | st.sampled_from(["2147483648", "4294967296", "18446744073709551616", "9" * 5000])
HEADERS = st.builds(
    "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}\n".format,
    st.sampled_from(["'|u1'", "'<i8'", "'>f4'", "'|O'", "'<U3'", "'|V9'", "'i3'", "[('a', '<i8')]", "'<i8'*9**9", "3"]),
    st.sampled_from(["True", "False", "None", "1"]),
    st.lists(SIDES, max_size=70).map(lambda sides: f"({', '.join(sides)},)"),
)


@settings(deadline=1000, max_examples=150)
@given(st.sampled_from([(1, 0), (2, 0), (3, 0), (1, 7), (9, 0)]), HEADERS, st.binary(max_size=200))
@example((2, 0), "(" * 9000, b"")
@example((1, 0), "{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296, 8, 3), }", b"0" * 999)
def test_whatever_a_header_claims_is_read_or_refused(
    shared: Path, version: tuple[int, int], header: str, rest: bytes
) -> None:
    for name in ("train_labels.npy", "train_images.npy"):
        outcome(shared, npy(version, header.encode()[:60_000], rest), name)


@settings(deadline=1000, max_examples=100)
@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 300))
def test_any_bytes_are_read_or_refused(shared: Path, noise: bytes, start: int, end: int) -> None:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (12,), }\n"
    whole = npy((1, 0), header, made().train_labels.tobytes())
    outcome(shared, noise)
    outcome(shared, whole[:start] + noise + whole[end:])


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


def test_who_has_a_set_mapped_keeps_it(folder: Path) -> None:
    before = read_folder(folder)
    write_folder(folder, made(8, 4))
    assert np.array_equal(before.train_images, made().train_images)


def test_a_set_that_is_replaced_while_it_is_read_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = cache._images, []

    def replacing(path: Path, remedy: str) -> np.ndarray:
        calls.append(path)
        if len(calls) == 2:  # between training and test images
            write_folder(folder, made(8, 4))
        return read(path, remedy)

    monkeypatch.setattr(cache, "_images", replacing)
    found = read_folder(folder)
    assert (len(found.train_images), len(found.test_images)) == (8, 4)


KILLED_EVERYWHERE = """
import itertools, os, signal, sys
from pathlib import Path
import numpy as np
from vitrap.data.cache import Arrays, read_folder, write_folder

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

def made(n):
    images, labels = np.full((n, 8, 8, 3), n, np.uint8), np.zeros(n, int)
    return Arrays(images, labels, images, labels)

def killed_at(n):
    numbers = itertools.count(1)
    def hook(event, arguments):
        if event in CHANGES and next(numbers) == n:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

folder = Path(sys.argv[1])
for n in itertools.count(1):
    write_folder(folder, made(12))
    assert os.listdir(folder.parent) == [folder.name], os.listdir(folder.parent)
    child = os.fork()
    if not child:
        killed_at(n)
        write_folder(folder, made(8))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = read_folder(folder)
    assert len(found.train_images) == len(found.test_images) == found.test_images[0, 0, 0, 0], n
    if status == 0:
        assert len(found.train_images) == 8
        print(n - 1)
        break
"""


def test_a_kill_at_any_step_loses_nothing_and_leaves_nothing_for_long(tmp_path: Path) -> None:
    """After each kill the set is the old one or the new one, and the next write clears up."""
    command = [sys.executable, "-c", KILLED_EVERYWHERE, str(tmp_path / "cache" / "made")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) > 15, "so few kills cannot have been all"


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


@pytest.mark.parametrize("name", ["cifar11", "../cifar10", "", ".", "..", ".hidden", "npz:x", "x" * 300, "a\0", "a\n"])
def test_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path))
    with pytest.raises(UserError, match="unknown data set") as caught:
        read_cached(name)
    for known in (*DATASETS, "npy:PATH", "imagefolder:PATH"):
        assert known in str(caught.value)


def test_naming_the_data_sets_never_imports_torch() -> None:
    code = "import sys, vitrap.data, vitrap.data.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
