"""Opening data: hold-out, limit, fingerprint, the digits, image folders, and every line of refusal."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrap.data.cache import Arrays, cached_names, write_folder
from vitrap.data.picture import SUFFIXES
from vitrap.data.sources import World, balanced, decode, fingerprint, hold_out, open_data
from vitrap.errors import UserError

PARTS = ("train", "choose", "clean", "threshold")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(n: int = 300, groups: bool = False, height: int = 8, width: int = 8) -> Arrays:
    """Images whose first byte tells their number; classes 0 to 4, groups of five within a class."""
    images = np.zeros((n, height, width, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    labels = np.arange(n) // 5 % 5
    return Arrays(images, labels, images[: n // 3], labels[: n // 3], np.arange(n) // 5 if groups else None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAP_DATA", str(tmp_path))
    write_folder(tmp_path / "plain", made())
    write_folder(tmp_path / "grouped", made(groups=True))
    return tmp_path


def picture(path: Path, width: int = 8, height: int = 8, colour: tuple[int, int, int] = (10, 20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folders cat (6 + 2 images) and dog (4 + 2), each image of its own red."""
    for part, counts in {"train": (6, 4), "test": (2, 2)}.items():
        for name, count in zip(("cat", "dog"), counts, strict=True):
            for i in range(count):
                picture(tmp_path / part / name / f"{i}.png", colour=(i, 0, 255 if name == "dog" else 0))
    return tmp_path


# ---- worlds


@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_parts_are_disjoint_and_whole_and_never_of_the_test_set(cache: Path, name: str) -> None:
    world = open_data(name)
    index = torch.cat([getattr(world, part).index for part in PARTS])
    assert index.sort().values.tolist() == list(range(300))
    assert [len(getattr(world, part)) for part in PARTS] == [270, 10, 10, 10]
    assert world.test.index.tolist() == list(range(100))


@pytest.mark.parametrize("part", [*PARTS, "test"])
def test_pixels_labels_groups_and_index_stay_together(cache: Path, part: str) -> None:
    arrays, found = made(groups=True), getattr(open_data("grouped", limit=60), part)
    assert found.pixels.is_contiguous()
    assert found.pixels.dtype == torch.uint8
    images, labels = (
        (arrays.test_images, arrays.test_labels) if part == "test" else (arrays.train_images, arrays.train_labels)
    )
    assert np.array_equal(found.pixels.permute(0, 2, 3, 1).numpy(), images[found.index])
    assert np.array_equal(found.labels.numpy(), labels[found.index])
    assert found.n_classes == 5
    if part == "test":
        assert found.groups is None
    else:
        assert np.array_equal(found.groups.numpy(), arrays.train_groups[found.index])


def test_no_group_lies_in_two_parts(cache: Path) -> None:
    world = open_data("grouped", limit=100, holdout=0.31)
    seen: set[int] = set()
    for part in PARTS:
        groups, counts = getattr(world, part).groups.unique(return_counts=True)
        assert part == "train" or counts.eq(5).all()  # a limit may thin a training track
        assert seen.isdisjoint(groups.tolist())
        seen |= set(groups.tolist())


def test_the_hold_out_is_the_same_at_every_limit(cache: Path) -> None:
    whole, small, smaller = (open_data("plain", limit=limit) for limit in (None, 100, 30))
    for part in PARTS[1:]:
        assert torch.equal(getattr(whole, part).index, getattr(small, part).index)
    assert set(smaller.train.index.tolist()) < set(small.train.index.tolist()) < set(whole.train.index.tolist())
    assert small.train.labels.bincount().tolist() == [20] * 5
    assert whole.fingerprint == small.fingerprint


def test_the_same_seed_draws_the_same_and_another_another(cache: Path) -> None:
    first, again, other = open_data("plain"), open_data("plain"), open_data("plain", seed=1)
    for part in PARTS:
        assert torch.equal(getattr(first, part).index, getattr(again, part).index)
        assert not torch.equal(getattr(first, part).index, getattr(other, part).index)


def test_opening_leaves_the_global_random_state_alone(cache: Path) -> None:
    before = torch.get_rng_state()
    open_data("plain", limit=50)
    open_data("digits")
    assert torch.equal(before, torch.get_rng_state())


def test_without_hold_out_the_parts_are_empty(cache: Path) -> None:
    world = open_data("plain", holdout=0)
    assert [len(getattr(world, part)) for part in PARTS] == [300, 0, 0, 0]


def test_a_working_size_leaves_the_pixels_native(cache: Path) -> None:
    train = open_data("plain", size=4).train
    assert train.pixels.shape[-2:] == (8, 8)
    assert train.images(torch.arange(3)).shape == (3, 3, 4, 4)


def test_an_oblong_set_needs_a_size(cache: Path) -> None:
    write_folder(cache / "oblong", made(height=6))
    with pytest.raises(UserError, match="images of oblong are 8x6, not square; give data.size"):
        open_data("oblong")
    assert open_data("oblong", size=8).train.images(torch.arange(2)).shape == (2, 3, 8, 8)


def test_npy_path_is_a_folder_in_the_cache_format(cache: Path) -> None:
    assert open_data(f"npy:{cache / 'plain'}").fingerprint == open_data("plain").fingerprint
    with pytest.raises(UserError, match="no folder"):
        open_data(f"npy:{cache / 'nowhere'}")


def test_a_set_too_large_for_memory_is_mapped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = open_data("grouped", limit=60)
    monkeypatch.setenv("VITRAP_MEMORY", str((60 + 30 + 100) * 8 * 8 * 3))
    assert open_data("grouped", limit=60).train.pixel_row is None, "what is left out counts"
    monkeypatch.setenv("VITRAP_MEMORY", str((60 + 30 + 100) * 8 * 8 * 3 - 1))
    mapped = open_data("grouped", limit=60)
    for part in (*PARTS, "test"):
        here, there = getattr(resident, part), getattr(mapped, part)
        assert len(there.pixels) == (100 if part == "test" else 300), "pixels are copied"
        assert there.device == here.device
        rows = torch.randperm(len(here), generator=generator())
        assert torch.equal(here.images(rows), there.images(rows))
        assert there.images(rows).is_contiguous(), "another memory format may round otherwise"
        for name in ("labels", "index", "groups"):
            one, other = getattr(here, name), getattr(there, name)
            assert one is other is None or torch.equal(one, other)
    assert mapped.fingerprint == resident.fingerprint
    assert mapped.train.pixels.data_ptr() == mapped.clean.pixels.data_ptr()


def test_a_mapped_set_is_in_c_order(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(cache / "plain" / "train_images.npy", np.asfortranarray(made().train_images))
    monkeypatch.setenv("VITRAP_MEMORY", "1kB")
    with pytest.raises(UserError, match="npy files, which must be in C order"):
        open_data("plain")


def test_image_files_larger_than_memory_are_decoded_to_disk(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = open_data(f"imagefolder:{pictures}", holdout=0.4)
    monkeypatch.setenv("VITRAP_MEMORY", "1")
    mapped = open_data(f"imagefolder:{pictures}", holdout=0.4)
    assert mapped.fingerprint == resident.fingerprint
    assert torch.equal(mapped.train.images(torch.arange(3)), resident.train.images(torch.arange(3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, r"data.size = 0 is out of range"),
        ({"holdout": 1.0}, r"data.holdout = 1.0 is out of range: it must be in \[0, 1\)"),
        ({"holdout": -0.1}, "data.holdout = -0.1 is out of range"),
        ({"holdout": 0.004}, "data.holdout = 0.004 cannot be drawn from 300 images"),
        ({"holdout": 0.9999}, "data.holdout = 0.9999 cannot be drawn"),
        ({"limit": 4}, "data.limit = 4 is too small for an image of each of 5 classes; make it at least 5"),
        ({"limit": 0}, "data.limit = 0 is too small"),
        ({"limit": -1}, "data.limit = -1 is too small"),
    ],
)
def test_an_argument_that_does_not_fit(cache: Path, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_data("plain", **arguments)


def test_an_argument_that_does_not_fit_groups(cache: Path) -> None:
    with pytest.raises(UserError, match="cannot be drawn from 60 groups"):
        open_data("grouped", holdout=0.02)


def test_an_unknown_name_is_answered_with_the_nearest(cache: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown data set 'plane'; did you mean 'plain'\?.*imagefolder:PATH.*npy:PATH"
    ):
        open_data("plane")


# ---- hold-out and limit


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=40, max_size=120), st.floats(0.1, 0.6), st.integers(0, 9))
def test_hold_out_partitions_by_group_near_the_share(groups: list[int], share: float, seed: int) -> None:
    named = np.array(groups)
    try:
        parts = hold_out(len(named), named, share, generator(seed))
    except UserError:
        return  # groups too large for so small a part
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(named)))
    of_part = [set(named[rows].tolist()) for rows in parts]
    assert sum(map(len, of_part)) == len(set(groups)), "a group lies in two parts"
    largest = np.bincount(named).max()
    held = sum(len(rows) for rows in parts[:3])
    assert share * len(named) - 1 <= held <= share * len(named) + largest


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=5, max_size=80), st.integers(5, 90), st.integers(0, 9))
def test_a_limit_is_reached_and_levels_the_classes(labels: list[int], limit: int, seed: int) -> None:
    classes = np.array(labels)
    rows = balanced(classes, limit, generator(seed))
    assert len(rows) == min(limit, len(classes))
    assert len(set(rows.tolist())) == len(rows)
    assert (np.diff(rows) > 0).all()
    have, took = np.bincount(classes, minlength=5), np.bincount(classes[rows], minlength=5)
    could_give_more = took < have
    assert (took[could_give_more] >= took.max() - 1).all(), "a class that has more gave less than another"


def test_what_a_small_class_cannot_give_the_others_do() -> None:
    labels = np.repeat([0, 1, 2], [3, 50, 50])
    took = np.bincount(labels[balanced(labels, 43, generator())])
    assert took.tolist() == [3, 20, 20]


def test_a_limit_draws_at_random_within_a_class() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    rows = balanced(labels, 500, generator())
    assert 400 < rows.mean() < 600
    assert not np.array_equal(rows, balanced(labels, 500, generator(1)))


# ---- fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda a: replace(a, train_images=np.flip(a.train_images, 1)),
        lambda a: replace(a, test_images=np.flip(a.test_images, 1)),
        lambda a: replace(a, train_labels=a.train_labels[::-1].copy()),
        lambda a: replace(a, test_labels=4 - a.test_labels),
        lambda a: replace(a, train_groups=a.train_groups + 1),
        lambda a: replace(a, train_groups=None),
        lambda a: replace(a, train_images=a.train_images.reshape(-1, 4, 16, 3)),
        lambda a: replace(a, classes=tuple("abcdef")),
    ],
)
def test_the_fingerprint_knows_the_content(change: Callable[[Arrays], Arrays]) -> None:
    assert fingerprint(change(made(groups=True))) != fingerprint(made(groups=True))


def test_the_fingerprint_knows_content_alone(cache: Path) -> None:
    assert len(fingerprint(made())) == 64
    assert open_data("plain", seed=3, holdout=0.2).fingerprint == fingerprint(made())


# ---- digits


def test_digits_are_always_there() -> None:
    world = open_data("digits")
    assert world.train.pixels.shape == (1212, 3, 16, 16)
    assert world.test.labels.bincount().tolist() == [45] * 10
    assert world.train.size == 16
    assert (len(world.choose), len(world.clean), len(world.threshold)) == (45, 45, 45)
    assert world.test.pixels.max() == 255
    assert torch.equal(world.test.pixels[:, 0], world.test.pixels[:, 2])
    assert open_data("digits", size=32).test.pixels.shape[-1] == 32
    assert torch.equal(open_data("digits", size=32).test.labels, world.test.labels)


def test_digits_train_and_test_share_no_image() -> None:
    world = open_data("digits", holdout=0)
    train = {image.numpy().tobytes() for image in world.train.pixels}
    assert not any(image.numpy().tobytes() in train for image in world.test.pixels)


# ---- image folders


def test_an_image_folder(pictures: Path) -> None:
    world = open_data(f"imagefolder:{pictures}", holdout=0.4)
    assert world.train.classes == ("cat", "dog")
    assert world.test.labels.tolist() == [0, 0, 1, 1]
    assert world.test.pixels[:, 0, 3, 3].tolist() == [0, 1, 0, 1]
    assert world.test.pixels[:, 2, 0, 0].tolist() == [0, 0, 255, 255]
    assert world.train.size == 8


def test_an_image_folder_of_many_sizes_is_cropped_to_the_middle(pictures: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(pictures / "train" / "cat" / "0.png")
    with pytest.raises(UserError, match=r"images differ in size \(.*0.png is 30x10, .*1.png is 8x8\); give data.size"):
        open_data(f"imagefolder:{pictures}")
    train = open_data(f"imagefolder:{pictures}", size=10, holdout=0).train
    assert train.pixels.shape == (10, 3, 10, 10)
    assert train.pixels[0].eq(200).all(), "the middle third is not what was kept"


def test_squeezing_keeps_the_whole_image(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, :15] = 200
    Image.fromarray(wide).save(tmp_path / "x.png")
    (image,) = decode([tmp_path / "x.png"], 10, crop=False)
    assert (image[:, :4] == 200).all()
    assert (image[:, 6:] == 0).all()


def test_val_stands_in_for_test(pictures: Path) -> None:
    published = open_data(f"imagefolder:{pictures}", holdout=0)
    (pictures / "test").rename(pictures / "val")
    assert open_data(f"imagefolder:{pictures}", holdout=0).fingerprint == published.fingerprint
    picture(pictures / "val" / "emu" / "0.png")
    with pytest.raises(UserError, match="class folder 'emu' is in only one of .*/train and .*/val"):
        open_data(f"imagefolder:{pictures}")


def test_grey_images_are_made_rgb_and_other_files_passed_over(pictures: Path) -> None:
    Image.new("L", (8, 8), 77).save(pictures / "train" / "cat" / "0.png")
    (pictures / "train" / "cat" / "notes.txt").write_text("x")
    (pictures / "train" / "cat" / "._1.png").write_text("x")
    train = open_data(f"imagefolder:{pictures}", holdout=0).train
    assert len(train) == 10
    assert train.pixels[0].eq(77).all()


def test_what_is_passed_over_is_named(pictures: Path) -> None:
    others = ["notes.txt", "train/0.png", "train/cat/.DS_Store", "train/cat/._1.png", "train/cat/@eaDir/0.jpg",
              "train/cat/.ipynb_checkpoints/0.png", "train/cat/x.tga", "train/dog/bare", "train/__MACOSX/cat/0.png",
              "valid/cat/0.png"]  # fmt: skip
    for other in others:
        picture(pictures / f"{other}.png", colour=(99, 99, 99)).rename(pictures / other)
    world = open_data(f"imagefolder:{pictures}", holdout=0)
    assert world.passed_over == tuple(sorted(others, key=lambda name: Path(name).parts))
    assert (len(world.train), world.train.classes) == (10, ("cat", "dog"))
    assert (world.train.pixels[:, 0] < 10).all()


def test_images_are_found_at_any_depth_of_a_class_folder(pictures: Path) -> None:
    before = open_data(f"imagefolder:{pictures}", holdout=0)
    (pictures / "train/cat/images/more").mkdir(parents=True)
    for i in range(6):
        (pictures / f"train/cat/{i}.png").rename(pictures / f"train/cat/images/{'more' if i > 3 else ''}/{i}.png")
    after = open_data(f"imagefolder:{pictures}", holdout=0)
    assert after.fingerprint == before.fingerprint
    assert after.passed_over == ()


def test_a_class_folder_may_be_a_link(pictures: Path) -> None:
    before = open_data(f"imagefolder:{pictures}", holdout=0)
    (pictures / "train/cat").rename(pictures.parent / f"{pictures.name}-cats")
    (pictures / "train/cat").symlink_to(pictures.parent / f"{pictures.name}-cats")
    after = open_data(f"imagefolder:{pictures}", holdout=0)
    assert (after.fingerprint, after.passed_over) == (before.fingerprint, ())


@pytest.mark.parametrize("ending", sorted(SUFFIXES))
def test_every_ending_counts_in_any_case(pictures: Path, ending: str) -> None:
    """The content says what a file is, so that each of these is a PNG."""
    for i, file in enumerate(sorted(pictures.glob("*/cat/*.png"))):
        file.rename(file.with_suffix(ending.upper() if i % 2 else ending))
    assert len(open_data(f"imagefolder:{pictures}", holdout=0).train) == 10


def remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def deeper(path: Path) -> None:
    """Put all of it one folder down, as archives often unpack."""
    (path / "inner").mkdir()
    for part in ("train", "test"):
        (path / part).rename(path / "inner" / part)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "test").rename(p / "validation"), "no folder .*test; imagefolder:PATH must hold"),
        (lambda p: picture(p / "train" / "emu" / "0.png"), "class folder 'emu' is in only one of"),
        (lambda p: remove(p / "test" / "dog"), "no image in .*test/dog; add some .*.png.* or remove"),
        (
            lambda p: [f.rename(f.with_suffix("")) for f in p.glob("test/dog/*.png")],
            r"no image in .*test/dog \(2: 0, 1 passed over\); add some",
        ),
        (
            lambda p: (p / "train/dog/y.png").symlink_to(p / "nowhere"),
            "y.png is not a readable image .*no regular file",
        ),
        (lambda p: os.mkfifo(p / "train/dog/y.png"), "y.png is not a readable image .*no regular file"),
        (deeper, "no folder .*train; did you mean imagefolder:.*/inner\\?; imagefolder:PATH must hold"),
        (lambda p: (p / "train/dog/1.png").write_bytes(b"no image"), "dog/1.png is not a readable image"),
        (lambda p: os.truncate(p / "train/dog/1.png", 45), "dog/1.png is not a readable image"),
        (
            lambda p: [picture(f, 9, 9) for f in p.glob("test/*/*.png")],
            "are 8x8, of .*test 9x9; give data.size",
        ),
    ],
)
def test_an_image_folder_that_is_not_whole(pictures: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(pictures)
    with pytest.raises(UserError, match=message) as caught:
        open_data(f"imagefolder:{pictures}")
    assert "\n" not in str(caught.value)


def test_an_image_folder_without_classes(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "0.png")
    with pytest.raises(UserError, match="no class folder in .*train, which holds 1 images itself; imagefolder:PATH"):
        open_data(f"imagefolder:{tmp_path}")


def test_decoding_tells_how_far_it_is(pictures: Path) -> None:
    told: list[tuple[int, int]] = []
    decode(
        sorted(pictures.glob("train/cat/*.png")),
        None,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(i, 6) for i in range(1, 7)]


# ---- real data, where there is some


def real(name: str, **arguments: int) -> World:
    if not os.environ.get("VITRAP_DATA"):
        pytest.skip("VITRAP_DATA names no data cache")
    if name not in cached_names():
        pytest.skip(f"{name} is not in the data cache")
    return open_data(name, **arguments)


def test_gtsrb_tracks_stay_whole_at_the_study_limit() -> None:
    world = real("gtsrb", limit=10_000)
    assert 9_970 < len(world.train) <= 10_000
    assert world.train.n_classes == 43
    tracks = [set(getattr(world, part).groups.tolist()) for part in PARTS]
    assert len(set.union(*tracks)) == sum(map(len, tracks))
    assert len(world.test) == 12_630


def test_cifar10_is_balanced() -> None:
    world = real("cifar10", limit=1_000)
    assert world.train.labels.bincount().tolist() == [100] * 10
    assert world.test.labels.bincount().tolist() == [1_000] * 10
