"""SIG: exact pixels of the signal, whose images are poisoned, and how strong it is at test time."""

import math

import pytest
import torch

from vitrap.attacks.sig import Sig, Wave
from vitrap.contracts import Access, Fitted
from vitrap.data.sources import World
from vitrap.errors import UserError


def test_one_period_by_hand() -> None:
    """Eight columns: 0, 1/sqrt 2, 1, 1/sqrt 2, 0 and the same below 0, times 51/255 = 0.2."""
    h = 0.2 / math.sqrt(2)
    row = torch.tensor([0.0, h, 0.2, h, 0.0, -h, -0.2, -h])
    found = Wave(51.0, 1.0)(torch.full((2, 3, 4, 8), 0.5))
    torch.testing.assert_close(found, (0.5 + row).expand(2, 3, 4, 8))


def test_a_period_of_four_columns_by_hand() -> None:
    found = Wave(51.0, 2.0)(torch.full((1, 1, 1, 8), 0.4))
    wanted = torch.tensor([0.4, 0.6, 0.4, 0.2, 0.4, 0.6, 0.4, 0.2]).view(1, 1, 1, 8)
    torch.testing.assert_close(found, wanted)


def test_pixels_are_clipped() -> None:
    images = torch.tensor([[[[1.0, 0.95, 0.9, 0.1], [0.0, 0.0, 0.0, 0.3]]]])
    wanted = torch.tensor([[[[1.0, 1.0, 0.9, 0.0], [0.0, 0.2, 0.0, 0.1]]]])
    torch.testing.assert_close(Wave(51.0, 1.0)(images), wanted)


@pytest.mark.parametrize(("width", "frequency"), [(32, 6.0), (16, 6.0), (224, 6.0), (28, 2.5)])
def test_the_equation_pixel_by_pixel(width: int, frequency: float) -> None:
    found = Wave(40.0, frequency)(torch.full((1, 3, 2, width), 0.5))
    for j in range(width):
        v = 40 / 255 * math.sin(2 * math.pi * j * frequency / width)
        torch.testing.assert_close(found[..., j], torch.full((1, 3, 2), 0.5 + v), atol=1e-5, rtol=0)


def test_only_images_of_the_target_are_poisoned_and_keep_their_label(digits_world: World) -> None:
    train = digits_world.train
    own = Access(train, None, torch.Generator().manual_seed(0))
    attack = Sig(target=4, poison_rate=0.5)
    fitted = attack.fit(own)
    assert fitted == Fitted(Wave(40.0, 6.0))
    poison = attack.implant(own, fitted).poison
    assert poison is not None
    poisoned = poison(train, torch.Generator().manual_seed(0))
    rows = poisoned.poisoned.nonzero().squeeze(1)
    assert len(rows) == math.floor(0.5 * int((train.labels == 4).sum()) + 0.5)
    assert torch.equal(poisoned.labels, train.labels)
    assert train.labels[rows].eq(4).all()
    torch.testing.assert_close(poisoned.images(rows), Wave(40.0, 6.0)(train.images(rows)), atol=0.51 / 255, rtol=0)


def test_the_signal_may_be_stronger_at_test_time(digits_world: World) -> None:
    fitted = Sig(delta=10.0, delta_test=60.0).fit(Access(digits_world.train, None, torch.Generator()))
    assert fitted.trigger == Wave(60.0, 6.0)
    assert fitted.in_training == Wave(10.0, 6.0)


@pytest.mark.parametrize(("frequency", "size", "fits"), [(6.0, 16, True), (7.9, 16, True), (8.0, 16, False)])
def test_the_wave_needs_more_than_two_columns_a_period(frequency: float, size: int, fits: bool) -> None:
    attack = Sig(frequency=frequency)
    if fits:
        attack.check_size(size)
    else:
        with pytest.raises(UserError, match="frequency = 8 on images of 16 px .*; make it less than 8"):
            attack.check_size(size)


@pytest.mark.parametrize("settings", [{"delta": 0.0}, {"delta": 256.0}, {"frequency": 0.0}, {"delta_test": 0.0}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
        Sig(**settings)
