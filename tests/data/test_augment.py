"""Crops and flips against a loop over images."""

import pytest
import torch
from torch import Tensor

from vitrap.data.augment import random_crop, random_flip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(b: int = 64, h: int = 9, w: int = 7) -> Tensor:
    return torch.rand(b, 3, h, w, generator=generator(9)) + 0.01


def shifts(image: Tensor, padding: int) -> list[Tensor]:
    """Every crop of an image that the padding allows, by plain slicing."""
    _, h, w = image.shape
    canvas = torch.zeros(image.shape[0], h + 2 * padding, w + 2 * padding)
    canvas[:, padding : padding + h, padding : padding + w] = image
    places = range(2 * padding + 1)
    return [canvas[:, top : top + h, left : left + w] for top in places for left in places]


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_each_image_is_a_crop_of_itself(padding: int) -> None:
    before = images()
    for image, cropped in zip(before, random_crop(before, padding, generator()), strict=True):
        assert sum(torch.equal(cropped, shifted) for shifted in shifts(image, padding)) == 1


def test_crops_are_those_of_a_loop_over_the_same_draw() -> None:
    before = images()
    top, left = torch.randint(7, (2, 64), generator=generator(5)).tolist()
    expected = [shifts(x, 3)[7 * t + r] for x, t, r in zip(before, top, left, strict=True)]
    assert torch.equal(random_crop(before, 3, generator(5)), torch.stack(expected))


def test_every_shift_occurs_about_as_often() -> None:
    image = images(1, 5, 5)
    cropped = random_crop(image.expand(9_000, -1, -1, -1), 1, generator())
    counts = torch.stack([(cropped == shifted).flatten(1).all(1).sum() for shifted in shifts(image[0], 1)])
    assert counts.sum() == 9_000
    assert ((counts - 1_000).abs() < 150).all()  # five standard deviations


def test_flips_mirror_left_to_right_half_of_the_time() -> None:
    before = images(4_000)
    after = random_flip(before, generator())
    same = (after == before).flatten(1).all(1)
    mirrored = (after == before.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(int(mirrored.sum()) - 2_000) < 160  # five standard deviations


@pytest.mark.parametrize("augment", [lambda x, g: random_crop(x, 2, g), random_flip])
def test_augmentation_keeps_form_input_and_global_state(augment) -> None:
    before, state = images(), torch.get_rng_state()
    kept = before.clone()
    after = augment(before, generator())
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert after.is_contiguous()
    assert torch.equal(before, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(after, augment(before, generator()))
    assert not torch.equal(after, augment(before, generator(1)))


def test_no_padding_is_no_crop() -> None:
    assert torch.equal(random_crop(images(), 0, generator()), images())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("drawn_on", ["cpu", "cuda"])
def test_on_a_gpu_the_host_never_waits(drawn_on: str) -> None:
    before, chance = images().cuda(), torch.Generator(drawn_on).manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        after = random_flip(random_crop(before, 2, chance), chance)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert after.is_cuda
    assert after.shape == before.shape
