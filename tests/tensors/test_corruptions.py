"""Corruptions: against scipy, scikit-image and Pillow, and by hand where neither has them."""

from collections.abc import Callable
from io import BytesIO
from math import ceil

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import skimage.color
import torch
from PIL import Image
from torch import Tensor

from vitrap.tensors.corruptions import (
    SEVERITIES,
    Canvas,
    Corruption,
    brightness,
    contrast,
    cosines,
    defocus_blur,
    disk,
    elastic_transform,
    fog,
    gaussian_noise,
    glass_blur,
    impulse_noise,
    jpeg_compression,
    magnifying,
    mirrored,
    motion_blur,
    pixelate,
    plasma,
    poisson_quantile,
    shot_noise,
    smear,
    smoothing,
    snow,
    zoom_blur,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def canvas(size: int = 32, channels: int = 3, seed: int = 0) -> Canvas:
    return Canvas(channels, size, generator(seed), torch.device("cpu"))


def drawn(n: int = 2, size: int = 32, channels: int = 3) -> Tensor:
    """Smooth images of 8 bits."""
    window = smoothing(size, 1.5)
    noise = window @ torch.rand(n, channels, size, size, generator=generator(7)) @ window.mT
    return (((noise - noise.amin()) / (noise.amax() - noise.amin())) * 255).round() / 255


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()) for x in images]


def pixels(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(x) for x in images])).permute(0, 3, 1, 2) / 255


def each(images: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """A function of one channel, for each channel of each image."""
    planes = [change(plane.double().numpy()) for plane in images.flatten(0, 1)]
    return torch.from_numpy(np.stack(planes)).float().view(images.shape[:2] + planes[0].shape)


# Noise


def test_noise_has_its_scale_and_is_the_same_for_all_images() -> None:
    images = torch.full((2, 3, 64, 64), 0.5)
    found = gaussian_noise(canvas(64), 0.2)(images) - images
    assert torch.equal(found[0], found[1])
    assert found.std().item() == pytest.approx(0.2, rel=0.05)


def test_poisson_quantiles_are_scipys() -> None:
    mean, level = 60 * torch.rand(4000, generator=generator(1)), torch.rand(4000, generator=generator(2))
    found = poisson_quantile(mean, level, 150)
    wanted = torch.from_numpy(scipy.stats.poisson.ppf(level.numpy(), mean.numpy())).float()
    assert (found != wanted).float().mean() < 0.002  # where rounding decides
    assert (found - wanted).abs().max() <= 1


@pytest.mark.parametrize("photons", [3, 60])
def test_shot_noise_has_a_poisson_variables_mean_and_variance(photons: int) -> None:
    found = shot_noise(canvas(100), photons)(torch.full((1, 3, 100, 100), 0.4))
    assert found.mean().item() == pytest.approx(0.4, rel=0.02)
    assert found.var().item() == pytest.approx(0.4 / photons, rel=0.05)


def test_impulse_noise_is_salt_and_pepper_of_equal_shares() -> None:
    found = impulse_noise(canvas(100), 0.2)(torch.full((1, 3, 100, 100), 0.4))
    shares = [(found == value).float().mean().item() for value in (0.0, 1.0, 0.4)]
    assert shares == pytest.approx([0.1, 0.1, 0.8], abs=0.01)


# Blur


@pytest.mark.parametrize(("size", "margin"), [(5, 2), (4, 9)])
def test_mirroring_is_numpys(size: int, margin: int) -> None:
    assert mirrored(size, margin).tolist() == np.pad(np.arange(size), margin, mode="reflect").tolist()


@pytest.mark.parametrize("sigma", [0.32, 0.7, 1.5])
def test_smoothing_is_scipys(sigma: float) -> None:
    images, window = drawn(), smoothing(32, sigma)
    wanted = each(images, lambda plane: scipy.ndimage.gaussian_filter(plane, sigma, mode="nearest", truncate=4))
    torch.testing.assert_close(window @ images @ window.mT, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("radius", "alias", "side"), [(3, 0.1, 17), (6, 0.5, 17), (10, 0.5, 21)])
def test_defocus_is_the_mean_over_a_smoothed_disk(radius: float, alias: float, side: int) -> None:
    reach = side // 2
    place = np.arange(-reach, reach + 1)
    inside = (place[:, None] ** 2 + place**2 <= radius**2).astype(float)
    width = 1 if radius <= 8 else 2
    window = np.exp(-((np.arange(-width, width + 1) / alias) ** 2) / 2)
    wanted = scipy.ndimage.correlate(inside / inside.sum(), np.outer(window, window) / window.sum() ** 2, mode="mirror")
    torch.testing.assert_close(disk(radius, alias), torch.from_numpy(wanted).float(), atol=1e-6, rtol=0)
    blurred = each(drawn(), lambda plane: scipy.ndimage.correlate(plane, wanted, mode="mirror"))
    torch.testing.assert_close(defocus_blur(canvas(), radius, alias)(drawn()), blurred, atol=1e-5, rtol=0)


def test_glass_moves_colours_by_its_reach_and_leaves_the_border() -> None:
    """With a blur of next to nothing, each pixel has the colour of one within reach."""
    images = torch.arange(256.0).view(1, 1, 16, 16) / 255
    found = (255 * glass_blur(canvas(16, 1), 0.05, 2, 1)(images)).round().long()[0, 0]
    here = torch.arange(256).view(16, 16)
    down, right = found // 16 - here // 16, found % 16 - here % 16
    assert (down.min(), down.max(), right.min(), right.max()) == (-2, 1, -2, 1)
    assert torch.equal(found[:3], here[:3])
    assert torch.equal(found[:, 15:], here[:, 15:])
    twice = (255 * glass_blur(canvas(16, 1), 0.05, 2, 2)(images)).round().long()[0, 0]
    assert (twice // 16 - here // 16).min() < -2


@pytest.mark.parametrize("angle", [0.0, 30.0, -45.0, -100.0])
def test_smearing_is_a_weighted_sum_of_moved_images(angle: float) -> None:
    images, total, weights = drawn(size=12), torch.zeros(2, 3, 12, 12), np.exp(-((np.arange(9) / 2.5) ** 2) / 2)
    for i, weight in enumerate(weights / weights.sum()):
        down = -ceil(i * np.sin(np.deg2rad(angle)) - 0.5)
        right = -ceil(i * np.cos(np.deg2rad(angle)) - 0.5)
        rows = np.clip(np.arange(12) - down, 0, 11)
        columns = np.clip(np.arange(12) - right, 0, 11)
        total += weight * images[:, :, rows][..., columns]
    torch.testing.assert_close(smear(images, 4, 2.5, angle), total, atol=1e-6, rtol=0)


def test_motion_keeps_a_plain_image_and_its_angle_is_drawn() -> None:
    plain = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(motion_blur(canvas(16), 20, 15)(plain), plain)
    one, other = (motion_blur(canvas(seed=seed), 10, 3)(drawn()) for seed in (0, 1))
    assert not torch.allclose(one, other, atol=1e-3)


def clipped_zoom(plane: np.ndarray, factor: float) -> np.ndarray:
    """As the published code has it."""
    size = len(plane)
    kept = int(np.ceil(size / factor))
    top = (size - kept) // 2
    large = scipy.ndimage.zoom(plane[top : top + kept, top : top + kept], factor, order=1)
    trim = (len(large) - size) // 2
    return large[trim : trim + size, trim : trim + size]


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.15, 2.5, 4.0])
@pytest.mark.parametrize("size", [16, 32, 35])
def test_magnifying_is_scipys_zoom(size: int, factor: float) -> None:
    images, side = drawn(size=size), magnifying(size, factor)
    wanted = each(images, lambda plane: clipped_zoom(plane, factor))
    torch.testing.assert_close(side @ images @ side.mT, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("severity", "factors"), list(enumerate([(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)]))
)
def test_zoom_blur_is_the_mean_over_the_codes_factors(severity: int, factors: tuple[float, float]) -> None:
    """At a size at which no number of pixels is rounded from a half."""
    images, steps = drawn(1, 35), np.arange(1, *factors)
    zoomed = [each(images, lambda plane, by=by: clipped_zoom(plane, by)) for by in steps]
    wanted = (images + sum(zoomed)) / (len(steps) + 1)
    found = zoom_blur(canvas(35), *SEVERITIES[zoom_blur][severity])(images)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


# Weather


def test_snow_without_flakes_whitens_by_hand() -> None:
    """A pixel of brightness g becomes keep * x + (1 - keep) * max(x, 1.5 g + 0.5)."""
    images = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    grey = 0.299 + 0.587 * 0.5
    white = 1.5 * grey + 0.5
    found = snow(canvas(8), (0.0, 0.0, 2, 0.5), 3, 2.0, 0.75)(images)
    wanted = [0.75 * x + 0.25 * max(x, white) for x in (1.0, 0.5, 0.0)]
    torch.testing.assert_close(found[0, :, 4, 4], torch.tensor(wanted))


def test_snow_adds_the_same_light_to_all_channels_both_ways_round() -> None:
    black = torch.zeros(1, 3, 32, 32)
    layer = snow(canvas(), (0.1, 0.3, 3, 0.5), 10, 4, 1.0)(black)
    assert layer.max() > 0.05
    assert torch.equal(layer[:, 0], layer[:, 2])
    torch.testing.assert_close(layer, layer.rot90(2, (2, 3)))


def test_the_smallest_plasma_by_hand() -> None:
    u = torch.rand(3, generator=generator(), dtype=torch.float64) * 2 - 1
    centre = u[0]  # the mean of four times the corner, 0, and noise
    top, left = centre / 2 + u[1], centre / 2 + u[2]
    wanted = torch.stack([torch.zeros_like(top), top, left, centre]).view(2, 2)
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    torch.testing.assert_close(plasma(2, 3.0, canvas()), wanted.float())


def test_plasma_fills_its_range_and_is_smoother_the_faster_noise_falls() -> None:
    rough, smooth = (plasma(32, decay, canvas()) for decay in (1.4, 3.0))
    for found in (rough, smooth):
        assert (found.min(), found.max()) == (0, 1)
    assert rough.diff().abs().mean() > 2 * smooth.diff().abs().mean()


def test_fog_lifts_all_channels_and_keeps_the_brightest_value_in_range() -> None:
    images, amount = 0.8 * drawn(), 1.5
    clouds = amount * plasma(32, 2.0, canvas())
    most = images.amax((1, 2, 3), keepdim=True)
    found = fog(canvas(), amount, 2.0)(images)
    torch.testing.assert_close(found, (images + clouds) * most / (most + amount))
    assert (found <= most + 1e-6).all()


@pytest.mark.parametrize("amount", [0.1, 0.5])
def test_brightness_is_that_of_hsv(amount: float) -> None:
    images = drawn()
    images[:, :, :2] = 0  # black has no hue
    hsv = skimage.color.rgb2hsv(images.permute(0, 2, 3, 1).double().numpy())
    hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
    wanted = torch.from_numpy(skimage.color.hsv2rgb(hsv)).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(brightness(canvas(), amount)(images), wanted, atol=1e-5, rtol=0)


# Digital


def test_contrast_by_hand() -> None:
    images = torch.tensor([[[[0.0, 0.5]]]])
    assert contrast(canvas(), 0.5)(images).flatten().tolist() == [0.125, 0.375]


def test_elastic_transform_is_scipys() -> None:
    images, size, alpha = drawn(), 32, 30.0
    field = (2 * torch.rand(2, size, size, generator=generator()) - 1).double().numpy() * 0.005 * size
    across, down = (alpha * scipy.ndimage.gaussian_filter(one, 0.01 * size, mode="nearest") for one in field)
    row, column = np.mgrid[:size, :size]
    wanted = each(images, lambda x: scipy.ndimage.map_coordinates(x, [row + down, column + across], order=1))
    found = elastic_transform(canvas(), alpha)(images)
    inner = (slice(None), slice(None), slice(6, -6), slice(6, -6))  # scipy has 0 beyond the edge
    torch.testing.assert_close(found[inner], wanted[inner], atol=1e-4, rtol=0)
    mirror = each(
        images, lambda x: scipy.ndimage.map_coordinates(x, [row + down, column + across], order=1, mode="reflect")
    )
    torch.testing.assert_close(found, mirror, atol=1e-4, rtol=0)


@pytest.mark.parametrize("factor", [0.6, 0.5, 0.4, 0.3, 0.25])
@pytest.mark.parametrize("size", [16, 32, 36])
def test_pixelating_is_pillows(size: int, factor: float) -> None:
    """At sizes without a pixel between two parts, which Pillow gives to either."""
    images, small = drawn(size=size), int(size * factor)
    box, near = Image.Resampling.BOX, Image.Resampling.NEAREST
    wanted = pixels([x.resize((small, small), box).resize((size, size), near) for x in pictures(images)])
    torch.testing.assert_close(pixelate(canvas(size), factor)(images), wanted, atol=1.01 / 255, rtol=0)


def test_the_cosine_transform_is_orthonormal() -> None:
    torch.testing.assert_close(cosines() @ cosines().mT, torch.eye(8))


@pytest.mark.parametrize("quality", [90, 25, 15, 7])
@pytest.mark.parametrize("size", [32, 35])
def test_jpeg_is_pillows_but_for_rounding(size: int, quality: int) -> None:
    images, wanted = drawn(3, size), []
    for picture in pictures(images):
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        wanted.append(Image.open(file).convert("RGB"))
    difference = 255 * (jpeg_compression(canvas(size), quality)(images).clamp(0, 1) - pixels(wanted)).abs()
    lost = 255 * (images - pixels(wanted)).abs().mean()
    assert difference.mean() < lost / 4


# All of them

NAMES = [(name, strength) for name, strengths in SEVERITIES.items() for strength in (strengths[0], strengths[-1])]


def made(name: Callable[..., Corruption], strength: tuple[object, ...], size: int, channels: int) -> Corruption:
    return name(canvas(size, channels), *strength)


@pytest.mark.parametrize(("name", "strength"), NAMES)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (17, 3), (32, 3)])
def test_a_corruption_takes_any_size_and_treats_each_image_alone(
    name: Callable[..., Corruption], strength: tuple[object, ...], size: int, channels: int
) -> None:
    images = drawn(3, size, channels)
    before, corrupt = images.clone(), made(name, strength, size, channels)
    found = corrupt(images)
    assert torch.equal(images, before), "the images were changed in place"
    assert found.shape == images.shape
    assert found.isfinite().all()
    assert not torch.allclose(found, images, atol=1e-3)
    for number in range(3):
        torch.testing.assert_close(corrupt(images[number : number + 1])[0], found[number], atol=1e-5, rtol=0)
    assert torch.equal(made(name, strength, size, channels)(images), found), "another draw from the same stream"


def test_the_last_severity_harms_more_than_the_first() -> None:
    images = drawn(4)
    for name, strengths in SEVERITIES.items():
        first, last = (
            (made(name, strength, 32, 3)(images).clamp(0, 1) - images).abs().mean()
            for strength in (strengths[0], strengths[-1])
        )
        assert len(strengths) == 5
        assert last > first, name.__name__
