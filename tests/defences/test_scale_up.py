"""SCALE-UP: SPC and NSPC by hand, against a loop over images and factors, and against NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences.scale_up import ScaleUp, amplify, class_statistics, share_that_stays
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier

Build = Callable[..., Classifier]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=generator(seed)) ** 3


def suspect(model: nn.Module, clean: ImageSet, n_classes: int = 10) -> Suspect:
    return Suspect(model, clean, n_classes, generator())


@torch.no_grad()
def by_hand(model: nn.Module, image: Tensor, factors: list[int]) -> tuple[float, int]:
    """SPC and class, one forward pass a factor."""
    own = model(image[None]).argmax().item()
    stays = [model((factor * image[None]).clamp(max=1)).argmax().item() == own for factor in factors]
    return float(np.mean(stays)), int(own)


def test_amplifying_by_hand() -> None:
    images = torch.tensor([0.125, 0.5]).view(2, 1, 1, 1)
    assert amplify(images, torch.tensor([1, 3, 5])).flatten().tolist() == [0.125, 0.375, 0.625, 0.5, 1.0, 1.0]
    assert images.flatten().tolist() == [0.125, 0.5], "the images were changed in place"


def test_spc_by_hand() -> None:
    classes = torch.tensor([[2, 2, 2, 0, 2], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert share_that_stays(classes).tolist() == [0.75, 0.0, 1.0]


def test_mean_and_deviation_are_numpys_over_each_class() -> None:
    spc, labels = torch.rand(40, generator=generator()), torch.arange(40) % 4
    mean, deviation = class_statistics(spc, labels, 4, least=5, floor=0.01)
    for k in range(4):
        own = spc[labels == k].numpy()
        assert mean[k].item() == pytest.approx(np.mean(own), abs=1e-6)
        assert deviation[k].item() == pytest.approx(np.std(own), abs=1e-6)


def test_a_class_with_few_images_takes_those_of_all_and_no_deviation_is_below_the_floor() -> None:
    spc, labels = torch.tensor([0.2, 0.4, 0.6, 0.6, 0.6]), torch.tensor([0, 0, 2, 2, 2])
    mean, deviation = class_statistics(spc, labels, 4, least=3, floor=0.1)
    everything = [np.mean(spc.numpy()), np.std(spc.numpy())]
    for k in (0, 1, 3):
        assert [mean[k].item(), deviation[k].item()] == pytest.approx(everything, abs=1e-6)
    assert [mean[2].item(), deviation[2].item()] == pytest.approx([0.6, 0.1])


@pytest.mark.parametrize("largest", [3, 7, 11])
def test_spc_is_that_of_a_loop(tiny_vit: Build, digits_world: World, largest: int) -> None:
    model, images = tiny_vit(), drawn()
    found = ScaleUp(largest=largest).apply(suspect(model, digits_world.clean)).score(images)
    factors = list(range(3, largest + 1, 2))
    wanted = torch.tensor([by_hand(model, image, factors)[0] for image in images])
    torch.testing.assert_close(found, wanted)


def test_nspc_is_that_of_a_loop(tiny_vit: Build, digits_world: World) -> None:
    model, clean, images = tiny_vit(), digits_world.clean.take(torch.arange(45)), drawn()
    factors = [3, 5, 7, 9, 11]
    spc = np.array([by_hand(model, image, factors)[0] for image in clean.images(torch.arange(45))])
    labels, wanted = clean.labels.numpy(), []
    for image in images:
        own, predicted = by_hand(model, image, factors)
        among = spc[labels == predicted]
        among = among if len(among) >= 5 else spc
        wanted.append((own - among.mean()) / max(among.std(), 0.1))
    screen = ScaleUp("data-limited").apply(suspect(model, clean))
    torch.testing.assert_close(screen.score(images), torch.tensor(wanted).float(), atol=1e-4, rtol=1e-4)
    assert screen.report["SPC, clean images"] == pytest.approx(spc.mean())


def test_a_trigger_that_decides_at_every_brightness_scores_highest(digits_world: World) -> None:
    """A network that reads mean brightness, but for a white corner, which decides alone."""

    class Backdoored(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            fired = 40 * (images[:, :, -2:, -2:].amin((1, 2, 3)) >= 1).float()
            bright = images.mean((1, 2, 3))
            return torch.stack([fired - 20, 6 * bright, 3 - 3 * bright], 1)

    dark = 0.2 * torch.rand(8, 3, 16, 16, generator=generator())
    triggered = dark.clone()
    triggered[:, :, -2:, -2:] = 1
    clean = ImageSet.of((255 * dark).byte(), torch.zeros(8, dtype=torch.int64), 3)
    screen = ScaleUp().apply(suspect(Backdoored().eval(), clean, 3))
    assert screen.score(triggered).tolist() == [1.0] * 8
    assert screen.score(dark).max() < 0.5


@pytest.mark.parametrize("changed", [{"largest": 3}, {"setting": "data-limited"}])
def test_every_parameter_has_an_effect(tiny_vit: Build, digits_world: World, changed: dict[str, Any]) -> None:
    images = drawn(40) / 5
    usual, other = (
        ScaleUp(**how).apply(suspect(tiny_vit(), digits_world.clean)).score(images) for how in ({}, changed)
    )
    assert not torch.allclose(usual, other)


def test_least_decides_which_classes_have_their_own_mean(tiny_vit: Build, digits_world: World) -> None:
    scores = [
        ScaleUp("data-limited", least=least).apply(suspect(tiny_vit(), digits_world.clean)).score(drawn())
        for least in (1, 10**6)
    ]
    assert not torch.allclose(*scores)


@pytest.mark.parametrize("wrong", [{"largest": 4}, {"largest": 1}, {"setting": "data"}, {"least": 0}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=next(iter(wrong))) as refused:
        ScaleUp(**wrong)
    assert isinstance(refused.value, UserError) or "setting" in wrong
