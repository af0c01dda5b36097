"""IBD-PSC: amplification against edited weights, the choice of layers and PSC by loops, refusals."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences.ibd_psc import LADDER, IbdPsc, amplify, consistency, error_on, last_norms_first
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier

Build = Callable[..., Classifier]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=generator(seed))


def suspect(model: nn.Module, clean: ImageSet, seed: int = 0) -> Suspect:
    return Suspect(model, clean, 10, generator(seed))


@pytest.fixture
def model(tiny_vit: Build) -> Classifier:
    """With gains and biases that training might have left."""
    made = tiny_vit()
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator(1)) + 0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator(2)))
    return made


def edited(model: nn.Module, last: int, omega: float) -> nn.Module:
    """A copy with gain and bias of the last LayerNorms multiplied, as the paper writes it."""
    other = copy.deepcopy(model)
    norms = [layer for layer in other.modules() if isinstance(layer, nn.LayerNorm)]
    with torch.no_grad():
        for layer in norms[len(norms) - last :]:
            layer.weight *= omega
            layer.bias *= omega
    return other


@torch.no_grad()
def error_by_hand(model: nn.Module, clean: ImageSet) -> float:
    wrong = [
        model(clean.images(torch.tensor([i]))).argmax().item() != clean.labels[i].item() for i in range(len(clean))
    ]
    return sum(wrong) / len(wrong)


@pytest.mark.parametrize("last", [0, 1, 3, 5])
def test_amplifying_outputs_is_amplifying_gains_and_biases(model: Classifier, last: int) -> None:
    layers, images = last_norms_first(model), drawn()
    assert len(layers) == 5, "two in each of two blocks, and the last"
    with torch.no_grad(), amplify(layers[:last], 3.0):
        found = model(images)
    with torch.no_grad():
        torch.testing.assert_close(found, edited(model, last, 3.0)(images), atol=1e-4, rtol=1e-4)


def test_the_layer_nearest_the_head_comes_first(model: Classifier) -> None:
    names = {layer: name for name, layer in model.named_modules()}
    found = [names[layer].rpartition(".")[2] for layer in last_norms_first(model)]
    assert found == ["norm", "norm2", "norm1", "norm2", "norm1"]


def test_consistency_by_hand() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 3.0, 0.0], [1.0, 1.0, 0.0]]])
    wanted = (logits[0].softmax(1)[:, 0].mean(), logits[1].softmax(1)[:, 2].mean())
    torch.testing.assert_close(consistency(logits, torch.tensor([0, 2])), torch.stack(wanted))


def test_error_is_the_share_of_wrong_classes(model: Classifier, digits_world: World) -> None:
    clean = digits_world.clean.take(torch.arange(20))
    assert error_on(model, clean) == pytest.approx(error_by_hand(model, clean))


@pytest.mark.parametrize(("omega", "threshold"), [(None, 0.0), (None, 1.0), (2.0, 0.5), (2.0, 1.0)])
def test_the_score_is_that_of_a_loop(
    model: Classifier, digits_world: World, omega: float | None, threshold: float
) -> None:
    """Algorithm 1 and eq. 4 with edited copies, over the ladder where omega is left out."""
    clean, images = digits_world.clean.take(torch.arange(20)), drawn()
    chosen = [
        (factor, k)
        for factor in (LADDER if omega is None else (omega,))
        for k in range(1, 6)
        if error_by_hand(edited(model, k, factor), clean) > threshold
    ]
    factor, k = chosen[0] if chosen else (omega or LADDER[-1], 5)
    with torch.no_grad():
        own = model(images).argmax(1)
        members = [edited(model, i, factor)(images).softmax(1) for i in range(k, min(k + 3, 6))]
    wanted = torch.stack([member[torch.arange(4), own] for member in members]).mean(0)
    screen = IbdPsc(omega, models=3, error=threshold).apply(suspect(model, clean))
    torch.testing.assert_close(screen.score(images), wanted, atol=1e-4, rtol=1e-4)
    assert (screen.report["omega"], screen.report["k"]) == (factor, k)


def test_the_ladder_is_climbed_until_clean_images_lose_their_class(digits_world: World) -> None:
    """A network whose class is lost above a factor of 2 in its only LayerNorm, inside a ViT's frame."""
    clean = digits_world.clean.take(torch.arange(20))
    model = Cut(clean)
    screen = IbdPsc().apply(Suspect(model, clean, 10, generator()))
    assert (screen.report["omega"], screen.report["k"], screen.report["clean error"]) == (3.0, 1, 1.0)
    assert IbdPsc(omega=1.5).apply(Suspect(model, clean, 10, generator())).report["clean error"] == 0


class Cut(nn.Module):
    """Tells the clean set's labels by the sum of an image, as long as its LayerNorm gives a value below 2.5."""

    def __init__(self, clean: ImageSet) -> None:
        super().__init__()
        import timm

        self.vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=10
        )
        for block in self.vit.blocks:
            block.norm1, block.norm2 = nn.Identity(), nn.Identity()
        self.vit.norm = nn.LayerNorm(2)
        self.sums = clean.images(torch.arange(len(clean))).sum((1, 2, 3))
        self.labels = clean.labels
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        value = self.vit.norm(torch.tensor([[0.0, 1.0]]))[0, 1]  # 1
        nearest = (images.sum((1, 2, 3))[:, None] - self.sums).abs().argmin(1)
        right = nn.functional.one_hot(self.labels[nearest], 10).float()
        return right * (2.5 - value)


def test_the_model_stays_as_it_was(model: Classifier, digits_world: World) -> None:
    before, weights = model(drawn()), copy.deepcopy(model.state_dict())
    IbdPsc().apply(suspect(model, digits_world.clean)).score(drawn())
    assert torch.equal(model(drawn()), before)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("changed", [{"omega": 4.0}, {"models": 1}, {"error": 0.95}])
def test_every_parameter_has_an_effect(model: Classifier, digits_world: World, changed: dict[str, Any]) -> None:
    usual, other = (
        IbdPsc(**{"omega": 2.0, "models": 3, "error": 0.0, **how}).apply(suspect(model, digits_world.clean))
        for how in ({}, changed)
    )
    assert not torch.allclose(usual.score(drawn()), other.score(drawn()), atol=1e-5)


def test_the_clean_images_are_drawn(model: Classifier, digits_world: World) -> None:
    errors = {
        IbdPsc(omega=2.0, images=7).apply(suspect(model, digits_world.clean, seed)).report["clean error"]
        for seed in range(5)
    }
    assert len(errors) > 1
    assert all(round(7 * error, 6).is_integer() for error in errors)


def test_a_model_without_layernorm_is_refused(tiny_vit: Build, digits_world: World) -> None:
    model = tiny_vit()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity().eval())
    with pytest.raises(UserError, match="amplifies LayerNorms, and the model has none"):
        IbdPsc().apply(suspect(model, digits_world.clean))


@pytest.mark.parametrize("wrong", [{"omega": 1.0}, {"models": 0}, {"error": 1.5}, {"images": 0}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        IbdPsc(**wrong)
