"""BppAttack: quantiser and Floyd-Steinberg by hand and against a plain loop, and the negatives."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrap.attacks.bpp import Bpp, Negatives, Quantisation, dither, quantise
from vitrap.contracts import Access, ImageSet
from vitrap.data.sources import World
from vitrap.errors import UserError


def drawn(n: int = 3, channels: int = 3, height: int = 6, width: int = 7) -> Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("n", "values", "wanted"),
    [
        (2, [0.0, 0.49, 0.51, 1.0], [0, 0, 1, 1]),
        (3, [0.0, 0.24, 0.26, 0.74, 0.76, 1.0], [0, 0, 0.5, 0.5, 1, 1]),
        (8, [18 / 255, 19 / 255, 54 / 255, 55 / 255, 0.99], [0, 1 / 7, 1 / 7, 2 / 7, 1]),
    ],
)
def test_the_quantiser_by_hand(n: int, values: list[float], wanted: list[float]) -> None:
    images = torch.tensor(values).view(1, 1, 1, -1)
    found = Quantisation(n, dithering=False)(images)
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=torch.float32))


def test_dithering_by_hand() -> None:
    """0.6 becomes 1; of its error -0.4, 7/16 go right, 5/16 below and 1/16 below right, and so on.

    The second pixel is then 0.2 - 0.175 = 0.025; the third, below the first, 0.4 - 0.125 + 3/16 of 0.025 = 0.2797; the
    last 0.7 - 0.025 + 5/16 of 0.025 + 7/16 of 0.2797 = 0.8052.
    """
    image = torch.tensor([[0.6, 0.2], [0.4, 0.7]])
    found = dither(image.view(1, 1, 2, 2), 2)
    assert found.flatten().tolist() == [1, 0, 0, 1]
    image[1, 1] = 0.39  # 0.31 less: 0.4952; without the errors of all three neighbours it would round otherwise
    assert dither(image.view(1, 1, 2, 2), 2).flatten().tolist() == [1, 0, 0, 0]
    image[1, 1] = 0.4  # 0.5052
    assert dither(image.view(1, 1, 2, 2), 2).flatten().tolist() == [1, 0, 0, 1]


def plainly_dithered(image: np.ndarray, n: int) -> np.ndarray:
    """Floyd and Steinberg's error diffusion, one channel, pixel by pixel."""
    image = image.astype(np.float64)
    height, width = image.shape
    for y in range(height):
        for x in range(width):
            old = image[y, x]
            image[y, x] = np.round(old * (n - 1)) / (n - 1)
            error = old - image[y, x]
            if x + 1 < width:
                image[y, x + 1] += error * 7 / 16
            if y + 1 < height:
                if x > 0:
                    image[y + 1, x - 1] += error * 3 / 16
                image[y + 1, x] += error * 5 / 16
                if x + 1 < width:
                    image[y + 1, x + 1] += error * 1 / 16
    return image.clip(0, 1)


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 6, 7), (1, 5, 1), (1, 1, 5)])
def test_dithering_is_that_of_a_plain_loop(n: int, channels: int, height: int, width: int) -> None:
    images = drawn(3, channels, height, width)
    before = images.clone()
    found = Quantisation(n, dithering=True)(images)
    wanted = [[plainly_dithered(channel, n) for channel in image] for image in images.numpy()]
    np.testing.assert_allclose(found.numpy(), np.array(wanted), atol=1e-5)
    assert torch.equal(images, before)


@pytest.mark.parametrize("grey", [0.1, 0.3, 0.45])
def test_dithering_keeps_the_mean_where_quantising_does_not(grey: float) -> None:
    image = torch.full((1, 1, 24, 24), grey)
    assert dither(image, 2).mean().item() == pytest.approx(grey, abs=0.02)
    assert quantise(image, 2).mean() == 0


def test_a_negative_has_the_residual_of_another_image() -> None:
    donor = ImageSet.of(torch.full((1, 1, 2, 2), 100, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 2)
    negatives = Negatives(Quantisation(8, dithering=False), donor)
    # The nearest of 8 values to 100 is 3/7, which is 109.2857 of 255: a residual of 9.2857.
    found = negatives(torch.tensor([[[[0.0, 50.0], [200.0, 250.0]]]]) / 255)
    wanted = torch.tensor([[[[9.2857, 59.2857], [209.2857, 255.0]]]]) / 255
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("cover_rate", "covers"), [(0.3, 30), (0.0, 0)])
def test_negatives_are_covers(digits_world: World, cover_rate: float, covers: int) -> None:
    train = digits_world.train.take(torch.arange(100))
    access = Access(train, None, torch.Generator().manual_seed(0))
    attack = Bpp(target=3, poison_rate=0.1, cover_rate=cover_rate)
    poison = attack.implant(access, attack.fit(access)).poison
    assert poison is not None
    poisoned = poison(train, torch.Generator().manual_seed(0))
    assert (int(poisoned.poisoned.sum()), int(poisoned.covers.sum())) == (10, covers)
    assert poisoned.labels[poisoned.poisoned].eq(3).all()
    assert torch.equal(poisoned.labels[poisoned.covers], train.labels[poisoned.covers])

    def off_the_values(mask: Tensor) -> Tensor:
        images = poisoned.images(mask.nonzero().squeeze(1))
        return (images - quantise(images, 8)).abs() > 0.51 / 255

    assert not off_the_values(poisoned.poisoned).any()
    if covers:
        # A negative differs from its image by a residual: by at most half of the distance between two values.
        rows = poisoned.covers.nonzero().squeeze(1)
        change = (poisoned.images(rows) - train.images(rows)).abs()
        assert change.flatten(1).amax(1).gt(2 / 255).all()
        assert change.max() <= 0.5 / 7 + 1 / 255
        assert off_the_values(poisoned.covers).any()


@pytest.mark.parametrize(
    "settings", [{"squeeze_num": 1}, {"squeeze_num": 129}, {"poison_rate": 0.0}, {"cover_rate": 1.5}]
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
        Bpp(**settings)
