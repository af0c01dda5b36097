"""What the head reads: the input of the layer that gives the logits, recomputed from the network's parts."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.models.observe import features, head_layer

Build = Callable[..., Classifier]

POOLED: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = {  # and what is read of the last tokens
    "vit": ("vit_tiny_patch16_224", {}, lambda tokens: tokens[:, 0]),
    "vit, registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}, lambda tokens: tokens[:, 0]),
    "vit, average": ("vit_tiny_patch16_224", {"global_pool": "avg"}, lambda tokens: tokens[:, 1:].mean(1)),
    "vit, average, no class token": (
        "vit_tiny_patch16_224",
        {"class_token": False, "global_pool": "avg"},
        lambda tokens: tokens.mean(1),
    ),
    "deit": ("deit_tiny_patch16_224", {}, lambda tokens: tokens[:, 0]),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {}, lambda tokens: tokens[:, 0]),
    "beit": ("beit_base_patch16_224", {}, lambda tokens: tokens[:, 1:].mean(1)),
    "eva02": ("eva02_tiny_patch14_224", {}, lambda tokens: tokens[:, 1:].mean(1)),
}
each_family = pytest.mark.parametrize("family", POOLED)


def drawn(n: int = 3, size: int = 16) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def opened(tiny_vit: Build, family: str) -> Classifier:
    name, overrides, _ = POOLED[family]
    return tiny_vit(name, n_classes=5, **overrides)


def small_cnn() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolutions = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return nn.Sequential(convolutions, nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 5)).eval()


@each_family
@torch.no_grad()
def test_a_vit_s_features_are_its_pooled_and_normalised_tokens(tiny_vit: Build, family: str) -> None:
    model, images = opened(tiny_vit, family), drawn()
    body: Any = model.body
    tokens = body.forward_features((images - model.mean) / model.std)
    wanted = POOLED[family][2](tokens)
    wanted = body.fc_norm(wanted) if hasattr(body, "fc_norm") else wanted
    found = features(model, images)
    assert found.shape == (3, 16)
    assert found.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@each_family
def test_a_vit_s_head_is_its_own(tiny_vit: Build, family: str) -> None:
    model = opened(tiny_vit, family)
    body: Any = model.body
    assert head_layer(model) == ("body.head", body.head)
    assert head_layer(nn.Sequential(nn.Identity(), model)) == ("1.body.head", body.head)


@torch.no_grad()
def test_the_head_makes_the_logits_of_the_features(tiny_vit: Build) -> None:
    for model in (tiny_vit(), tiny_vit(global_pool="avg"), small_cnn()):
        _, head = head_layer(model)
        torch.testing.assert_close(head(features(model, drawn())), model(drawn()))


@torch.no_grad()
def test_a_distilled_deit_has_a_second_head_that_is_not_looked_at(tiny_vit: Build) -> None:
    model, images = opened(tiny_vit, "deit, distilled"), drawn()
    body: Any = model.body
    beside = body.forward_features((images - model.mean) / model.std)[:, 1]
    found = features(model, images)
    assert not torch.allclose(found, beside, atol=0.1)
    torch.testing.assert_close((body.head(found) + body.head_dist(beside)) / 2, model(images))


@torch.no_grad()
def test_a_plain_cnn_is_read_before_its_last_linear_layer() -> None:
    model, images = small_cnn(), drawn()
    name, layer = head_layer(model)
    assert (name, layer.in_features, layer.out_features) == ("3", 8, 5)
    torch.testing.assert_close(features(model, images), model[:3](images))  # pyright: ignore[reportIndexIssue]


@torch.no_grad()
def test_a_resnet_is_read_behind_its_pooling() -> None:
    with torch.random.fork_rng(devices=[]):
        model: Any = timm.create_model("resnet10t", num_classes=5).eval()
    images = drawn(2, 64)
    assert head_layer(model)[0] == "fc"
    wanted = model.forward_features(images).mean((2, 3))
    torch.testing.assert_close(features(model, images), wanted, atol=1e-5, rtol=1e-4)


def test_a_vit_without_a_head_of_its_own_is_read_before_the_last_linear_layer(tiny_vit: Build) -> None:
    bare = tiny_vit(n_classes=0)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(bare, nn.Linear(16, 4)).eval()
    assert head_layer(model)[0] == "1"
    torch.testing.assert_close(features(model, drawn()), bare(drawn()).detach())


def test_a_network_without_a_linear_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten())
    for look in (head_layer, lambda m: features(m, drawn())):
        with pytest.raises(UserError, match="model Sequential has no linear layer"):
            look(model)


def state(model: nn.Module) -> list[Any]:
    return [
        [w.requires_grad for w in model.parameters()],
        [w.grad is None for w in model.parameters()],
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    ]


def test_looking_leaves_no_trace_even_where_the_pass_fails(tiny_vit: Build) -> None:
    model = tiny_vit()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    assert not features(model, drawn()).requires_grad
    assert state(model) == before
    with pytest.raises(UserError, match="images have shape"):
        features(model, drawn(1, 12))  # a size that the model is not for
    assert state(model) == before


def test_features_are_in_fp32_whatever_the_arithmetic(tiny_vit: Build) -> None:
    model = tiny_vit()
    exact = features(model, drawn())
    with torch.autocast("cpu", torch.bfloat16):
        found = features(model, drawn())
    assert found.dtype == exact.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.1, rtol=0.1)
    assert not torch.equal(found, exact)
