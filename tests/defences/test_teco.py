"""TeCo: the first change by hand, the score against a loop and NumPy, each copy made of the image itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences.teco import Severities, Spread, TeCo, deviation, first_change
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.tensors.corruptions import SEVERITIES, Canvas
from vitrap.tensors.pixels import round8

Build = Callable[..., Classifier]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=generator(seed))


def suspect(model: nn.Module, clean: ImageSet, seed: int = 0) -> Suspect:
    return Suspect(model, clean, 10, generator(seed))


def test_the_first_change_by_hand() -> None:
    classes = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 1]])
    assert first_change(torch.ones(4, 1, dtype=torch.int64), classes).tolist() == [4, 1, 3, 2]


def test_the_deviation_is_numpys() -> None:
    changes = torch.randint(1, 7, (5, 14), generator=generator())
    torch.testing.assert_close(deviation(changes), torch.from_numpy(np.std(changes.numpy(), 1)).float())


class Brightness(nn.Module):
    """Class 1 where the mean is above 0.5."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_every_severity_corrupts_the_image_itself() -> None:
    """Were each copy made of the last, a mean of 0.4 would pass 0.5 at the second severity, not at the third."""
    brighter = Severities([lambda x, by=by: x + by for by in (0.05, 0.08, 0.15)])
    nothing = Severities([lambda x: x] * 3)
    images = torch.full((1, 3, 4, 4), 0.4)
    assert torch.equal(brighter(images), round8(torch.cat([images + by for by in (0.05, 0.08, 0.15)])))
    score = Spread(Brightness(), [brighter, nothing], 3)(images)
    assert score.item() == pytest.approx(np.std([3, 4]))


@torch.no_grad()
def by_hand(model: nn.Module, image: Tensor, severities: int) -> float:
    """Algorithm 1, one forward pass at a time, with the draws of the defence."""
    canvas, found = Canvas(3, 16, generator(), torch.device("cpu")), []
    own = model(image[None]).argmax().item()
    for corruption, strengths in SEVERITIES.items():
        first = severities + 1
        corrupt = [corruption(canvas, *strength) for strength in strengths[:severities]]
        for n, change in enumerate(corrupt, 1):
            if model(round8(change(image[None]))).argmax().item() != own:
                first = n
                break
        found.append(first)
    return float(np.std(found))


@pytest.mark.parametrize("severities", [2, 5])
def test_the_score_is_that_of_a_loop(tiny_vit: Build, digits_world: World, severities: int) -> None:
    model, images = tiny_vit(), drawn()
    found = TeCo(severities).apply(suspect(model, digits_world.clean)).score(images)
    wanted = torch.tensor([by_hand(model, image, severities) for image in images])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_an_image_that_only_some_corruptions_change_scores_higher() -> None:
    """Of four corruptions, half change the class at once and half never, or all do midway."""
    jump, stay = Severities([lambda x: 1 - x] * 5), Severities([lambda x: x] * 5)
    midway = Severities([lambda x: x] * 2 + [lambda x: 1 - x] * 3)
    images = torch.full((1, 3, 4, 4), 0.25)
    assert Spread(Brightness(), [jump, jump, stay, stay], 5)(images).item() == pytest.approx(2.5)
    assert Spread(Brightness(), [midway] * 4, 5)(images).item() == 0


def test_what_is_random_is_drawn_once_from_the_generator(tiny_vit: Build, digits_world: World) -> None:
    model, images = tiny_vit(), drawn(12)
    one, again, other = (TeCo().apply(suspect(model, digits_world.clean, seed)) for seed in (0, 0, 1))
    first = one.score(images)
    assert torch.equal(one.score(images), first)
    assert torch.equal(again.score(images), first)
    assert not torch.equal(other.score(images), first)
    assert one.score(images[:0]).shape == (0,)


@pytest.mark.parametrize("wrong", [{"severities": 0}, {"severities": 6}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="severities"):
        TeCo(**wrong)
