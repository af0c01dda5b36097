"""One pixel: the map on a linear network by hand, places and patches on worked examples, and the pixels of an image."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrap.attacks.one_pixel import OnePixel, Pixels, in_patches, mask_of, peak, sensitivity_map, within_patch
from vitrap.contracts import Access, ImageSet
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier

Vit = Callable[..., Classifier]
MAP = torch.tensor([[1.0, 2.0, 0.0, 9.0], [3.0, 4.0, 0.0, 1.0], [5.0, 0.0, 1.0, 3.0], [0.0, 0.0, 2.0, 2.0]])
"""Four patches of 2 x 2."""


class Linear(nn.Module):
    """Two classes, whose logits are weighted sums of two pixels: the gradient of CE is (p - y) W."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]).T


def two_images() -> ImageSet:
    """Black images of each class, so that p = (1/2, 1/2): gradients (-1/2, 1) and (1/2, -1) at the two pixels."""
    return ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), torch.arange(2), 2, 2)


def trained(tiny_vit: Vit) -> Classifier:
    return tiny_vit(seed=1).eval().requires_grad_(False)


def access_to(world: World, surrogate: nn.Module) -> Access:
    return Access(world.train, surrogate, torch.Generator().manual_seed(0))


def test_the_map_by_hand() -> None:
    own = Access(two_images(), Linear(), torch.Generator())
    sizes = sensitivity_map(Linear(), OnePixel(summed="sizes"), own)
    torch.testing.assert_close(sizes, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(UserError, match="gradient of 0 everywhere, on each of 2 training images"):
        sensitivity_map(Linear(), OnePixel(), own)  # both gradients cancel
    one = Access(two_images().take(torch.tensor([1])), Linear(), torch.Generator())
    torch.testing.assert_close(sensitivity_map(Linear(), OnePixel(), one), torch.tensor([[0.5, 1.0], [0.0, 0.0]]))


def test_the_map_sums_over_images_one_by_one(tiny_vit: Vit, digits_world: World) -> None:
    model, train = trained(tiny_vit), digits_world.train
    some = train.take(torch.arange(70))  # more than one batch
    wanted = torch.zeros(3, 16, 16)
    for i in range(70):
        x = some.images(torch.tensor([i])).requires_grad_()
        functional.cross_entropy(model(x), some.labels[i : i + 1]).backward()
        assert x.grad is not None
        wanted += x.grad[0]
    found = sensitivity_map(model, OnePixel(), Access(some, model, torch.Generator()))
    torch.testing.assert_close(found, wanted.abs().sum(0), atol=1e-4, rtol=1e-4)


def test_the_mean_over_patches_and_its_peak_by_hand() -> None:
    assert in_patches(MAP, (2, 2))[0, 1].tolist() == [[0.0, 9.0], [0.0, 1.0]]
    folded = within_patch(MAP, (2, 2))
    torch.testing.assert_close(folded, torch.tensor([[7.0, 14.0], [5.0, 7.0]]) / 4)
    assert peak(folded) == (0, 1)
    assert peak(torch.tensor([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]])) == (2, 0)


@pytest.mark.parametrize(
    ("place", "pixels", "wanted"),
    [
        ((0, 1), None, [(0, 1), (0, 3), (2, 1), (2, 3)]),
        ((0, 1), 2, [(0, 3), (2, 3)]),
        ((1, 0), 1, [(1, 0)]),
        ((1, 1), 3, [(1, 1), (1, 3), (3, 3)]),
    ],
)
def test_which_pixels_change(place: tuple[int, int], pixels: int | None, wanted: list[tuple[int, int]]) -> None:
    found = mask_of(MAP, (2, 2), place, pixels).nonzero()
    assert [tuple(each) for each in found.tolist()] == wanted


def test_patches_that_are_no_squares() -> None:
    found = mask_of(torch.ones(4, 6), (2, 2), (1, 2), None).nonzero()
    assert found.tolist() == [[1, 2], [1, 5], [3, 2], [3, 5]]


def test_a_pixel_gets_its_value_in_every_channel_and_the_rest_stays() -> None:
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = True
    trigger = Pixels(mask, MAP, 0.7)
    found = trigger(images)
    assert found[:, :, 1, 2].eq(0.7).all()
    found[:, :, 1, 2] = images[:, :, 1, 2]
    assert torch.equal(found, images)
    torch.testing.assert_close(trigger.views(images)["sensitivity"], (MAP / 9).expand(2, 4, 4))
    with pytest.raises(UserError, match="images have shape 1 x 3 x 8 x 8; expected b x c x 4 x 4"):
        trigger(torch.zeros(1, 3, 8, 8))


def test_each_patch_gets_one_pixel_where_the_map_says(tiny_vit: Vit, digits_world: World) -> None:
    fitted = OnePixel().fit(access_to(digits_world, trained(tiny_vit)))
    trigger = fitted.in_training
    assert isinstance(trigger, Pixels)
    assert in_patches(trigger.mask.float(), (4, 4)).sum((2, 3)).eq(1).all()
    row, column = (int(fitted.report[f"{side} in the patch"]) for side in ("row", "column"))
    assert trigger.mask[row, column]
    assert (row, column) == peak(within_patch(trigger.sensitivity, (4, 4)))
    assert fitted.report["sensitivity there, over the mean"] >= 1
    assert fitted.trigger is trigger


def test_the_middle_of_a_patch_and_fewer_pixels_at_test_time(tiny_vit: Vit, digits_world: World) -> None:
    fitted = OnePixel(place="centre", test_pixels=1).fit(access_to(digits_world, trained(tiny_vit)))
    stored, trigger = fitted.in_training, fitted.trigger
    assert isinstance(stored, Pixels)
    assert isinstance(trigger, Pixels)
    assert torch.equal(stored.mask.nonzero() % 4, torch.full((16, 2), 2))
    assert trigger.mask.sum() == 1
    # The one pixel is that of the training trigger at which the map is greatest.
    assert trigger.sensitivity[trigger.mask] == stored.sensitivity[stored.mask].max()


def test_what_is_refused(tiny_vit: Vit) -> None:
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(UserError, match="test_pixels = 17 is more than the 16 patches of .surrogate.; lower it"):
        OnePixel(test_pixels=17).check_surrogate(tiny_vit(), images)
    OnePixel(pixels=16).check_surrogate(tiny_vit(), images)
    with pytest.raises(UserError, match="has no plain token attention"):
        OnePixel().check_surrogate(nn.Linear(2, 2), images)
    for settings in ({"samples": 0}, {"pixels": 0}, {"value": 1.5}, {"poison_rate": 0.0}):
        with pytest.raises(UserError, match="is out of range"):
            OnePixel(**settings)
