"""Label-consistent: PGD's step and projection by hand, the trigger's pixels, and what is poisoned."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vitrap.attacks.label_consistent import LabelConsistent, Norm, ascent, corner_pattern, pgd, project, radius
from vitrap.contracts import Access, Crafted
from vitrap.data.added import Added
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.tensors.pixels import to_bytes


class Linear(nn.Module):
    """Two classes of images with four pixels; the first one's logit is w x, the second one's 0."""

    def forward(self, images: Tensor) -> Tensor:
        first = images.flatten(1) @ torch.tensor([3.0, 4.0, 0.0, -12.0])
        return torch.stack([first, torch.zeros_like(first)], 1)


def image(*pixels: float) -> Tensor:
    return torch.tensor(pixels).view(1, 1, 2, 2)


def test_the_projection_in_linf_by_hand() -> None:
    """At most 0.1 from the image and within [0, 1], value by value."""
    found = project(image(0.75, 0.52, 0.3, 1.4), image(0.5, 0.5, 0.5, 0.95), 0.1, "linf")
    torch.testing.assert_close(found, image(0.6, 0.52, 0.4, 1.0))


def test_the_projection_in_l2_by_hand() -> None:
    """A change of (0.3, -0.4, 0, 0) has length 0.5: half of it remains, or all where the ball is larger."""
    x, centre = image(0.8, 0.1, 0.5, 0.5), image(0.5, 0.5, 0.5, 0.5)
    torch.testing.assert_close(project(x, centre, 0.25, "l2"), image(0.65, 0.3, 0.5, 0.5))
    torch.testing.assert_close(project(x, centre, 0.6, "l2"), x)
    torch.testing.assert_close(project(centre, centre, 0.6, "l2"), centre)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_projection_is_the_nearest_point_of_the_ball(norm: Norm) -> None:
    """No other point of the ball is nearer; where [0, 1] clips, the result stays within the ball."""
    draw = torch.Generator().manual_seed(0)
    centre = torch.rand(5, 3, 4, 4, generator=draw) * 0.2 + 0.4
    x = centre + 0.1 * torch.randn(5, 3, 4, 4, generator=draw)
    found = project(x, centre, 0.15, norm)
    for _ in range(200):
        other = torch.randn(5, 3, 4, 4, generator=draw)
        size = other.abs().amax((1, 2, 3), True) if norm == "linf" else other.square().sum((1, 2, 3), True).sqrt()
        other = centre + 0.15 * other / size
        assert ((x - other).square().sum((1, 2, 3)) >= (x - found).square().sum((1, 2, 3)) - 1e-6).all()
    edge = torch.rand(5, 3, 4, 4, generator=draw).round()
    change = project(edge + 3 * torch.randn(5, 3, 4, 4, generator=draw), edge, 0.15, norm) - edge
    size = change.abs().amax((1, 2, 3)) if norm == "linf" else change.square().sum((1, 2, 3)).sqrt()
    assert (size <= 0.15 + 1e-6).all()


def test_the_directions_by_hand() -> None:
    gradient = image(-3.0, 0.0, 4.0, 0.0)
    torch.testing.assert_close(ascent(gradient, "linf"), image(-1.0, 0.0, 1.0, 0.0))
    torch.testing.assert_close(ascent(gradient, "l2"), image(-0.6, 0.0, 0.8, 0.0))
    assert not ascent(torch.zeros(1, 1, 2, 2), "l2").any()


def test_a_step_on_a_linear_model_by_hand() -> None:
    """The loss of class 0 rises along -w = (-3, -4, 0, 12), whose length is 13."""
    grey = image(0.5, 0.5, 0.5, 0.5)
    found = pgd(LabelConsistent(eps=51.0, steps=1, step=0.5), Linear(), grey)
    torch.testing.assert_close(found, image(0.4, 0.4, 0.5, 0.6))
    settings = LabelConsistent(norm="l2", eps=255 * 0.65, steps=1, step=1.0)
    length = 0.65 * math.sqrt(4 / 3072)
    found = pgd(settings, Linear(), grey)
    torch.testing.assert_close(found, 0.5 + length / 13 * image(-3.0, -4.0, 0.0, 12.0))


@pytest.mark.parametrize(("steps", "wanted"), [(0, 0.5), (2, 0.4), (9, 0.3)])
def test_steps_end_on_the_ball(steps: int, wanted: float) -> None:
    settings = LabelConsistent(eps=51.0, steps=steps, step=0.25)
    found = pgd(settings, Linear(), image(0.5, 0.5, 0.5, 0.5))
    assert found[0, 0, 0, 0].item() == pytest.approx(wanted)


def test_the_radius_in_l2_grows_with_the_image() -> None:
    settings = LabelConsistent(norm="l2")
    assert settings.eps == 300.0
    assert radius(settings, torch.zeros(2, 3, 32, 32)) == pytest.approx(300 / 255)
    assert radius(settings, torch.zeros(2, 3, 64, 64)) == pytest.approx(600 / 255)
    assert radius(LabelConsistent(), torch.zeros(2, 3, 64, 64)) == pytest.approx(8 / 255)


def test_the_trigger_pixel_by_pixel() -> None:
    """Black and white in the corner, all else as it was; in all corners it is its own mirror image."""
    grey = torch.full((1, 3, 7, 7), 0.5)
    found = Added(corner_pattern(LabelConsistent(), (3, 7, 7)))(grey)
    corner = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert torch.equal(found[0, :, 4:, 4:], corner.expand(3, 3, 3))
    assert (found == 0.5).sum() == 3 * (49 - 9)
    everywhere = Added(corner_pattern(LabelConsistent(corners="all-corners", amplitude=0.25), (3, 7, 7)))(grey)
    faint = torch.where(corner.bool(), 0.75, 0.25).expand(3, 3, 3)
    assert torch.equal(everywhere[0, :, :3, 4:], faint)
    assert torch.equal(everywhere[0, :, 4:, 4:], faint)
    assert torch.equal(everywhere, everywhere.flip(3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_of_the_target_become_hard_and_keep_their_label(
    norm: Norm, tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    train = digits_world.train
    surrogate = tiny_vit(seed=1).eval().requires_grad_(False)
    target = int(surrogate(train.images(torch.arange(200))).argmax(1).mode().values)
    attack = LabelConsistent(target=target, poison_rate=0.5, norm=norm, eps=64.0 if norm == "linf" else 3000.0, steps=5)
    access = Access(train, surrogate, torch.Generator().manual_seed(0))
    fitted = attack.fit(access)
    crafted = fitted.stored
    assert isinstance(crafted, Crafted)
    assert len(crafted.rows) == math.floor(0.5 * int((train.labels == target).sum()) + 0.5)
    assert train.labels[crafted.rows].eq(target).all()
    assert fitted.report["surrogate's accuracy after"] <= fitted.report["surrogate's accuracy before"] - 0.1
    poison = attack.implant(access, fitted).poison
    assert poison is not None
    poisoned = poison(train, torch.Generator())
    assert torch.equal(poisoned.labels, train.labels)
    assert torch.equal(poisoned.poisoned.nonzero().squeeze(1), crafted.rows)
    # Away from the corner the change is within the ball; in the corner there is the trigger.
    clean = train.images(crafted.rows)
    change = poisoned.images(crafted.rows) - clean
    change[..., -3:, -3:] = 0
    size = change.abs().amax((1, 2, 3)) if norm == "linf" else change.square().sum((1, 2, 3)).sqrt()
    assert (size <= radius(attack, clean) + 0.51 / 255 * (1 if norm == "linf" else math.sqrt(3 * 16 * 16))).all()
    assert torch.equal(crafted.images[..., -3:, -3:], to_bytes(fitted.trigger(clean))[..., -3:, -3:])  # type: ignore[misc]


@pytest.mark.parametrize(("corners", "size", "least"), [("bottom-right", 2, 3), ("all-corners", 5, 6)])
def test_images_that_are_too_small(corners: str, size: int, least: int) -> None:
    attack = LabelConsistent(corners=corners)  # type: ignore[arg-type]
    attack.check_size(least)
    with pytest.raises(UserError, match=f"corners = {corners} does not fit on images of {size} px; take {least} px"):
        attack.check_size(size)


@pytest.mark.parametrize("settings", [{"eps": -1.0}, {"step": 0.0}, {"amplitude": 0.0}, {"amplitude": 1.5}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
        LabelConsistent(**settings)
