"""Erosion against scipy's, exactly, and against what an erosion must be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from vitrap.tensors.morphology import Operation, Shape, dilate, element, erode, morph

SHAPES: tuple[Shape, ...] = ("square", "cross", "disc")
SIZES = (1, 3, 5, 7)


def levels(seed: int, *shape: int) -> Tensor:
    """8-bit levels over 256, so that sums and differences of them are exact."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)) / 256


def footprints(seed: int, size: int) -> Tensor:
    """A random structuring element that is neither symmetrical nor empty."""
    drawn = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)) < 0.4
    drawn[seed % size, seed // size % size] = True
    return drawn


def by_scipy(images: Tensor, footprint: Tensor, times: int = 1) -> Tensor:
    out = images.numpy().copy()
    for picture in out.reshape(-1, *out.shape[-2:]):
        for _ in range(times):
            picture[:] = ndimage.grey_erosion(picture, footprint=footprint.numpy(), mode="nearest")
    return torch.from_numpy(out)


seeds = st.integers(0, 10_000)
shapes, sizes = st.sampled_from(SHAPES), st.sampled_from(SIZES)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_erosion_is_scipys(shape: Shape, size: int, times: int) -> None:
    images = torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(size))
    footprint = element(shape, size)
    found = images
    for _ in range(times):
        found = erode(found, footprint)
    assert torch.equal(found, by_scipy(images, footprint, times))


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(1, 7), st.integers(1, 9), st.integers(1, 9))
def test_erosion_is_scipys_for_any_element_on_any_image(seed: int, size: int, height: int, width: int) -> None:
    """Elements without symmetry and of even size too, and images smaller than the element."""
    images, footprint = levels(seed, 1, 2, height, width), footprints(seed, size)
    assert torch.equal(erode(images, footprint), by_scipy(images, footprint))


@settings(deadline=None, max_examples=30)
@given(seeds, shapes, sizes)
def test_erosion_never_brightens(seed: int, shape: Shape, size: int) -> None:
    images = levels(seed, 1, 3, 8, 8)
    eroded = erode(images, element(shape, size))
    assert (eroded <= images).all()
    assert set(eroded.unique().tolist()) <= set(images.unique().tolist()), "a value that no pixel had"


@settings(deadline=None, max_examples=30)
@given(seeds, shapes, sizes)
def test_erosion_is_increasing(seed: int, shape: Shape, size: int) -> None:
    one, other = levels(seed, 1, 1, 8, 8), levels(seed + 1, 1, 1, 8, 8)
    low, high = (erode(x, element(shape, size)) for x in (one.minimum(other), one))
    assert (low <= high).all()


@settings(deadline=None, max_examples=30)
@given(seeds, shapes, sizes, st.integers(0, 4), st.integers(0, 4))
def test_erosion_moves_with_the_image(seed: int, shape: Shape, size: int, down: int, across: int) -> None:
    """The same scene seen through two windows erodes alike, where no border is in reach."""
    scene, b, reach = levels(seed, 1, 1, 20, 20), element(shape, size), size // 2
    here, there = erode(scene[..., :16, :16], b), erode(scene[..., down : down + 16, across : across + 16], b)
    inside_here = here[..., down + reach : 16 - reach, across + reach : 16 - reach]
    inside_there = there[..., reach : 16 - down - reach, reach : 16 - across - reach]
    assert torch.equal(inside_here, inside_there)


@settings(deadline=None, max_examples=30)
@given(seeds, shapes, sizes, st.integers(-256, 256))
def test_erosion_commutes_with_a_constant(seed: int, shape: Shape, size: int, steps: int) -> None:
    images, b = levels(seed, 1, 1, 8, 8), element(shape, size)
    assert torch.equal(erode(images + steps / 256, b), erode(images, b) + steps / 256)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 7))
def test_erosion_is_dual_to_the_greatest(seed: int, size: int) -> None:
    """Eroding the negative is dilating: the greatest pixel under the element."""
    images, footprint = levels(seed, 1, 1, 8, 9), footprints(seed, size)
    greatest = ndimage.maximum_filter(images[0, 0].numpy(), footprint=footprint.numpy(), mode="nearest")
    assert torch.equal(1 - erode(1 - images, footprint), torch.from_numpy(greatest)[None, None])


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from([1, 3, 5, 7]))
def test_dilation_is_scipys(seed: int, size: int) -> None:
    images, footprint = levels(seed, 1, 2, 8, 9), footprints(seed, size)
    for channel, found in zip(images[0], dilate(images, footprint)[0], strict=True):
        wanted = ndimage.grey_dilation(channel.numpy(), footprint=footprint.numpy(), mode="nearest")
        assert torch.equal(found, torch.from_numpy(wanted))


@pytest.mark.parametrize(
    ("operation", "steps"),
    [
        ("erosion", "ee"),
        ("dilation", "dd"),
        ("opening", "eedd"),
        ("closing", "ddee"),
    ],
)
def test_an_operation_is_its_steps_by_scipy(operation: Operation, steps: str) -> None:
    images, footprint = levels(5, 1, 1, 9, 8), element("disc", 3)
    wanted = images[0, 0].numpy()
    for step in steps:
        by_hand = ndimage.grey_erosion if step == "e" else ndimage.grey_dilation
        wanted = by_hand(wanted, footprint=footprint.numpy(), mode="nearest")
    assert torch.equal(morph(images, footprint, operation, 2)[0, 0], torch.from_numpy(wanted))


@pytest.mark.parametrize("shape", SHAPES)
def test_one_pixel_erodes_nothing(shape: Shape) -> None:
    images = levels(0, 2, 3, 5, 6)
    eroded = erode(images, element(shape, 1))
    assert torch.equal(eroded, images)
    assert eroded.data_ptr() != images.data_ptr(), "the result shares the input's memory"


def test_the_input_stays_and_channels_do_not_mix() -> None:
    images = levels(1, 2, 3, 6, 6)
    before = images.clone()
    whole = erode(images, element("square", 3))
    assert torch.equal(images, before)
    for channel in range(3):
        alone = erode(images[:, channel : channel + 1], element("square", 3))
        assert torch.equal(whole[:, channel : channel + 1], alone)


@pytest.mark.parametrize(
    ("shape", "size", "rows"),
    [
        ("square", 3, ["111", "111", "111"]),
        ("cross", 5, ["00100", "00100", "11111", "00100", "00100"]),
        ("disc", 3, ["010", "111", "010"]),
        ("disc", 5, ["00100", "01110", "11111", "01110", "00100"]),
        ("disc", 7, ["0001000", "0111110", "0111110", "1111111", "0111110", "0111110", "0001000"]),
    ],
)
def test_elements_by_hand(shape: Shape, size: int, rows: list[str]) -> None:
    wanted = np.array([[digit == "1" for digit in row] for row in rows])
    assert np.array_equal(element(shape, size).numpy(), wanted)


@pytest.mark.parametrize("size", [-1, 0, 2, 4])
def test_an_element_of_no_odd_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"odd and at least 1, not {size}"):
        element("square", size)


def test_an_element_without_pixels() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        erode(levels(0, 1, 1, 4, 4), torch.zeros(3, 3, dtype=torch.bool))
