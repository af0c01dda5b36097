"""STRIP: entropies against scipy, superimposed images by hand, the score against a loop over images and overlays."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences.strip import Strip, draw_overlays, entropy, superimpose
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier

Build = Callable[..., Classifier]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=generator(seed))


def some(world: World, n: int) -> ImageSet:
    return world.clean.take(torch.arange(n))


def suspect(model: nn.Module, clean: ImageSet, seed: int = 0, n_classes: int = 10) -> Suspect:
    return Suspect(model, clean, n_classes, generator(seed))


@torch.no_grad()
def by_hand(model: nn.Module, image: Tensor, overlays: Tensor, weight: float = 1.0, over: float = 1.0) -> float:
    """Minus the mean entropy, one forward pass an overlay."""
    found = []
    for overlay in overlays:
        blend = np.minimum(weight * image.numpy() + over * overlay.numpy(), 1.0)
        logits = model(torch.from_numpy(blend.astype(np.float32))[None])[0].double().numpy()
        odds = np.exp(logits - logits.max())
        found.append(scipy_entropy(odds / odds.sum(), base=2))
    return -float(np.mean(found))


def test_entropy_is_scipys() -> None:
    logits = 5 * torch.randn(4, 6, 7, generator=generator())
    torch.testing.assert_close(entropy(logits), torch.from_numpy(scipy_entropy(logits.softmax(-1), base=2, axis=-1)))


def test_entropy_of_a_certain_prediction_is_zero() -> None:
    found = entropy(torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, -1e4]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]))


def test_superimposing_by_hand() -> None:
    images = torch.tensor([0.25, 1.0]).view(2, 1, 1, 1)
    overlays = torch.tensor([0.5, 0.875, 0.0]).view(3, 1, 1, 1)
    assert superimpose(images, overlays).flatten().tolist() == [0.75, 1.0, 0.25, 1.0, 1.0, 1.0]
    assert superimpose(images, overlays, 0.5).flatten().tolist() == [0.625, 1.0, 0.125, 1.0, 1.0, 0.5]
    assert images.flatten().tolist() == [0.25, 1.0], "the images were changed in place"


@pytest.mark.parametrize(("weight", "over"), [(1.0, 1.0), (0.5, 0.5), (0.75, 0.25)])
def test_the_score_is_that_of_a_loop(tiny_vit: Build, digits_world: World, weight: float, over: float) -> None:
    """As many overlays as clean images: all of them, in an order that a mean does not know."""
    model, clean, images = tiny_vit(), some(digits_world, 7), drawn()
    screen = Strip(7, weight, over).apply(suspect(model, clean))
    overlays = clean.images(torch.arange(7))
    wanted = torch.tensor([by_hand(model, image, overlays, weight, over) for image in images])
    torch.testing.assert_close(screen.score(images), wanted, atol=1e-5, rtol=1e-5)


def test_an_input_whose_class_survives_scores_higher(digits_world: World) -> None:
    """A network that reads mean brightness, but for a white corner, which decides alone."""

    class Backdoored(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            fired = 40 * (images[:, :, -2:, -2:].amin((1, 2, 3)) >= 1).float()
            return torch.stack([fired, 6 * images.mean((1, 2, 3)), 3 - 3 * images.mean((1, 2, 3))], 1)

    clean, images = replace(some(digits_world, 20), labels=torch.zeros(20, dtype=torch.int64)), 0.3 * drawn(8)
    triggered = images.clone()
    triggered[:, :, -2:, -2:] = 1
    screen = Strip(overlays=20).apply(suspect(Backdoored().eval(), clean, n_classes=3))
    assert screen.score(triggered).min() > screen.score(images).max() + 0.3


def test_clean_images_are_drawn_once_each_or_with_replacement(digits_world: World) -> None:
    clean = some(digits_world, 30)
    known = {image.numpy().tobytes() for image in clean.images(torch.arange(30))}
    for n, most in ((10, 10), (30, 30), (200, 30)):
        found = [image.numpy().tobytes() for image in draw_overlays(clean, n, generator())]
        assert len(found) == n
        assert set(found) <= known
        assert len(set(found)) <= most
        if n <= 30:
            assert len(set(found)) == n
    assert torch.equal(draw_overlays(clean, 200, generator()), draw_overlays(clean, 200, generator()))
    assert not torch.equal(draw_overlays(clean, 10, generator()), draw_overlays(clean, 10, generator(1)))


def test_a_score_depends_on_the_image_alone(tiny_vit: Build, digits_world: World) -> None:
    screen, images = Strip(overlays=9).apply(suspect(tiny_vit(), some(digits_world, 20))), drawn(5)
    first = screen.score(images)
    assert first.shape == (5,)
    assert torch.equal(screen.score(images), first)
    torch.testing.assert_close(screen.score(images.flip(0)).flip(0), first)
    for number in range(5):
        torch.testing.assert_close(screen.score(images[number : number + 1])[0], first[number])
    assert screen.score(images[:0]).shape == (0,)


def test_the_model_and_the_global_random_state_stay(tiny_vit: Build, digits_world: World) -> None:
    model = tiny_vit()
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    Strip(overlays=5).apply(suspect(model, some(digits_world, 20))).score(drawn())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(w.requires_grad and w.grad is None for w in model.parameters())


@pytest.mark.parametrize("changed", [{"overlays": 8}, {"weight": 0.6}, {"overlay_weight": 0.6}])
def test_every_parameter_has_an_effect(tiny_vit: Build, digits_world: World, changed: dict[str, Any]) -> None:
    model, clean = tiny_vit(), some(digits_world, 20)
    usual, other = (
        Strip(**{"overlays": 6, **how}).apply(suspect(model, clean)).score(drawn()) for how in ({}, changed)
    )
    assert not torch.allclose(usual, other, atol=1e-4)


def test_the_draw_has_an_effect(tiny_vit: Build, digits_world: World) -> None:
    model, clean = tiny_vit(), some(digits_world, 20)
    one, other = (Strip(overlays=6).apply(suspect(model, clean, seed)).score(drawn()) for seed in (0, 1))
    assert not torch.allclose(one, other, atol=1e-4)


def test_one_clean_image_and_more_classes_than_it_shows_will_do(tiny_vit: Build, digits_world: World) -> None:
    model, clean, images = tiny_vit(n_classes=23), some(digits_world, 1), drawn()
    found = Strip(overlays=4).apply(suspect(model, clean, n_classes=23)).score(images)
    wanted = torch.tensor([by_hand(model, image, clean.images(torch.tensor([0]))) for image in images])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_half_precision_ends_at_the_logits(tiny_vit: Build, digits_world: World) -> None:
    screen, images = Strip(overlays=6).apply(suspect(tiny_vit(), some(digits_world, 20))), drawn()
    with torch.autocast("cpu", torch.bfloat16):
        found = screen.score(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, screen.score(images), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"overlays": 0}, {"weight": 0.0}, {"weight": 1.5}, {"overlay_weight": 0.0}, {"overlay_weight": -1.0}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Strip(**wrong)
