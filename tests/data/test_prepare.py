"""Preparing data sets from made archives: same layout as published, hashes and counts patched."""

import functools
import hashlib
import http.server
import io
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrap.data import prepare as module
from vitrap.data.cache import Arrays, read_folder, write_folder
from vitrap.data.prepare import ORIGINS, Archive, prepare
from vitrap.errors import UserError

RNG = np.random.default_rng(0)
CIFAR = RNG.integers(0, 256, (30, 3072), dtype=np.uint8)  # 25 to train on, 5 to test on
LABELS = (np.arange(30) % 10).astype(np.uint8)


def pack(path: Path, members: dict[str, bytes]) -> Path:
    """An archive of `members`, a zip or a compressed tar as its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return path


def cifar10() -> dict[str, bytes]:
    rows = np.concatenate([LABELS[:, None], CIFAR], axis=1)
    files = {f"data_batch_{i + 1}.bin": rows[5 * i : 5 * i + 5] for i in range(5)} | {"test_batch.bin": rows[25:]}
    members = {f"cifar-10-batches-bin/{name}": part.tobytes() for name, part in files.items()}
    return members | {"cifar-10-batches-bin/batches.meta.txt": b"\n".join(b"class%d" % i for i in range(10)) + b"\n\n"}


def cifar100() -> dict[str, bytes]:
    rows = np.concatenate([LABELS[:, None] + 50, LABELS[:, None] + 3, CIFAR], axis=1)
    members = {
        "cifar-100-binary/train.bin": rows[:25].tobytes(),
        "cifar-100-binary/test.bin": rows[25:].tobytes(),
    }
    names = "\n".join(f"fine{i}" for i in range(20)) + "\n"
    return members | {"cifar-100-binary/fine_label_names.txt": names.encode()}


def coded(colour: int, size: tuple[int, int], suffix: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(out, suffix)
    return out.getvalue()


def gtsrb() -> list[dict[str, bytes]]:
    train = {
        f"GTSRB/Final_Training/Images/{c:05}/{t:05}_{f:05}.ppm": coded(100 * c + 10 * t + f, (30 + f, 41), "ppm")
        for c in range(2)
        for t in range(2)
        for f in range(3)
    }
    test = {f"GTSRB/Final_Test/Images/{i:05}.ppm": coded(i, (15, 20), "ppm") for i in range(4)}
    rows = [f"{i:05}.ppm;15;20;1;1;9;9;{i % 2}" for i in range(4)]
    truth = "\r\n".join(["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *rows])
    decoy = "GTSRB/Final_Training/Images/00000/GT-00000.csv"
    return [train | {decoy: b"x"}, test, {"GT-final_test.csv": truth.encode()}]


def tiny_imagenet() -> dict[str, bytes]:
    root, wnids = "tiny-imagenet-200", ("n02", "n01")
    train = {f"{root}/train/{w}/images/{w}_{i}.JPEG": coded(90, (64, 64), "jpeg") for w in wnids for i in range(3)}
    test = {f"{root}/val/images/val_{i}.JPEG": coded(90, (64, 64), "jpeg") for i in range(2)}
    texts = {
        "wnids.txt": "n02\nn01\n",
        "words.txt": "n01\tgoldfish, carp\nn02\tstork\nn03\tsomething else\n",
        "val/val_annotations.txt": "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n",
    }
    return train | test | {f"{root}/{name}": text.encode() for name, text in texts.items()}


def publish(folder: Path, name: str, patch: pytest.MonkeyPatch) -> Path:
    """Write made archives of `name` and make their hashes and counts the known ones."""
    contents = {"cifar10": cifar10, "cifar100": cifar100, "gtsrb": gtsrb, "tiny-imagenet": tiny_imagenet}[name]()
    counts = {"cifar10": (25, 5), "cifar100": (25, 5), "gtsrb": (12, 4), "tiny-imagenet": (6, 2)}[name]
    folder.mkdir()
    archives = []
    for archive, members in zip(
        ORIGINS[name].archives, contents if isinstance(contents, list) else [contents], strict=True
    ):
        path = pack(folder / archive.name, members)
        archives.append(replace(archive, md5=hashlib.md5(path.read_bytes()).hexdigest()))
    origin = replace(ORIGINS[name], archives=tuple(archives), n_train=counts[0], n_test=counts[1])
    patch.setitem(ORIGINS, name, origin)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_cifar10_from_its_binary_archive(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = only(publish(tmp_path / "source", "cifar10", monkeypatch))
    assert prepare("cifar10", str(source), cache) == cache / "cifar10"
    found = read_folder(cache / "cifar10")
    planes = CIFAR.reshape(30, 3, 32, 32)
    assert np.array_equal(found.train_images.transpose(0, 3, 1, 2), planes[:25])
    assert np.array_equal(found.test_images.transpose(0, 3, 1, 2), planes[25:])
    assert np.array_equal(found.train_labels, LABELS[:25])
    assert np.array_equal(found.test_labels, LABELS[25:])
    assert found.classes == tuple(f"class{i}" for i in range(10))
    assert [f.name for f in cache.iterdir()] == ["cifar10"], "something was left behind"


def test_cifar100_takes_the_fine_label(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("cifar100", str(publish(tmp_path / "source", "cifar100", monkeypatch)), cache)
    found = read_folder(cache / "cifar100")
    assert np.array_equal(found.train_labels, LABELS[:25] + 3)
    assert np.array_equal(found.test_images.transpose(0, 3, 1, 2), CIFAR[25:].reshape(-1, 3, 32, 32))
    assert found.n_classes == 20


def test_gtsrb_is_resized_and_grouped_by_track(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("gtsrb", str(publish(tmp_path / "source", "gtsrb", monkeypatch)), cache)
    found = read_folder(cache / "gtsrb")
    assert found.train_images.shape == (12, 32, 32, 3)
    assert found.train_labels.tolist() == [0] * 6 + [1] * 6
    assert found.train_groups is not None
    assert found.train_groups.tolist() == [0] * 3 + [1] * 3 + [1000] * 3 + [1001] * 3
    assert found.train_images[:, 5, 5, 0].tolist() == [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112]
    assert found.test_labels.tolist() == [0, 1, 0, 1]
    assert found.test_images[:, 5, 5, 0].tolist() == [0, 1, 2, 3]


def test_tiny_imagenet_numbers_sorted_wnids_and_tests_on_val(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("tiny-imagenet", str(publish(tmp_path / "source", "tiny-imagenet", monkeypatch)), cache)
    found = read_folder(cache / "tiny-imagenet")
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test_labels.tolist() == [1, 0]
    assert found.classes == ("goldfish, carp", "stork")
    assert found.train_images.shape == (6, 64, 64, 3)


def test_a_folder_of_unpacked_archives(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "source", "cifar10", monkeypatch)
    folder = unpacked(tmp_path / "unpacked", cifar10())
    prepare("cifar10", str(folder / "cifar-10-batches-bin"), cache)
    prepare("cifar10", str(folder), cache)
    assert len(read_folder(cache / "cifar10").train_labels) == 25


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def kaggle() -> dict[str, bytes]:
    """The images of `gtsrb` as on Kaggle: as PNG, under other names."""
    files, tests, _ = gtsrb()
    members = {"Meta.csv": b"x", "Train.csv": b"x"}
    for name, content in (files | tests).items():
        path = Path(name)
        if path.suffix == ".ppm":
            class_ = f"{int(path.parent.name)}/{path.parent.name}_" if "_" in path.stem else ""
            out = io.BytesIO()
            Image.open(io.BytesIO(content)).save(out, "png")
            members[f"{'Train' if class_ else 'Test'}/{class_}{path.stem}.png"] = out.getvalue()
    rows = [f"15,20,1,1,9,9,{i % 2},Test/{i:05}.png" for i in range(4)]
    head = "Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path"
    return members | {"Test.csv": "\r\n".join([head, *rows]).encode()}


def sorted_val() -> dict[str, bytes]:
    """The images of `tiny_imagenet` with those of `val` sorted into folders."""
    root, files = "tiny-imagenet-200", tiny_imagenet()
    del files[f"{root}/val/val_annotations.txt"]
    for i, wnid in enumerate(("n02", "n01")):
        files[f"{root}/val/{wnid}/val_{i}.JPEG"] = files.pop(f"{root}/val/images/val_{i}.JPEG")
    return files


def sorted_val_images() -> dict[str, bytes]:
    """As `sorted_val`, with the images in a folder of their own, as those of `train` are."""
    return {re.sub("(val/n0.)/", r"\1/images/", name): content for name, content in sorted_val().items()}


def sorted_val_with_annotations() -> dict[str, bytes]:
    """As `sorted_val`, where the script that sorted them left the annotations."""
    file = "tiny-imagenet-200/val/val_annotations.txt"
    return sorted_val() | {file: tiny_imagenet()[file]}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gtsrb", kaggle),
        ("tiny-imagenet", sorted_val),
        ("tiny-imagenet", sorted_val_images),
        ("tiny-imagenet", sorted_val_with_annotations),
    ],
)
def test_another_layout_is_the_same_data(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: Callable[[], dict[str, bytes]]
) -> None:
    published = read_folder(prepare(name, str(publish(tmp_path / "source", name, monkeypatch)), cache))
    other = read_folder(prepare(name, str(unpacked(tmp_path / "other", layout())), tmp_path / "cache2"))
    for part, value in vars(published).items():
        assert np.array_equal(getattr(other, part), value), part


def test_a_folder_in_the_cache_format_under_a_name_of_its_own(tmp_path: Path, cache: Path) -> None:
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    source = write_folder(tmp_path / "source", Arrays(images, labels, images, labels))
    assert read_folder(prepare("mine", str(source), cache)).train_labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="4 training and 4 test images are not cifar10, which has 50000 and 10000"):
        prepare("cifar10", str(source), cache)
    np.save(source / "train_labels.npy", labels[:3])
    with pytest.raises(UserError, match="4 train images but 3 train labels"):
        prepare("mine", str(source), cache)
    assert read_folder(cache / "mine").train_labels.tolist() == [0, 1, 2, 3]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server for `tmp_path` on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_downloads_what_is_published(tmp_path: Path, cache: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "source", "gtsrb", monkeypatch)
    archives = tuple(replace(a, url=f"{server}/source/{a.name}") for a in ORIGINS["gtsrb"].archives)
    monkeypatch.setitem(ORIGINS, "gtsrb", replace(ORIGINS["gtsrb"], archives=archives))
    told: list[tuple[int, int]] = []
    prepare("gtsrb", folder=cache, progress=lambda done, total: told.append((done, total)))
    assert len(read_folder(cache / "gtsrb").train_labels) == 12
    sizes = [(tmp_path / "source" / a.name).stat().st_size for a in archives]
    assert told == [(s, s) for s in sizes] + [(i, 12) for i in range(1, 13)] + [(i, 4) for i in range(1, 5)]


@pytest.mark.parametrize("below", [True, False])
def test_downloads_from_another_place(
    tmp_path: Path, cache: Path, server: str, monkeypatch: pytest.MonkeyPatch, below: bool
) -> None:
    archive = only(publish(tmp_path / "source", "cifar10", monkeypatch))
    prepare("cifar10", f"{server}/source/" + ("" if below else archive.name), cache)
    assert len(read_folder(cache / "cifar10").train_labels) == 25


def test_what_is_there_already_is_not_fetched_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("cifar10", str(publish(tmp_path / "source", "cifar10", monkeypatch)), cache)
    monkeypatch.setattr(module, "_download", None)
    assert prepare("cifar10", folder=cache) == cache / "cifar10"


def test_half_a_set_is_fetched_again(tmp_path: Path, cache: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = only(publish(tmp_path / "source", "cifar10", monkeypatch))
    here = Archive(f"{server}/source/{path.name}", ORIGINS["cifar10"].archives[0].md5)
    monkeypatch.setitem(ORIGINS, "cifar10", replace(ORIGINS["cifar10"], archives=(here,)))
    prepare("cifar10", folder=cache)
    (cache / "cifar10" / "test_labels.npy").unlink()
    prepare("cifar10", folder=cache)
    assert len(read_folder(cache / "cifar10").test_labels) == 5


def refuse(name: str, source: str | None, cache: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepare(name, source, cache)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir()), "something was left behind"


def test_another_archive_is_refused_before_it_is_opened(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarfile, "open", None)
    (tmp_path / "mine.tar.gz").write_bytes(b"something else")
    refuse("cifar10", str(tmp_path / "mine.tar.gz"), cache, "has md5 .*, not c32a1d4ab5d03f1284b67883e8d87530")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("cifar100", "cifar-100-python/train"),
    ],
)
def test_the_python_version_of_cifar_is_not_opened(tmp_path: Path, cache: Path, name: str, file: str) -> None:
    path = tmp_path / "source" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x80\x02}q\x00.")
    for source in {path.parent, tmp_path / "source", *([path] if path.suffix == ".gz" else [])}:
        refuse(
            name, str(source), cache, "version for Python, which is a pickle, .* give the binary version, https://.*"
        )


def test_the_binary_version_is_taken_where_both_are(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(tmp_path / "source", "cifar10", monkeypatch)
    (source / "cifar-10-python.tar.gz").write_bytes(b"\x80\x02}q\x00.")
    assert prepare("cifar10", str(source), cache) == cache / "cifar10"


def test_a_download_cut_short_is_refused(
    tmp_path: Path, cache: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = only(publish(tmp_path / "source", "cifar10", monkeypatch))
    path.write_bytes(path.read_bytes()[:-10])
    refuse("cifar10", f"{server}/source", cache, "it is damaged or another file; download it again from https://")


def test_no_network(cache: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(
        "cifar10",
        f"{server}/nowhere",
        cache,
        "cannot download .*(Not Found|not found).*; fetch .* --from PATH",
    )
    refuse("cifar10", "http://127.0.0.1:1/x", cache, "cannot download .*refused.* give it with --from PATH")


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("digits", None, "'digits' is embedded; there is nothing to prepare"),
        ("cifar11", None, "unknown data set 'cifar11'; did you mean 'cifar10'?"),
        ("../cifar10", None, "unknown data set"),
        ("cifar10", "nowhere.tar.gz", "no file or folder nowhere.tar.gz; give --from a path"),
        ("cifar10", "ftp://x/y", "neither a path nor an http"),
        ("gtsrb", "https://x/GTSRB_Final_Test_GT.zip", "one archive of several; give the folder or URL"),
    ],
)
def test_a_name_or_source_that_cannot_be(cache: Path, name: str, source: str | None, message: str) -> None:
    refuse(name, source, cache, message)


@pytest.mark.parametrize("source", ["~nobody-of-this-name/x", "a\0b", "x" * 300])
def test_a_source_that_is_no_path(cache: Path, source: str) -> None:
    refuse("cifar10", source, cache, "is no path that can be read")


@pytest.mark.parametrize("name", ["x" * 300, "a\0", "a\nb", ".hidden", ""])
def test_a_name_that_no_folder_can_have(tmp_path: Path, cache: Path, name: str) -> None:
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    refuse(
        name, str(write_folder(tmp_path / "source", Arrays(images, labels, images, labels))), cache, "unknown data set"
    )


@pytest.mark.parametrize("place", ["cifar-10-binary.tar.gz", "data_batch_1.bin", "itself"])
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path, cache: Path, place: str) -> None:
    (tmp_path / "source").mkdir()
    os.mkfifo(tmp_path / "source" / place)
    source = tmp_path / "source" / (place if place == "itself" else "")
    refuse("cifar10", str(source), cache, "no file or folder|a pipe or a device|no data_batch_1.bin")
    refuse("cifar10", "/dev/zero", cache, "no file or folder /dev/zero")


@pytest.mark.parametrize("name", sorted(ORIGINS))
def test_a_folder_of_something_else(tmp_path: Path, cache: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_bytes(b"something else")
    refuse(name, str(tmp_path / "source"), cache, f"source does not hold {name} as published .no .* in it.; give")


def test_too_few_images_are_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(tmp_path / "source", "cifar10", monkeypatch)
    monkeypatch.setitem(ORIGINS, "cifar10", replace(ORIGINS["cifar10"], n_train=50_000))
    refuse("cifar10", str(source), cache, "25 training and 5 test images are not cifar10")


def test_a_damaged_record_is_refused(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(1, 6):
        (source / f"data_batch_{i}.bin").write_bytes(b"\0" * 3072)
    refuse("cifar10", str(source), cache, "does not hold cifar10 as published .cannot reshape")


def test_a_member_that_climbs_out_is_not_unpacked(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "cifar-10-binary.tar.gz"
    pack(source, {"../../escaped": b"x"})
    archive = Archive(f"https://x/{source.name}", hashlib.md5(source.read_bytes()).hexdigest())
    monkeypatch.setitem(ORIGINS, "cifar10", replace(ORIGINS["cifar10"], archives=(archive,)))
    refuse("cifar10", str(source), cache, "cannot unpack .*escaped.* outside the destination")
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("step", ["_verify", "_unpack", "put_arrays"])
def test_an_interrupted_prepare_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source = publish(tmp_path / "source", "cifar10", monkeypatch)
    whole = getattr(module, step)

    def interrupted(*args: object) -> None:
        if step != "put_arrays":
            whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("cifar10", str(source), cache)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(tmp_path / "source", "cifar10", monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="cannot write .*/file/cifar10 .*; make room there or set VITRAP_DATA to another"
    ):
        prepare("cifar10", str(source), tmp_path / "file")


def test_a_second_process_waits_and_finds_the_set_made(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "source", "cifar10", monkeypatch)
    unpack, told, found = module._unpack, Event(), []

    @contextmanager
    def waiting() -> Iterator[None]:
        told.set()
        yield

    second = Thread(target=lambda: found.append(prepare("cifar10", None, cache, waiting=waiting)))

    def while_another_asks(path: Path, scratch: Path) -> None:
        second.start()
        told.wait()
        unpack(path, scratch)

    monkeypatch.setattr(module, "_unpack", while_another_asks)
    monkeypatch.setattr(module, "_download", None)
    prepare("cifar10", str(tmp_path / "source"), cache)
    second.join()
    assert found == [cache / "cifar10"]
    assert os.listdir(cache) == ["cifar10"]


def test_what_killed_processes_left_is_cleared(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft of another one, and one that was killed between the two renames of a replacement."""
    prepare("cifar10", str(publish(tmp_path / "source", "cifar10", monkeypatch)), cache)
    monkeypatch.setattr(module, "_download", None)
    unpacked(cache / ".cifar10-draft", {"archives/half.tar.gz": b"half", "new/train_images.npy": b"half"})
    prepare("cifar10", None, cache)
    assert os.listdir(cache) == ["cifar10"]
    (cache / ".cifar10-draft").mkdir()
    (cache / "cifar10").rename(cache / ".cifar10-draft" / "old")
    assert len(read_folder(cache / "cifar10").train_labels) == 25, "it cannot be read meanwhile"
    prepare("cifar10", None, cache)
    assert os.listdir(cache) == ["cifar10"]


# ---- any content


@pytest.mark.parametrize(
    "url", ["http://[::1/", "http://127.0.0.1:9/ä", "http://127.0.0.1:port/x", "http://", "http://a b"]
)
def test_an_address_that_is_none(cache: Path, url: str) -> None:
    refuse("cifar10", url, cache, "cannot download http.* give it with --from PATH")


@pytest.mark.parametrize("length", ["abc", "-1", "9" * 5000, "1e3", ""])
def test_any_length_that_a_server_claims(cache: Path, length: str) -> None:
    class Odd(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", length)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{served.server_address[1]}"
        refuse("cifar10", url, cache, "has md5 d41d8cd98f00b204e9800998ecf8427e|cannot download")
        served.shutdown()


TEXTS = {
    "GT-final_test.csv": "gtsrb",
    "Test.csv": "gtsrb",
    "wnids.txt": "tiny-imagenet",
    "words.txt": "tiny-imagenet",
    "val/val_annotations.txt": "tiny-imagenet",
    "data_batch_1.bin": "cifar10",
    "batches.meta.txt": "cifar10",
    "train.bin": "cifar100",
}
LINES = st.lists(
    st.lists(
        st.sampled_from(
            ["Filename", "ClassId", "Path", "00000.ppm", "Test/00000.png", "0", "-1", "9" * 30, "n01", '"', "x\0"]
        ),
        max_size=4,
    ),
    max_size=4,
)
CONTENT = st.binary(max_size=200) | st.builds(
    lambda lines, mark: "\n".join(mark.join(line) for line in lines).encode(), LINES, st.sampled_from(",;\t")
)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each file of `TEXTS`: its data set, in the layout that has such a file."""
    made = {"Test.csv": kaggle(), "GT-final_test.csv": {k: v for part in gtsrb() for k, v in part.items()}}
    others = {"gtsrb": {}, "tiny-imagenet": tiny_imagenet(), "cifar10": cifar10(), "cifar100": cifar100()}
    root = tmp_path_factory.mktemp("layouts")
    for file, name in TEXTS.items():
        unpacked(root / file.replace("/", " "), made.get(file, others[name]))
    return root


@pytest.mark.parametrize("file", TEXTS)
@settings(deadline=1000, max_examples=25)
@given(content=CONTENT)
def test_any_content_of_a_file_is_read_or_refused(layouts: Path, file: str, content: bytes) -> None:
    root = layouts / file.replace("/", " ")
    (path,) = root.rglob(file)
    path.write_bytes(content)
    with suppress(UserError):
        module._read(TEXTS[file], root, str(root), None)


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
@settings(deadline=1000, max_examples=50)
@given(noise=st.binary(max_size=100), start=st.integers(0, 400), end=st.integers(0, 400))
def test_any_archive_is_unpacked_or_refused(name: str, noise: bytes, start: int, end: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = pack(Path(place) / name, {"a/b.txt": b"b" * 200, "c.txt": b"c"})
        whole = path.read_bytes()
        for content in (noise, whole[:start] + noise + whole[end:]):
            path.write_bytes(content)
            with suppress(UserError):
                module._unpack(path, Path(place) / "out")
