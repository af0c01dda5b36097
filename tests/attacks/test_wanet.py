"""WaNet: the field against a bicubic of its own, the warp against scipy, and noise mode."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from vitrap.attacks.wanet import WaNet, Warp, control_grid, hashed_shifts, warped_grid
from vitrap.contracts import Access
from vitrap.data.sources import World
from vitrap.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int = 2, channels: int = 3, size: int = 9) -> Tensor:
    return torch.rand(n, channels, size, size, generator=generator())


def keys(distance: float) -> float:
    """The cubic kernel of Keys with a = -0.75, which torch and OpenCV use."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def enlarged(control: np.ndarray, size: int) -> np.ndarray:
    """Bicubic enlarging in which the outermost points stay outermost; beyond them, the nearest one counts."""
    k = control.shape[0]
    weights = np.zeros((size, k))
    for pixel in range(size):
        place = pixel * (k - 1) / (size - 1)
        for point in range(int(place) - 1, int(place) + 3):
            weights[pixel, min(max(point, 0), k - 1)] += keys(place - point)
    return weights @ control @ weights.T


@pytest.mark.parametrize(("k", "s"), [(2, 0.5), (4, 0.5), (6, 3.0)])
def test_the_mean_shift_of_the_control_points_is_s(k: int, s: float) -> None:
    control = control_grid(k, s, generator())
    assert control.shape == (2, k, k)
    assert control.abs().mean().item() == pytest.approx(s)
    assert (control > 0).any()
    assert (control < 0).any()
    again = 2 * torch.rand(2, k, k, generator=generator()) - 1
    torch.testing.assert_close(control / control[0, 0, 0], again / again[0, 0, 0])


@pytest.mark.parametrize(("k", "size"), [(2, 5), (4, 9), (4, 32), (7, 16)])
def test_the_field_is_the_bicubic_of_the_control_points(k: int, size: int) -> None:
    control = control_grid(k, 0.5, generator())
    line = np.linspace(-1, 1, size)
    across, down = (enlarged(axis.double().numpy(), size) / size for axis in control)
    wanted = np.stack([line[None, :] + across, line[:, None] + down], 2).clip(-1, 1)
    np.testing.assert_allclose(warped_grid(control, size).numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("axis", ["across", "down"])
@pytest.mark.parametrize("pixels", [1, -2])
def test_an_even_field_moves_the_image_by_whole_pixels(axis: str, pixels: int) -> None:
    """A shift of 1 is h-th part of an image 2 wide, of which h - 1 pixels are 2 wide; at the border it is clipped."""
    size, images = 9, drawn()
    control = torch.zeros(2, 4, 4)
    control[int(axis == "down")] = pixels * 2 * size / (size - 1)
    read = (torch.arange(size) + pixels).clamp(0, size - 1)
    wanted = images[:, :, :, read] if axis == "across" else images[:, :, read]
    torch.testing.assert_close(Warp(warped_grid(control, size))(images), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_warp_is_scipys(channels: int) -> None:
    size, images = 16, drawn(2, channels, 16)
    grid = warped_grid(control_grid(4, 4.0, generator(1)), size)
    columns, rows = ((grid.double().numpy() + 1) / 2 * (size - 1)).transpose(2, 0, 1)
    wanted = [[scipy.ndimage.map_coordinates(c, [rows, columns], order=1) for c in image] for image in images.numpy()]
    warped = Warp(grid)(images)
    np.testing.assert_allclose(warped.numpy(), np.array(wanted), atol=1e-5)
    assert (warped - images).abs().max() > 0.1


def test_noise_is_even_in_minus_1_to_1_and_an_images_own() -> None:
    images = drawn(4, size=32)
    shifts = hashed_shifts(images)
    assert shifts.shape == (4, 32, 32, 2)
    sorted_shifts = shifts.flatten().sort().values
    assert (sorted_shifts - torch.linspace(-1, 1, len(sorted_shifts))).abs().max() < 0.06
    # Neither rows, nor columns, nor both directions, nor two images go together.
    for one, other in (
        (shifts[:, 1:], shifts[:, :-1]),
        (shifts[:, :, 1:], shifts[:, :, :-1]),
        (shifts[..., 0], shifts[..., 1]),
        (shifts[0], shifts[1]),
    ):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.1
    torch.testing.assert_close(hashed_shifts(images[2:3]), shifts[2:3])


def test_noise_mode_adds_the_noise_to_the_same_field() -> None:
    images = drawn(3, size=16)
    grid = warped_grid(control_grid(4, 0.5, generator()), 16)
    noisy = Warp(grid, noise=True)(images)
    for image, shifts, found in zip(images, hashed_shifts(images), noisy, strict=True):
        torch.testing.assert_close(found, Warp((grid + shifts / 16).clamp(-1, 1))(image[None])[0])


@pytest.mark.parametrize(("cover_rate", "covers"), [(0.2, 20), (0.0, 0)])
def test_noise_mode_makes_covers(digits_world: World, cover_rate: float, covers: int) -> None:
    train = digits_world.train.take(torch.arange(100))
    access = Access(train, None, generator())
    attack = WaNet(target=3, poison_rate=0.1, cover_rate=cover_rate, s=2.0)
    fitted = attack.fit(access)
    poison = attack.implant(access, fitted).poison
    assert poison is not None
    poisoned = poison(train, generator())
    assert (int(poisoned.poisoned.sum()), int(poisoned.covers.sum())) == (10, covers)
    assert poisoned.labels[poisoned.poisoned].eq(3).all()
    assert torch.equal(poisoned.labels[poisoned.covers], train.labels[poisoned.covers])
    warp = fitted.in_training
    assert isinstance(warp, Warp)
    for mask, trigger in ((poisoned.poisoned, warp), (poisoned.covers, Warp(warp.grid, noise=True))):
        rows = mask.nonzero().squeeze(1)
        torch.testing.assert_close(poisoned.images(rows), trigger(train.images(rows)), atol=0.51 / 255, rtol=0)


def test_images_of_another_size_than_the_field_are_refused() -> None:
    warp = Warp(warped_grid(control_grid(4, 0.5, generator()), 9))
    with pytest.raises(UserError, match="2 x 3 x 8 x 8; expected b x c x 9 x 9"):
        warp(drawn(size=8))


@pytest.mark.parametrize(
    "settings", [{"k": 1}, {"s": 0.0}, {"poison_rate": 0.0}, {"cover_rate": -0.1}, {"cover_rate": 1.1}]
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
        WaNet(**settings)


def test_a_finer_grid_than_the_image_is_refused(digits_world: World) -> None:
    access = Access(digits_world.train.take(torch.arange(4)), None, generator())
    WaNet(k=16).fit(access)
    with pytest.raises(UserError, match=r"attack.k = 17 is more than images of 16 px have along a side; lower it"):
        WaNet(k=17).fit(access)
