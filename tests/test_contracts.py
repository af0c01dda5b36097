"""What a defender may see: image sets without a mask, and suspects."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Suspect
from vitrap.errors import UserError
from vitrap.tensors.pixels import to_bytes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, 3, side, side), generator=generator(seed), dtype=torch.uint8)


def made(n: int = 10, native: int = 8, size: int = 8) -> ImageSet:
    return ImageSet(
        drawn(n, native),
        torch.arange(n) % 3,
        torch.arange(n) + 100,
        n_classes=3,
        size=size,
        groups=torch.arange(n) // 2,
        classes=("a", "b", "c"),
    )


def poisoned(native: int, size: int, n: int = 10) -> ImageSet:
    return made(n, native, size).stamp(torch.tensor([7, 2]), drawn(2, size, seed=1), torch.tensor([0, 0]))


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)).eval()


def filled(value: float) -> nn.Module:
    network = model()
    nn.init.constant_(network[1].weight, value)
    return network


def suspect_of(clean: ImageSet, train: ImageSet | None = None, network: nn.Module | None = None) -> Suspect:
    return Suspect(network or model(), clean, 3, generator(), train)


# A set of plain images


def test_a_set_of_its_parts() -> None:
    pixels, labels = drawn(4, 5), torch.tensor([0, 2, 1, 0])
    found = ImageSet.of(pixels, labels)
    assert torch.equal(to_bytes(found.images(torch.arange(4))), pixels)
    assert (found.n_classes, found.size, len(found)) == (3, 5, 4)
    assert found.index.tolist() == [0, 1, 2, 3]
    assert not found.poisoned.any()
    assert ImageSet.of(pixels, labels, 7).n_classes == 7


# A set as it looks from outside


@pytest.mark.parametrize(("native", "size"), [(8, 8), (8, 12), (12, 8)])
def test_unmarked_images_are_the_same_without_the_mask(native: int, size: int) -> None:
    """At another working size than the native one, pixels are those of the working size, rounded to 8 bits."""
    marked = poisoned(native, size)
    found, everything = marked.unmarked(), torch.arange(10)
    assert found.stamped_row is None
    assert found.stamped is None
    assert not found.poisoned.any()
    assert torch.equal(to_bytes(found.images(everything)), to_bytes(marked.images(everything)))
    assert torch.equal(found.images(everything)[[7, 2]], marked.images(everything)[[7, 2]]), "triggers are stored so"
    assert found.pixels.shape == (10, 3, size, size)
    assert found.size == size
    for name in ("labels", "index", "groups"):
        assert torch.equal(getattr(found, name), getattr(marked, name))
    assert (found.n_classes, found.classes) == (3, ("a", "b", "c"))


def test_unmarked_leaves_the_marked_set() -> None:
    marked = poisoned(8, 12)
    pixels, everything = marked.pixels.clone(), torch.arange(10)
    images = marked.images(everything)
    marked.unmarked().pixels.zero_()
    assert torch.equal(marked.pixels, pixels)
    assert torch.equal(marked.images(everything), images)
    assert marked.poisoned.nonzero().squeeze(1).tolist() == [2, 7]


def test_unmarked_says_nothing_of_where_triggers_are() -> None:
    """Nothing in it depends on which images are poisoned, but the images and the labels themselves."""
    marked = poisoned(8, 8)
    pixels = to_bytes(marked.images(torch.arange(10)))
    plain = replace(made(), pixels=pixels, labels=marked.labels)
    for f in fields(ImageSet):
        one, other = getattr(marked.unmarked(), f.name), getattr(plain, f.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, f.name


def test_a_set_without_a_mask_is_unmarked_already() -> None:
    clean = made(8, 12)
    assert clean.unmarked() is clean


def test_an_empty_mask_goes_too() -> None:
    """A set with a mask of no image: a poison rate that came to nothing."""
    marked = made().stamp(torch.arange(0), drawn(0, 8), torch.arange(0))
    assert marked.unmarked().stamped_row is None
    assert torch.equal(marked.unmarked().pixels, marked.pixels)


def test_unmarked_goes_through_more_than_one_batch() -> None:
    marked = poisoned(2, 2, n=4100)
    everything = torch.arange(4100)
    assert torch.equal(to_bytes(marked.unmarked().images(everything)), to_bytes(marked.images(everything)))


def test_a_part_of_an_unmarked_set() -> None:
    marked, rows = poisoned(8, 12), torch.tensor([2, 0])
    assert torch.equal(marked.unmarked().take(rows).pixels, marked.take(rows).unmarked().pixels)


# The suspect


def test_a_suspect_is_what_it_was_given() -> None:
    clean, train = made(), poisoned(8, 8).unmarked()
    found = suspect_of(clean, train)
    assert found.clean is clean
    assert found.train is train
    assert found.training_set("spectral") is train
    assert suspect_of(clean).train is None
    with pytest.raises(FrozenInstanceError):
        found.train = None  # type: ignore[misc]


def test_a_suspect_holds_nothing_of_the_attacker() -> None:
    names = [f.name for f in fields(Suspect)]
    assert names == ["model", "clean", "n_classes", "generator", "train", "compute", "retrain"]


def test_one_clean_image_is_enough_and_a_class_may_be_missing() -> None:
    assert len(suspect_of(made(1)).clean) == 1


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no clean images": (lambda: suspect_of(made().take(torch.arange(0))), "the clean set has 0 images"),
    "a marked clean set": (lambda: suspect_of(poisoned(8, 8)), r"suspect\.clean .* hand in clean\.unmarked\(\)"),
    "a marked training set": (
        lambda: suspect_of(made(), poisoned(8, 8)),
        r"suspect\.train .* hand in train\.unmarked\(\)",
    ),
    "a mask of no image": (
        lambda: suspect_of(made(), made().stamp(torch.arange(0), drawn(0, 8), torch.arange(0))),
        r"suspect\.train .* hand in train\.unmarked\(\)",
    ),
    "a model in training mode": (
        lambda: suspect_of(made(), network=model().train()),
        r"suspect\.model is in training mode; call model\.eval\(\) first",
    ),
    "a part in training mode": (
        lambda: suspect_of(made(), network=nn.Sequential(model(), nn.Dropout().train(), nn.Identity())),
        r"suspect\.model is in training mode",
    ),
    "a model of NaN": (
        lambda: suspect_of(made(), network=filled(float("nan"))),
        r"suspect\.model cannot be used: 1\.weight holds NaN",
    ),
    "a model of another number of classes": (
        lambda: Suspect(model(), made(), 5, generator()),
        r"suspect\.model answers to 8 images with shape \(8, 3\), wanted \(8, 5\)",
    ),
    "labels that are no classes": (
        lambda: Suspect(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval(), made(), 2, generator()),
        "suspect.clean has the label 2, and n_classes = 2; raise it",
    ),
    "an empty training set": (lambda: suspect_of(made(), made().take(torch.arange(0))), "the train set has 0 images"),
    "a model that is a function": (
        lambda: suspect_of(made(), network=lambda images: images),  # type: ignore[arg-type]
        "suspect.model is of type function; give one of type Module",
    ),
    "images that are a tensor": (
        lambda: suspect_of(drawn(2, 8)),  # type: ignore[arg-type]
        "suspect.clean is of type Tensor; give one of type ImageSet",
    ),
    "a seed for a generator": (
        lambda: Suspect(model(), made(), 3, 0),  # type: ignore[arg-type]
        "suspect.generator is of type int; give one of type Generator",
    ),
    "no training set": (
        lambda: suspect_of(made()).training_set("spectral"),
        r"spectral .* train = None; give it as Suspect\(train=\.\.\.\)",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_suspect_refuses_in_one_line(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)
