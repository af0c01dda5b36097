"""Crops, flips and jitter against a loop over images."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as torchvision

from vitrap.data.augment import random_crop, random_flip, random_jitter


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


@pytest.mark.parametrize(
    "augment", [lambda x, g: random_crop(x, 2, g), random_flip, lambda x, g: random_jitter(x, 0.5, g)]
)
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


# ---- jitter


def by_torchvision(image: Tensor, drawn: list[float]) -> Tensor:
    """One image with one draw in [-1, 1] a kind of change, by torchvision's own functions."""
    tilt, scale, shear, brightness, contrast, saturation = drawn
    image = torchvision.adjust_brightness(image, 1 + 0.4 * brightness)
    image = torchvision.adjust_contrast(image, 1 + 0.4 * contrast)
    image = torchvision.adjust_saturation(image, 1 + 0.4 * saturation)
    lean = [math.degrees(math.atan(0.15 * shear)), 0.0]
    bilinear = InterpolationMode.BILINEAR
    return torchvision.affine(image, 15 * tilt, [0, 0], 1 + 0.15 * scale, lean, interpolation=bilinear)


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("h", "w"), [(32, 32), (9, 7), (6, 11)])
def test_jitter_is_torchvisions_with_the_same_draw(h: int, w: int, strength: float) -> None:
    before = images(16, h, w).clamp(0, 1)
    draws = strength * (2 * torch.rand((6, 16), generator=generator(5)) - 1)
    expected = [by_torchvision(x, drawn) for x, drawn in zip(before, draws.T.tolist(), strict=True)]
    after = random_jitter(before, strength, generator(5))
    assert torch.allclose(after, torch.stack(expected), atol=2e-5)
    assert not torch.allclose(after, before, atol=1e-2)
    assert after.min() >= 0
    assert after.max() <= 1


def test_what_comes_from_outside_is_black() -> None:
    """Turned by 12 degrees, a white image loses its corners; its middle stays."""

    def drawn(*shape: object, **where: object) -> Tensor:
        return torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5, 0.5])[:, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", drawn)
        after = random_jitter(torch.ones(1, 3, 32, 32), 0.8, generator())
    assert (after[0, :, [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
    assert torch.allclose(after[0, :, 8:24, 8:24], torch.ones(3, 16, 16))


def test_no_strength_is_no_jitter() -> None:
    assert torch.equal(random_jitter(images(), 0, generator()), images())


def test_an_images_jitter_knows_nothing_of_its_neighbours() -> None:
    before, others = images(8), images(8).flip(0)
    mixed = torch.cat([before[:4], others[4:]])
    after, beside = random_jitter(before, 1.0, generator()), random_jitter(mixed, 1.0, generator())
    assert torch.equal(after[:4], beside[:4])
    assert not torch.allclose(after[4:], beside[4:], atol=1e-3)


def test_each_image_has_a_draw_of_its_own() -> None:
    same = images(1).expand(8, -1, -1, -1)
    after = random_jitter(same, 0.5, generator())
    apart = torch.cdist(after.flatten(1), after.flatten(1))
    assert (apart + torch.eye(8) > 1e-2).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("drawn_on", ["cpu", "cuda"])
def test_on_a_gpu_the_host_never_waits(drawn_on: str) -> None:
    before, chance = images().cuda(), torch.Generator(drawn_on).manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        after = random_jitter(random_flip(random_crop(before, 2, chance), chance), 0.5, chance)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert after.is_cuda
    assert after.shape == before.shape
