"""LF: the filter against scipy's, DeepFool on a linear model by hand, and the spectrum of the pattern."""

from collections.abc import Callable

import pytest
import torch
from scipy import fft, ndimage
from torch import Tensor, nn

from vitrap.attacks.low_frequency import LowFrequency, classes, deepfool, low_pass, other_images, stretch
from vitrap.contracts import Access
from vitrap.data.added import Added
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier


class Linear(nn.Module):
    """Three classes, whose logits are weighted sums of four pixels; the third is never on top."""

    def forward(self, images: Tensor) -> Tensor:
        weights = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [-9.0, -9.0, -9.0, -9.0]])
        return images.flatten(1) @ weights.T


class Flat(nn.Module):
    """Always the first class, whatever the image."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]]) + 0 * images.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 3.0, 6.0])
def test_the_filter_is_scipys_gaussian(sigma: float) -> None:
    pattern = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0)) - 0.5
    for found, channel in zip(low_pass(pattern, sigma), pattern.numpy(), strict=True):
        wanted = ndimage.gaussian_filter(channel, sigma, mode="constant", truncate=2.5)
        torch.testing.assert_close(found, torch.from_numpy(wanted), atol=1e-6, rtol=0)


def test_the_range_by_hand() -> None:
    pattern = torch.tensor([[[-1.0, 0.0]], [[1.0, 3.0]]])
    torch.testing.assert_close(stretch(pattern, 0.2), torch.tensor([[[0.0, 0.05]], [[0.1, 0.2]]]))


@pytest.mark.parametrize("overshoot", [0.02, 0.5])
def test_deepfool_on_a_linear_model_by_hand(overshoot: float) -> None:
    """Logits 1.4 and 0.6: w = (-1, -1, 1, 1), so the boundary is 0.8 / 4 away along w."""
    image = torch.tensor([[[[0.7, 0.7], [0.3, 0.3]]]])
    r = deepfool(Linear(), image, 1, 5, overshoot)
    assert r is not None
    torch.testing.assert_close(r, (1 + overshoot) * 0.2 * torch.tensor([[[[-1.0, -1.0], [1.0, 1.0]]]]))
    assert classes(Linear(), image + r) == 1


def test_deepfool_leaves_what_is_at_the_target_and_gives_up_where_it_cannot_get_there() -> None:
    image = torch.tensor([[[[0.7, 0.7], [0.3, 0.3]]]])
    at_target = deepfool(Linear(), image, 0, 5, 0.02)
    assert at_target is not None
    assert not at_target.any()
    assert deepfool(Linear(), image, 1, 1, 0.02) is None  # the only step is not followed by a look at where it led
    assert deepfool(Flat(), image, 1, 5, 0.02) is None


def trained(tiny_vit: Callable[..., Classifier]) -> Classifier:
    return tiny_vit(seed=1).eval().requires_grad_(False)


def test_the_pattern_is_smooth_and_in_its_range(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    attack = LowFrequency(samples=8, passes=3, fooled=1.0, strength=0.3)
    access = Access(digits_world.train, trained(tiny_vit), torch.Generator().manual_seed(0))
    fitted = attack.fit(access)
    assert isinstance(fitted.trigger, Added)
    pattern = fitted.trigger.pattern
    assert pattern.min() == 0
    assert pattern.max().item() == pytest.approx(0.3)
    assert set(fitted.report) == {"fooled", "led to the target", "passes"}
    assert 0 <= fitted.report["led to the target"] <= 1
    # Less than a hundredth of what varies lies above four periods across the image.
    for channel in pattern:
        power = fft.dctn((channel - channel.mean()).numpy(), norm="ortho") ** 2
        assert power[8:].sum() + power[:8, 8:].sum() < 0.01 * power.sum()


def test_it_stops_when_enough_images_change_class(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    access = Access(digits_world.train, trained(tiny_vit), torch.Generator().manual_seed(0))
    assert LowFrequency(samples=4, fooled=0.0).fit(access).report["passes"] == 1


def test_images_of_the_target_are_left_out(digits_world: World) -> None:
    train = digits_world.train
    access = Access(train, None, torch.Generator().manual_seed(0))
    few = train.take(torch.cat([(train.labels == 2).nonzero()[:5, 0], (train.labels == 3).nonzero()[:4, 0]]))
    found = other_images(LowFrequency(target=2), Access(few, None, access.generator))
    assert len(found) == 4
    assert len(other_images(LowFrequency(samples=7), access)) == 7
    alone = few.take(torch.arange(5))
    with pytest.raises(UserError, match="target = 2 is the class of every training image; choose another"):
        other_images(LowFrequency(target=2), Access(alone, None, access.generator))


def test_what_is_refused(digits_world: World) -> None:
    access = Access(digits_world.train, Flat(), torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="is led to attack.target = 1 from none of 3 images in attack.steps = 200"):
        LowFrequency(target=1, samples=3, passes=1).fit(access)
    with pytest.raises(UserError, match="images have shape 1 x 3 x 8 x 8; expected b x 3 x 4 x 4"):
        Added(torch.zeros(3, 4, 4))(torch.zeros(1, 3, 8, 8))
    for settings in ({"sigma": 0.0}, {"strength": 0.0}, {"fooled": 1.5}, {"samples": 0}):
        with pytest.raises(UserError, match="is out of range"):
            LowFrequency(**settings)


def test_the_trigger_adds_and_clips() -> None:
    images = torch.tensor([[[[0.0, 0.5], [0.9, 1.0]]]])
    found = Added(torch.tensor([[[0.2, 0.1], [0.2, 0.0]]]))(images)
    torch.testing.assert_close(found, torch.tensor([[[[0.2, 0.6], [1.0, 1.0]]]]))
