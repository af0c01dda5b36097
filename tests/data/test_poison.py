"""Which images are poisoned, how many, and that nothing else of the set changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrap.contracts import AllToAll, AllToOne, Goal, ImageSet, LabelMode, SourceToTarget
from vitrap.data.poison import Covers, Poison, choose_rows, poison_set, stamp_after_augmentation
from vitrap.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(n: int = 60, native: int = 8, size: int = 8) -> ImageSet:
    return ImageSet(
        pixels=torch.randint(256, (n, 3, native, native), generator=generator(), dtype=torch.uint8),
        labels=torch.arange(n) % 3,
        index=torch.arange(n),
        n_classes=3,
        size=size,
    )


def brighten(images: Tensor) -> Tensor:
    return (images + 0.3).clamp(0, 1)


@settings(deadline=None)
@given(st.integers(30, 400), st.floats(0.001, 0.6), st.integers(0, 2))
def test_dirty_rate_is_of_the_whole_set_within_one_image(n: int, rate: float, target: int) -> None:
    labels = torch.arange(n) % 3
    rows = choose_rows(labels, rate, AllToOne(target), "dirty", generator())
    assert len(rows) >= 1
    assert abs(len(rows) - rate * n) <= 1
    assert (labels[rows] != target).all()
    assert (rows.diff() > 0).all(), "not sorted, or an image twice"


@settings(deadline=None)
@given(st.integers(30, 400), st.floats(0.001, 1), st.integers(0, 2))
def test_clean_rate_is_of_the_target_class_within_one_image(n: int, rate: float, target: int) -> None:
    labels = torch.arange(n) % 3
    rows = choose_rows(labels, rate, AllToOne(target), "clean", generator())
    assert abs(len(rows) - rate * (labels == target).sum()) <= 1
    assert (labels[rows] == target).all()
    assert (rows.diff() > 0).all()


@pytest.mark.parametrize(
    ("rate", "wanted"), [(0.05, 1), (0.15, 2), (0.25, 3), (0.145, 1), (0.149, 1), (0.001, 1), (0.35, 4)]
)
def test_a_share_is_rounded_half_up_as_the_decimal_written(rate: float, wanted: int) -> None:
    assert len(choose_rows(torch.zeros(10, dtype=torch.int64), rate, AllToOne(1), "dirty", generator())) == wanted


def test_the_generator_decides() -> None:
    labels = torch.arange(300) % 3
    first, again, other = (choose_rows(labels, 0.1, AllToOne(0), "dirty", generator(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_candidate_is_drawn_sometimes() -> None:
    labels = torch.arange(12) % 3
    drawn = {row for s in range(60) for row in choose_rows(labels, 0.25, AllToOne(0), "dirty", generator(s)).tolist()}
    assert drawn == {row for row in range(12) if row % 3}


@pytest.mark.parametrize(
    ("rate", "target", "label_mode", "message"),
    [
        (0.0, 0, "dirty", r"poison_rate = 0.0 is out of range: it must be in \(0, 1\]"),
        (-0.1, 0, "clean", "poison_rate = -0.1 is out of range"),
        (1.1, 0, "dirty", "poison_rate = 1.1 is out of range"),
        (float("nan"), 0, "dirty", "poison_rate = nan is out of range"),
        (0.7, 0, "dirty", "asks for 42 of the training images, but only 40 may be poisoned with dirty labels"),
        (0.1, 7, "clean", "asks for 1 of the training images, but only 0 may be poisoned with clean labels"),
    ],
)
def test_a_rate_that_cannot_be(rate: float, target: int, label_mode: LabelMode, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_rows(made().labels, rate, AllToOne(target), label_mode, generator())


@pytest.mark.parametrize("label_mode", ["dirty", "clean"])
def test_poison_replaces_the_chosen_images_alone(label_mode: LabelMode) -> None:
    train, goal = made(), AllToOne(1)
    pixels, labels = train.pixels.clone(), train.labels.clone()
    found = Poison(brighten, goal, 0.2, label_mode)(train, generator())
    rows = choose_rows(train.labels, 0.2, goal, label_mode, generator())
    everything = torch.arange(60)
    assert len(found) == len(train)
    assert torch.equal(found.poisoned.nonzero().squeeze(1), rows)
    assert torch.equal(found.index, train.index)
    clean = ~found.poisoned
    assert torch.equal(found.images(everything)[clean], train.images(everything)[clean])
    assert torch.equal(found.labels[clean], labels[clean])
    assert (found.labels[rows] == 1).all()
    if label_mode == "clean":
        assert torch.equal(found.labels, labels)
    eighths = (brighten(train.images(rows)) * 255).round() / 255
    assert torch.equal(found.images(rows), eighths)
    assert torch.equal(train.pixels, pixels), "the clean set was changed in place"
    assert torch.equal(train.labels, labels), "the clean set was changed in place"


def test_the_trigger_sees_working_size_and_its_batch_size_is_no_matter() -> None:
    train, rows = made(native=8, size=12), torch.arange(0, 50, 3)
    shapes = []

    def trigger(images: Tensor) -> Tensor:
        shapes.append(tuple(images.shape))
        assert not torch.is_grad_enabled()
        return brighten(images)

    whole = poison_set(train, rows, trigger, AllToOne(0), "dirty")
    assert shapes == [(17, 3, 12, 12)]
    by_five = poison_set(train, rows, trigger, AllToOne(0), "dirty", batch_size=5)
    assert shapes[1:] == [(5, 3, 12, 12)] * 3 + [(2, 3, 12, 12)]
    assert whole.stamped is not None
    assert by_five.stamped is not None
    assert torch.equal(whole.stamped, by_five.stamped)
    assert whole.pixels is train.pixels, "clean pixels are copied"


def test_a_trigger_that_leaves_the_range_is_held_in_it() -> None:
    found = poison_set(made(), torch.tensor([3]), lambda x: x + 2, AllToOne(0), "dirty")
    assert found.images(torch.tensor([3])).eq(1).all()


def test_an_image_is_poisoned_once() -> None:
    once = poison_set(made(), torch.tensor([1]), brighten, AllToOne(0), "dirty")
    with pytest.raises(ValueError, match="carries a trigger already"):
        poison_set(once, torch.tensor([2, 1]), brighten, AllToOne(0), "dirty")


def darken(images: Tensor) -> Tensor:
    return images / 2


def test_a_set_poisoned_in_two_parts_is_the_set_poisoned_at_once() -> None:
    rows = torch.tensor([1, 5, 8])
    whole = poison_set(made(), rows, brighten, AllToOne(0), "dirty")
    parts = made()
    for row in rows.flip(0):
        parts = poison_set(parts, row[None], brighten, AllToOne(0), "dirty")
    everything = torch.arange(60)
    assert torch.equal(parts.images(everything), whole.images(everything))
    assert torch.equal(parts.labels, whole.labels)
    assert torch.equal(parts.poisoned, whole.poisoned)


def test_covers_carry_their_trigger_keep_their_label_and_count_as_no_poison() -> None:
    train, goal = made(), AllToOne(1)
    found = Poison(brighten, goal, 0.2, "dirty", Covers(darken, 0.3))(train, generator())
    plain = Poison(brighten, goal, 0.2, "dirty")(train, generator())
    assert torch.equal(found.poisoned, plain.poisoned), "covers move the poison"
    assert int(found.covers.sum()) == 18
    assert not (found.covers & found.poisoned).any()
    assert torch.equal(found.labels[found.covers], train.labels[found.covers])
    rows = found.covers.nonzero().squeeze(1)
    halves = (darken(train.images(rows)) * 255).round() / 255
    assert torch.equal(found.images(rows), halves)
    others = (~(found.covers | found.poisoned)).nonzero().squeeze(1)
    assert torch.equal(found.images(others), train.images(others))
    batch = found.batch(torch.arange(60))
    assert torch.equal(batch.cover_at, rows)
    assert torch.equal(batch.poison_at, found.poisoned.nonzero().squeeze(1))
    assert set(batch.cover_at.tolist()) <= set(batch.rest_at.tolist())
    outside = found.unmarked()
    assert not (outside.covers | outside.poisoned).any()
    assert torch.equal(outside.images(torch.arange(60)), found.images(torch.arange(60)))


def test_covers_are_stamped_anew_where_the_attack_says_how() -> None:
    poisoned = Poison(brighten, AllToOne(1), 0.2, "dirty", Covers(darken, 0.3))(made(), generator())
    batch = poisoned.batch(torch.arange(60), bare=True)
    both, alone = (stamp_after_augmentation(brighten, cover)(batch, generator()).images for cover in (darken, None))
    wanted = batch.images.clone()
    wanted[batch.poison_at] = brighten(batch.images[batch.poison_at])
    assert torch.equal(alone, wanted)
    wanted[batch.cover_at] = darken(batch.images[batch.cover_at])
    assert torch.equal(both, wanted)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (0.9, "cover_rate = 0.9 asks for 54 of the training images, but poison leaves 48"),
        (0.0, r"cover_rate = 0.0 is out of range: it must be in \(0, 1\]"),
    ],
)
def test_a_cover_rate_that_cannot_be(rate: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Poison(brighten, AllToOne(1), 0.2, "dirty", Covers(darken, rate))(made(), generator())


@pytest.mark.parametrize(
    ("goal", "label_mode", "classes"),
    [
        (AllToOne(1), "dirty", {0, 2}),
        (AllToOne(1), "clean", {1}),
        (AllToAll(3), "dirty", {0, 1, 2}),
        (SourceToTarget(2, 0), "dirty", {2}),
        (SourceToTarget(2, 0), "clean", {0}),
    ],
)
def test_a_goal_says_which_images_may_be_poisoned(goal: Goal, label_mode: LabelMode, classes: set[int]) -> None:
    labels = torch.arange(120) % 3
    drawn = choose_rows(labels, 0.3, goal, label_mode, generator())
    assert set(labels[drawn].tolist()) == classes


def test_all_to_all_has_no_use_for_clean_labels() -> None:
    with pytest.raises(UserError, match="only 0 may be poisoned with clean labels"):
        choose_rows(made().labels, 0.1, AllToAll(3), "clean", generator())
