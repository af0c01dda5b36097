"""Stages, features and logits of any network, against timm's own, and the gradient at the last map by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.seven import SEVEN, opened
from vitrap.errors import UserError
from vitrap.models.activations import activations
from vitrap.models.layers import layer_outputs
from vitrap.models.maps import last_map, observe_map
from vitrap.models.observe import features

LAST: dict[str, tuple[str, tuple[int, ...]]] = {  # the stage, and its map at 32 px: channels, rows, columns
    "resnet": ("body.layer2", (12, 4, 4)),
    "convnext": ("body.stages.1", (12, 4, 4)),
    "swin": ("body.layers.1", (32, 8, 8)),
    "cait": ("body.blocks.1", (16, 8, 8)),
    "xcit": ("body.blocks.1", (16, 4, 4)),
    "deit": ("body.blocks.1", (16, 8, 8)),
    "vit, registers": ("body.blocks.1", (16, 8, 8)),
}
each = pytest.mark.parametrize("kind", SEVEN)


def drawn(n: int = 2, size: int = 32) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def state(model: nn.Module) -> list[Any]:
    return [
        [w.requires_grad for w in model.parameters()],
        [w.grad is None for w in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        ["forward" in vars(m) for m in model.modules()],
    ]


class Small(nn.Module):
    """A network that is not timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(inplace=True))
        self.out = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.deep(self.stem(images)).mean((2, 3)))


def small() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small().eval()


@each
@torch.no_grad()
def test_stages_features_and_logits_are_timms_own(kind: str) -> None:
    model, images = opened(kind), drawn()
    before = state(model)
    found = activations(model, images)
    assert state(model) == before
    body: Any = model.body
    last, maps = body.forward_intermediates((images - model.mean) / model.std)
    assert list(found.stages) == [f"body.{stage['module']}" for stage in body.feature_info]
    assert [torch.equal(a, b) for a, b in zip(found.stages.values(), maps, strict=True)] == [True] * len(maps)
    assert torch.equal(found.features, body.forward_head(last, pre_logits=True))
    assert torch.equal(found.features, features(model, images))
    assert torch.equal(found.logits, model(images))
    assert all(stage.ndim == 4 and stage.shape[0] == 2 for stage in found.stages.values())


@torch.no_grad()
def test_a_network_of_another_make_has_its_parts_for_stages() -> None:
    model, images = small(), drawn()
    found = activations(nn.Sequential(model), images)
    assert {name: tuple(stage.shape[1:]) for name, stage in found.stages.items()} == {
        "0.stem": (4, 16, 16),
        "0.deep": (6, 8, 8),
        "0.out": (5,),
    }
    assert torch.equal(found.stages["0.stem"], model.stem(images))
    assert torch.equal(found.features, model.deep(model.stem(images)).mean((2, 3)))
    assert torch.equal(found.logits, model(images))


def test_a_network_without_a_layer_of_logits_is_refused() -> None:
    with pytest.raises(UserError, match="no linear layer"):
        activations(nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()), drawn())


@each
def test_activations_are_fp32_and_let_gradients_through(kind: str) -> None:
    model, images = opened(kind), drawn().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = activations(model, images)
    assert {t.dtype for t in (*found.stages.values(), found.features, found.logits)} == {torch.float32}
    (slope,) = torch.autograd.grad(next(reversed(found.stages.values())).square().sum(), images)
    assert slope.abs().sum() > 0


def test_everything_is_restored_after_an_exception() -> None:
    model = opened("resnet")
    before = state(model)
    with pytest.raises(RuntimeError):
        activations(model.body, drawn()[:, :2])
    assert state(model) == before


@torch.no_grad()
def test_outputs_by_name() -> None:
    model, images = opened("resnet"), drawn()
    before = state(model)
    with layer_outputs(model, ["body.layer1", "body.fc"]) as seen:
        logits = model(images)
    assert state(model) == before
    assert torch.equal(seen["body.fc"], logits)
    body: Any = model.body
    first = body.maxpool(body.act1(body.bn1(body.conv1((images - model.mean) / model.std))))
    assert torch.equal(seen["body.layer1"], body.layer1(first))
    with pytest.raises(UserError, match="unknown layer 'body.fd'; did you mean 'body.fc'"):
        layer_outputs(model, ["body.fd"])


# The last map


@each
def test_the_last_map_is_the_last_of_timms_of_at_least_four_by_four(kind: str) -> None:
    model, images = opened(kind), drawn()
    before = state(model)
    layer = last_map(model, images[:1])
    assert state(model) == before
    assert layer.name == LAST[kind][0]
    with torch.no_grad(), layer_outputs(model, [layer.name]) as seen:
        model(images)
    body: Any = model.body
    maps = body.forward_intermediates((images - model.mean) / model.std, intermediates_only=True)
    large = [m for m in maps if min(m.shape[2:]) >= 4]
    assert tuple(large[-1].shape[1:]) == LAST[kind][1]
    assert torch.equal(layer.to_map(seen[layer.name]), large[-1])


@each
def test_the_gradient_at_the_last_map_is_that_by_hand(kind: str) -> None:
    """By hand: within the whole graph, at the module's own output."""
    model, images = opened(kind), drawn()
    layer = last_map(model, images[:1])
    for as_leaf in (True, False):
        with observe_map(model, layer, as_leaf=as_leaf) as seen:
            loss = functional.cross_entropy(model(images), torch.tensor([1, 3]), reduction="sum")
            (slope,) = torch.autograd.grad(loss, seen[-1])
            assert seen[-1].is_leaf == as_leaf
        assert not model.get_submodule(layer.name)._forward_hooks
        with layer_outputs(model, [layer.name]) as whole:
            loss = functional.cross_entropy(model(images), torch.tensor([1, 3]), reduction="sum")
            (wanted,) = torch.autograd.grad(loss, whole[layer.name])
        assert wanted.abs().max() > 0
        torch.testing.assert_close(slope, wanted, atol=1e-7, rtol=1e-5)
        assert layer.to_map(slope).shape == (2, *LAST[kind][1])


@pytest.mark.parametrize("kind", ["swin", "cait", "vit, registers"])
def test_a_map_has_its_rows_and_columns_where_the_image_has_them(kind: str) -> None:
    """The gradient of one cell of the first stage's map reaches the pixels of its own place most."""
    model, images = opened(kind), drawn(1).requires_grad_()
    layer = last_map(model, images)
    with observe_map(model, layer) as seen:
        model(images)
    cells = layer.to_map(seen[-1])
    side = 32 // cells.shape[-1]
    for row, column in ((1, 5), (6, 2)):
        (slope,) = torch.autograd.grad(cells[0, :, row, column].square().sum(), images, retain_graph=True)
        strength = functional.avg_pool2d(slope.abs().sum(1), side)[0]
        assert divmod(int(strength.argmax()), cells.shape[-1]) == (row, column)


def test_a_leaf_freezes_the_weights_and_gives_them_back() -> None:
    model = opened("resnet")
    next(model.parameters()).requires_grad_(False)
    before, layer = state(model), last_map(model, drawn(1))
    with observe_map(model, layer, as_leaf=True) as seen:
        model(drawn()).sum().backward()
    assert seen[-1].grad is not None
    assert state(model) == before


def test_a_network_of_another_make_has_a_last_map_too() -> None:
    model, images = small(), drawn()
    layer = last_map(model, images)
    assert layer.name == "deep"
    with observe_map(model, layer, as_leaf=True) as seen:
        (slope,) = torch.autograd.grad(model(images)[:, 2].sum(), seen[-1])
    wanted = (model.out.weight[2] / 64)[None, :, None, None].expand(2, 6, 8, 8)
    torch.testing.assert_close(layer.to_map(slope), wanted)
    assert last_map(model, images, side=9).name == "stem"


def test_without_a_map_of_that_size_it_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        last_map(opened("resnet"), drawn(), side=17)
    assert str(caught.value) == (
        "model resnet18 (ResNet) has no stage with a map of at least 17 x 17 at 32 px; raise data.size, or take another"
        " network"
    )
