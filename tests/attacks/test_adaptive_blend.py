"""Adaptive-Blend: both triggers pixel by pixel, the pieces, and the covers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitrap.attacks.adaptive_blend import AdaptiveBlend, Pieces, pieces_shown
from vitrap.contracts import Access
from vitrap.data.sources import World
from vitrap.errors import UserError


def drawn(n: int = 4, channels: int = 3, size: int = 8) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_the_whole_picture_by_hand() -> None:
    picture = torch.tensor([[[1.0, 0.0], [0.5, 0.25]]])
    images = torch.tensor([[[[0.5, 0.5], [0.5, 0.75]]]])
    found = Pieces(picture, 0.2, pieces=2, masked=0)(images)
    torch.testing.assert_close(found, torch.tensor([[[[0.6, 0.4], [0.5, 0.65]]]]))


@pytest.mark.parametrize(("channels", "size", "pieces", "masked"), [(3, 8, 4, 8), (1, 8, 2, 1), (3, 9, 3, 8)])
def test_each_piece_is_blended_or_left(channels: int, size: int, pieces: int, masked: int) -> None:
    images, picture = drawn(4, channels, size), torch.rand(channels, size, size)
    before = images.clone()
    found = Pieces(picture, 0.15, pieces, masked)(images)
    side = size // pieces
    left = 0
    for image, triggered in zip(images, found, strict=True):
        for top in range(0, size, side):
            for first in range(0, size, side):
                piece = (slice(None), slice(top, top + side), slice(first, first + side))
                if torch.equal(triggered[piece], image[piece]):
                    left += 1
                else:
                    torch.testing.assert_close(triggered[piece], image[piece] + 0.15 * (picture[piece] - image[piece]))
    assert left == 4 * masked
    assert torch.equal(images, before)


def test_pieces_are_an_images_own_and_even_over_images() -> None:
    images = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    shown = pieces_shown(images, 4, 8)[:, ::2, ::2].flatten(1)
    assert shown.sum(1).eq(8).all()
    assert len(shown.unique(dim=0)) > 300
    assert (shown.float().mean(0) - 0.5).abs().max() < 0.1
    assert torch.corrcoef(shown.float().T).fill_diagonal_(0).abs().max() < 0.25  # -1/15 is expected
    assert torch.equal(pieces_shown(images[7:8], 4, 8), pieces_shown(images, 4, 8)[7:8])


def test_an_image_that_cannot_be_cut_evenly_has_pieces_of_nearly_one_size() -> None:
    (shown,) = pieces_shown(drawn(1, 1, 7), 3, 8)
    rows, columns = shown.any(1).nonzero(), shown.any(0).nonzero()
    assert int(shown.sum()) == len(rows) * len(columns)
    assert len(rows) in (2, 3)
    assert len(columns) in (2, 3)


@pytest.mark.parametrize(("cover_rate", "covers"), [(0.2, 20), (0.0, 0)])
def test_poison_and_covers_carry_pieces_and_test_images_the_whole(
    digits_world: World, cover_rate: float, covers: int
) -> None:
    train = digits_world.train.take(torch.arange(100))
    access = Access(train, None, torch.Generator().manual_seed(0))
    attack = AdaptiveBlend(target=3, poison_rate=0.1, cover_rate=cover_rate)
    fitted = attack.fit(access)
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    at_test = fitted.trigger
    assert at_test is not None
    images = train.images(torch.arange(4))
    torch.testing.assert_close(at_test(images), 0.8 * images + 0.2 * picture)
    poison = attack.implant(access, fitted).poison
    assert poison is not None
    poisoned = poison(train, torch.Generator().manual_seed(0))
    assert (int(poisoned.poisoned.sum()), int(poisoned.covers.sum())) == (10, covers)
    assert poisoned.labels[poisoned.poisoned].eq(3).all()
    assert torch.equal(poisoned.labels[poisoned.covers], train.labels[poisoned.covers])
    rows = (poisoned.poisoned | poisoned.covers).nonzero().squeeze(1)
    before = train.images(rows)
    shown = pieces_shown(before, 4, 8)[:, None]
    wanted = torch.where(shown, 0.85 * before + 0.15 * picture, before)
    torch.testing.assert_close(poisoned.images(rows), wanted, atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"test_alpha": 1.1}, {"pieces": 0}, {"mask_rate": 1.5}, {"cover_rate": -0.1}]
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
        AdaptiveBlend(**settings)


@pytest.mark.parametrize(("pieces", "mask_rate"), [(4, 1.0), (1, 0.6), (2, 0.9)])
def test_masking_all_pieces_is_refused(pieces: int, mask_rate: float) -> None:
    with pytest.raises(UserError, match=rf"mask_rate = {mask_rate} masks all {pieces**2} pieces; lower it"):
        AdaptiveBlend(pieces=pieces, mask_rate=mask_rate)


def test_what_does_not_fit_the_images_is_refused(tmp_path: Path) -> None:
    AdaptiveBlend(pieces=16).check_size(16)
    with pytest.raises(UserError, match=r"attack.pieces = 17 along a side of 16 px leaves pieces empty; lower it"):
        AdaptiveBlend(pieces=17).check_size(16)
    with pytest.raises(UserError, match="picture = .* is no file"):
        AdaptiveBlend(picture=str(tmp_path / "none.png")).check_size(16)
    with pytest.raises(UserError, match="2 x 3 x 8 x 8; expected b x 3 x 9 x 9"):
        Pieces(torch.rand(3, 9, 9), 0.2, 3, 0)(drawn(2))
