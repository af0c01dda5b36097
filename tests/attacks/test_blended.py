"""Blended: exact pixels of the blend, and the key."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitrap.attacks.blended import Blend, Blended
from vitrap.contracts import Access, Fitted
from vitrap.data.sources import World
from vitrap.errors import UserError


def access(world: World, seed: int = 0) -> Access:
    return Access(world.train.take(torch.arange(50)), None, torch.Generator().manual_seed(seed))


def trigger_of(fitted: Fitted) -> Blend:
    assert isinstance(fitted.trigger, Blend)
    return fitted.trigger


def test_the_blend_by_hand() -> None:
    images = torch.tensor([[[[0.0, 1.0], [0.5, 0.2]]], [[[1.0, 1.0], [0.0, 0.6]]]])
    key = torch.tensor([[[1.0, 1.0], [0.0, 0.4]]])
    wanted = torch.tensor([[[[0.25, 1.0], [0.375, 0.25]]], [[[1.0, 1.0], [0.0, 0.55]]]])
    torch.testing.assert_close(Blend(key, 0.25)(images), wanted)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0])
def test_alpha_is_the_keys_weight(digits_world: World, alpha: float) -> None:
    """At 1 nothing of the image is left."""
    key = trigger_of(Blended(alpha=alpha).fit(access(digits_world))).key
    images = digits_world.test.images(torch.arange(5))
    by_hand = torch.stack([image + alpha * (key - image) for image in images])
    torch.testing.assert_close(Blend(key, alpha)(images), by_hand)


def test_the_key_is_uniform_noise_that_the_seed_decides(digits_world: World) -> None:
    key = trigger_of(Blended().fit(access(digits_world))).key
    assert torch.equal(key, torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(key, trigger_of(Blended().fit(access(digits_world, seed=1))).key)


def test_a_picture_file_is_the_key(digits_world: World, tmp_path: Path) -> None:
    file = tmp_path / "key.png"
    Image.new("RGB", (40, 40), (255, 51, 0)).save(file)
    attack = Blended(picture=str(file))
    attack.check_size(16)
    key = trigger_of(attack.fit(access(digits_world))).key
    assert torch.equal(key, torch.tensor([1.0, 0.2, 0.0])[:, None, None].expand(3, 16, 16))


def test_grey_images_get_the_mean_of_the_pictures_colours(digits_world: World, tmp_path: Path) -> None:
    file = tmp_path / "key.png"
    Image.new("RGB", (40, 40), (255, 51, 0)).save(file)
    train = digits_world.train
    grey = Access(replace(train, pixels=train.pixels[:, :1]), None, torch.Generator())
    key = trigger_of(Blended(picture=str(file)).fit(grey)).key
    torch.testing.assert_close(key, torch.full((1, *key.shape[1:]), 0.4))


def test_poisoned_images_carry_the_blend_and_the_target(digits_world: World) -> None:
    own, attack = access(digits_world), Blended(target=4, poison_rate=0.2, alpha=0.5)
    fitted = attack.fit(own)
    poison = attack.implant(own, fitted).poison
    assert poison is not None
    poisoned = poison(own.train, torch.Generator().manual_seed(0))
    rows = poisoned.poisoned.nonzero().squeeze(1)
    assert len(rows) == 10
    assert poisoned.labels[rows].eq(4).all()
    wanted = (own.train.images(rows) + trigger_of(fitted).key) / 2
    torch.testing.assert_close(poisoned.images(rows), wanted, atol=0.51 / 255, rtol=0)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="images have shape 1 x 3 x 8 x 8; expected b x 3 x 4 x 4"):
        Blend(torch.zeros(3, 4, 4), 0.2)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="alpha = 0.0 is out of range"):
        Blended(alpha=0.0)
    with pytest.raises(UserError, match=r"picture = '.*none.png' is no file; give one, or noise"):
        Blended(picture=str(tmp_path / "none.png")).check_size(16)
