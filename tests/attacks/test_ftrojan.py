"""FTrojan: the paper's five steps, done one after the other with scipy's DCT, against the one pattern."""

import numpy as np
import pytest
import torch
from scipy import fft
from torch import Tensor

from vitrap.attacks.ftrojan import FTrojan, dct_matrix, yuv_to_rgb
from vitrap.contracts import Access
from vitrap.data.added import Added
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.images import ImageSet

TO_YUV = np.array(
    [
        [0.299, 0.587, 0.114],
        [0.713 * 0.701, -0.713 * 0.587, -0.713 * 0.114],
        [-0.564 * 0.299, -0.564 * 0.587, 0.564 * 0.886],
    ]
)
"""Rows Y, U = 0.713 (R - Y) and V = 0.564 (B - Y), in the primaries."""


def grey_world(size: int, channels: int = 3) -> Access:
    """Four images of middle grey, so that nothing is clipped."""
    pixels = torch.full((4, channels, size, size), 128, dtype=torch.uint8)
    labels = torch.arange(4)
    return Access(ImageSet(pixels, labels, labels, 4, size), None, torch.Generator())


def pattern_of(attack: FTrojan, access: Access) -> Tensor:
    trigger = attack.fit(access).trigger
    assert isinstance(trigger, Added)
    return trigger.pattern


def step_by_step(image: Tensor, window: int, places: list[int], channels: list[int], magnitude: float) -> Tensor:
    """Steps 1 to 5 in numpy, without clipping, for an image in [0, 1]."""
    yuv = np.einsum("dc,chw->dhw", TO_YUV, 255 * image.double().numpy())
    for channel in channels:
        for top in range(0, yuv.shape[1], window):
            for left in range(0, yuv.shape[2], window):
                block = yuv[channel, top : top + window, left : left + window]
                coefficients = fft.dctn(block, norm="ortho")
                for k in places:
                    coefficients[k, k] += magnitude
                block[:] = fft.idctn(coefficients, norm="ortho")
    return torch.from_numpy(np.einsum("cd,dhw->chw", np.linalg.inv(TO_YUV), yuv) / 255).float()


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_the_transform_is_scipys(n: int) -> None:
    block = torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    transform = dct_matrix(n)
    coefficients = transform @ block @ transform.T
    torch.testing.assert_close(coefficients, torch.from_numpy(fft.dctn(block.numpy(), norm="ortho")), atol=1e-5, rtol=0)
    torch.testing.assert_close(transform.T @ coefficients @ transform, block, atol=1e-5, rtol=0)


def test_the_colours_by_hand() -> None:
    """Y = 0.5 is grey; U = 0.0713 is 0.1 of red, which green makes up for, so that Y stays."""
    flat = torch.ones(1, 1)
    torch.testing.assert_close(yuv_to_rgb(0.5 * flat, 0 * flat, 0 * flat), torch.full((3, 1, 1), 0.5))
    found = yuv_to_rgb(0 * flat, 0.0713 * flat, 0 * flat).flatten()
    torch.testing.assert_close(found, torch.tensor([0.1, -0.0299 / 0.587, 0.0]))
    found = yuv_to_rgb(0 * flat, 0 * flat, 0.0564 * flat).flatten()
    torch.testing.assert_close(found, torch.tensor([0.0, -0.0114 / 0.587, 0.1]))


@pytest.mark.parametrize(
    ("settings", "size", "window", "places"),
    [
        ({}, 32, 32, [15, 31]),
        ({}, 64, 32, [15, 31]),
        ({}, 16, 16, [7, 15]),
        ({}, 28, 28, [13, 27]),
        ({"channels": "yuv", "magnitude": 50.0}, 32, 32, [15, 31]),
        ({"window": 8, "middle": 2, "high": 6}, 24, 8, [2, 6]),
        ({"middle": 0, "high": 0}, 16, 16, [0, 0]),
    ],
)
def test_the_pattern_is_the_five_steps(settings: dict[str, object], size: int, window: int, places: list[int]) -> None:
    attack = FTrojan(**settings)  # pyright: ignore[reportArgumentType]
    images = 0.3 + 0.4 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = Added(pattern_of(attack, grey_world(size)))(images)
    channels = [0, 1, 2] if attack.channels == "yuv" else [1, 2]
    wanted = torch.stack([step_by_step(x, window, places, channels, attack.magnitude) for x in images])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_the_brightness_stays() -> None:
    pattern = pattern_of(FTrojan(), grey_world(32))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert (weights * pattern).sum(0).abs().max() < 1e-6
    assert pattern.abs().max() > 4 / 255


def test_pixels_are_clipped() -> None:
    ends = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 32, 32)
    found = Added(pattern_of(FTrojan(), grey_world(32)))(ends)
    assert found.min() == 0
    assert found.max() == 1


def test_poison_is_relabelled(digits_world: World) -> None:
    own = Access(digits_world.train.take(torch.arange(100)), None, torch.Generator())
    attack = FTrojan(target=6)
    fitted = attack.fit(own)
    poison = attack.implant(own, fitted).poison
    assert poison is not None
    poisoned = poison(own.train, torch.Generator().manual_seed(0))
    rows = poisoned.poisoned.nonzero().squeeze(1)
    assert len(rows) == 5
    assert poisoned.labels[rows].eq(6).all()
    wanted = fitted.in_training(own.train.images(rows))
    torch.testing.assert_close(poisoned.images(rows), wanted, atol=0.51 / 255, rtol=0)


def test_grey_images_have_brightness_alone() -> None:
    with pytest.raises(UserError, match="channels = 'uv' are colours, and the images are grey; set it to 'yuv'"):
        FTrojan().fit(grey_world(32, channels=1))
    pattern = pattern_of(FTrojan(channels="yuv"), grey_world(32, channels=1))
    coefficients = fft.dctn(255 * pattern[0].numpy(), norm="ortho")
    wanted = np.zeros((32, 32))
    wanted[15, 15] = wanted[31, 31] = 30
    np.testing.assert_allclose(coefficients, wanted, atol=1e-3)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="window = 32 does not tile images of 48 px; choose a divisor of 48"):
        FTrojan().check_size(48)
    for size in (1, 16, 32, 224):
        FTrojan().check_size(size)
    with pytest.raises(UserError, match="window = 16 has the frequencies 0 to 15, and 31 is not among them"):
        FTrojan(window=16)
    with pytest.raises(UserError, match="images have shape 1 x 3 x 8 x 8; expected b x 3 x 4 x 4"):
        Added(torch.zeros(3, 4, 4))(torch.zeros(1, 3, 8, 8))
