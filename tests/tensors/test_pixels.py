"""8-bit rounding, and the hash and noise that an image alone decides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from vitrap.tensors.pixels import hashed_noise, image_hash, round8, straight_round8, to_bytes, to_unit


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_every_byte_survives_the_way_there_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(to_unit(pixels)), pixels)


@settings(deadline=None, max_examples=50)
@given(st.floats(-0.5, 1.5, width=32))
def test_bytes_are_the_nearest(value: float) -> None:
    found = to_bytes(torch.full((1, 1, 1, 1), value)).item()
    assert found == np.rint(np.float32(min(max(value, 0), 1)) * np.float32(255))


def test_rounding_moves_a_pixel_by_half_a_step_at_most_and_only_once() -> None:
    images = drawn(0, 2, 3, 8, 8)
    once = round8(images)
    assert (once - images).abs().max() <= 0.5 / 255 + 1e-7
    assert (once != images).any()
    assert torch.equal(round8(once), once)


def test_gradients_pass_a_rounding_as_they_come() -> None:
    images, weights = drawn(0, 2, 3, 4, 4).requires_grad_(), drawn(1, 2, 3, 4, 4)
    rounded = straight_round8(images)
    assert torch.equal(rounded, round8(images.detach()))
    (slopes,) = torch.autograd.grad((weights * rounded).sum(), images)
    assert torch.equal(slopes, weights)


def test_the_hash_sees_8_bit_pixels_alone() -> None:
    images = round8(drawn(0, 4, 3, 8, 8))
    nudged = images + (drawn(1, 4, 3, 8, 8) - 0.5) * 0.9 / 255
    assert (nudged != images).any()
    assert torch.equal(image_hash(images), image_hash(nudged))
    assert torch.equal(hashed_noise(images), hashed_noise(nudged))


def test_the_hash_sees_each_pixel_and_its_place() -> None:
    """Images that differ in one step of one pixel, in the place of two pixels, or in the order of channels."""
    image = to_unit(to_bytes(drawn(2, 1, 3, 6, 6)) // 2)
    single = image.repeat(108, 1, 1, 1)
    single.view(108, 108).diagonal().add_(1 / 255)
    turned = torch.cat([image.flip(1), image.flip(2), image.flip(3), image.roll(1, 3), image.mT])
    everything = torch.cat([image, single, turned])
    assert len(image_hash(everything).unique()) == len(everything)


def test_the_hash_is_a_31_bit_number_that_seldom_repeats() -> None:
    found = image_hash(drawn(3, 4000, 1, 4, 4))
    assert found.min() >= 0
    assert found.max() < 2**31
    assert len(found.unique()) >= 3998  # by chance, 4000 * 3999 / 2 pairs meet 0.004 times


def test_batch_mates_do_not_matter() -> None:
    images = drawn(4, 5, 3, 8, 8)
    together = hashed_noise(images)
    for number in range(5):
        assert torch.equal(hashed_noise(images[number : number + 1])[0], together[number])
    assert torch.equal(hashed_noise(images.flip(0)), together.flip(0))


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_uniform(seed: int) -> None:
    noise = hashed_noise(drawn(seed, 40, 3, 16, 16))
    assert noise.shape == (40, 16, 16)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert stats.kstest(noise.flatten().numpy(), "uniform").pvalue > 0.001
    assert min(stats.kstest(one.flatten().numpy(), "uniform").pvalue for one in noise) > 0.001 / 40


def test_noise_of_neighbours_and_of_other_images_has_nothing_in_common() -> None:
    noise = hashed_noise(drawn(5, 40, 3, 16, 16)).numpy()
    pairs = [(noise[:, :, 1:], noise[:, :, :-1]), (noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])]
    for one, other in pairs:
        assert abs(stats.pearsonr(one.ravel(), other.ravel()).statistic) < 0.04
    assert len({row.tobytes() for row in noise}) == 40


def test_flat_images_have_noise_too() -> None:
    noise = hashed_noise(torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]))
    assert stats.kstest(noise.flatten().numpy(), "uniform").pvalue > 0.001
    assert not torch.equal(noise[0], noise[1])
