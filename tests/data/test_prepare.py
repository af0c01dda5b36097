"""Preparing data sets from made archives: same layout as published, hashes and counts patched."""

import functools
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
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
    names = "\n".join(f"fine{i}" for i in range(100)) + "\n"
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
    assert found.n_classes == 100


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
    unpacked = tmp_path / "unpacked" / "cifar-10-batches-bin"
    unpacked.mkdir(parents=True)
    for name, content in cifar10().items():
        (unpacked.parent / name).write_bytes(content)
    prepare("cifar10", str(unpacked), cache)
    prepare("cifar10", str(unpacked.parent), cache)
    assert len(read_folder(cache / "cifar10").train_labels) == 25


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
        threading.Thread(target=served.serve_forever, daemon=True).start()
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
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"something else")
    refuse(
        "cifar10",
        str(tmp_path / "cifar-10-python.tar.gz"),
        cache,
        "has md5 .*, not c32a1d4ab5d03f1284b67883e8d87530",
    )


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


@pytest.mark.parametrize("name", sorted(ORIGINS))
def test_a_folder_of_something_else(tmp_path: Path, cache: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "data_batch_1").write_bytes(b"a pickle")
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


@pytest.mark.parametrize("step", ["_verify", "_unpack", "write_folder"])
def test_an_interrupted_prepare_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source = publish(tmp_path / "source", "cifar10", monkeypatch)
    whole = getattr(module, step)

    def interrupted(*args: object) -> None:
        if step != "write_folder":
            whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("cifar10", str(source), cache)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(tmp_path / "source", "cifar10", monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the data cache .*; set VITRAP_DATA to another folder"):
        prepare("cifar10", str(source), tmp_path / "file")
