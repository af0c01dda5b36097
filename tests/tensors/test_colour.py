"""Brightness and saturation against the standard library's HSV, and means that match."""

import colorsys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vitrap.tensors.colour import brightness, match_brightness, match_saturation, saturation

Match = Callable[[Tensor, Tensor], Tensor]
MATCHES = [match_brightness, match_saturation]


def drawn(seed: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(4, 3, 6, 7, generator=torch.Generator().manual_seed(seed))


def hsv(images: Tensor) -> Tensor:
    """Hue, saturation and value, pixel by pixel."""
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    found = torch.tensor([colorsys.rgb_to_hsv(*pixel) for pixel in pixels])
    return found.view(len(images), *images.shape[-2:], 3).permute(0, 3, 1, 2)


def test_brightness_and_saturation_are_those_of_hsv() -> None:
    images = drawn(0)
    images[0, :, 0, 0] = 0  # black: no saturation
    images[0, :, 0, 1] = 1
    images[0, :, 0, 2] = torch.tensor([1.0, 0.0, 0.0])
    wanted = hsv(images)
    torch.testing.assert_close(saturation(images), wanted[:, 1:2])
    torch.testing.assert_close(brightness(images), wanted[:, 2:3])


def test_by_hand() -> None:
    pixel = torch.tensor([0.8, 0.4, 0.6]).view(1, 3, 1, 1)
    assert brightness(pixel).item() == pytest.approx(0.8)
    assert saturation(pixel).item() == pytest.approx(0.5)
    dimmer = torch.tensor([0.4, 0.4, 0.4]).view(1, 3, 1, 1)
    assert match_brightness(pixel, dimmer).flatten().tolist() == pytest.approx([0.4, 0.2, 0.3])
    assert match_saturation(pixel, dimmer).flatten().tolist() == pytest.approx([0.8, 0.8, 0.8])
    fuller = torch.tensor([1.0, 0.25, 1.0]).view(1, 3, 1, 1)  # S = 0.75: one and a half times as full
    assert match_saturation(pixel, fuller).flatten().tolist() == pytest.approx([0.8, 0.2, 0.5])


def test_matched_brightness_has_the_references_mean_and_leaves_hue_and_saturation() -> None:
    images, reference = drawn(1, 0.3, 0.6), drawn(2, 0.2, 0.7)
    matched = match_brightness(images, reference)
    assert matched.max() < 1, "something was cut off: the means need not agree"
    torch.testing.assert_close(brightness(matched).mean((1, 2, 3)), brightness(reference).mean((1, 2, 3)))
    torch.testing.assert_close(hsv(matched)[:, :2], hsv(images)[:, :2], atol=2e-5, rtol=0)


def test_matched_saturation_has_the_references_mean_and_leaves_hue_and_brightness() -> None:
    images, reference = drawn(1, 0.4, 0.7), drawn(2, 0.3, 0.8)
    matched = match_saturation(images, reference)
    assert saturation(matched).max() < 1 - 1e-3, "something was cut off: the means need not agree"
    torch.testing.assert_close(saturation(matched).mean((1, 2, 3)), saturation(reference).mean((1, 2, 3)))
    torch.testing.assert_close(hsv(matched)[:, [0, 2]], hsv(images)[:, [0, 2]], atol=2e-5, rtol=0)


@pytest.mark.parametrize("match", MATCHES)
def test_an_image_matched_to_itself_stays(match: Match) -> None:
    torch.testing.assert_close(match(drawn(3), drawn(3)), drawn(3))


@pytest.mark.parametrize("match", MATCHES)
def test_one_factor_an_image(match: Match) -> None:
    images, reference = drawn(4, 0.3, 0.6), drawn(5)
    together = match(images, reference)
    for number in range(4):
        one = slice(number, number + 1)
        torch.testing.assert_close(match(images[one], reference[one]), together[one], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("match", "measure", "images", "reference"),
    [
        (match_brightness, brightness, drawn(6, 0, 0.9), drawn(7, 0.9, 1)),
        (match_saturation, saturation, drawn(6, 0, 0.9), drawn(7) * torch.tensor([1, 1, 0])[:, None, None]),
    ],
)
def test_what_goes_beyond_1_is_cut_off(match: Match, measure: Match, images: Tensor, reference: Tensor) -> None:
    matched = match(images, reference)
    assert matched.min() >= -1e-6
    assert matched.max() <= 1 + 1e-6
    assert measure(matched).max() == pytest.approx(1, abs=1e-5)
    means = [measure(x).mean((1, 2, 3)) for x in (images, matched, reference)]
    assert (means[0] < means[1]).all()
    assert (means[1] <= means[2] + 1e-6).all()


def test_grey_has_no_hue_to_fill() -> None:
    grey = drawn(8)[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(match_saturation(grey, drawn(9)), grey)
    assert saturation(grey).eq(0).all()


@pytest.mark.parametrize("match", MATCHES)
def test_black_stays_black(match: Match) -> None:
    black = torch.zeros(4, 3, 6, 7)
    assert match(black, drawn(10)).eq(0).all()
    assert match(drawn(10), black).isfinite().all()
    assert saturation(black).eq(0).all()
