"""Fine-pruning: mean activations, the order and the end of pruning by hand, and what fine-tuning leaves at 0."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Defence, ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences import fine_prune
from vitrap.defences.fine_prune import ADAMW_RATE, SGD_RATE, FinePrune, mean_activations, prune, reader_of
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.models.observe import features, head_layer

Build = Callable[..., Classifier]


@pytest.fixture
def clean(digits_world: World) -> ImageSet:
    return digits_world.clean.take(torch.arange(24))


def suspect(model: nn.Module, clean: ImageSet, seed: int = 0) -> Suspect:
    return Suspect(model, clean, 10, torch.Generator().manual_seed(seed))


def pixels(clean: ImageSet) -> Tensor:
    return clean.images(torch.arange(len(clean)))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


# ---- step 1


@torch.no_grad()
def test_mean_activations_of_the_head_are_those_of_its_features(tiny_vit: Build, clean: ImageSet) -> None:
    model = tiny_vit()
    _, reader = reader_of(model, "head")
    seen = features(model, pixels(clean)).numpy().astype(np.float64)
    for measure, wanted in (("signed", seen.mean(0)), ("absolute", np.abs(seen).mean(0))):
        found = mean_activations(suspect(model, clean), model, reader, measure)
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


@torch.no_grad()
def test_mean_activations_of_an_mlp_are_over_all_tokens(tiny_vit: Build, clean: ImageSet) -> None:
    model = tiny_vit()
    body: Any = model.body
    name, reader = reader_of(model, "mlp")
    assert (name, reader) == ("body.blocks.1.mlp.fc2", body.blocks[1].mlp.fc2)
    tokens = body._pos_embed(body.patch_embed((pixels(clean) - model.mean) / model.std))
    last = body.blocks[1]
    tokens = body.blocks[0](body.norm_pre(tokens))
    tokens = tokens + last.attn(last.norm1(tokens))
    wanted = functional.gelu(last.mlp.fc1(last.norm2(tokens))).abs().mean((0, 1))
    found = mean_activations(suspect(model, clean), model, reader, "absolute")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# ---- step 2


def pruned_of_16(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, clean: ImageSet, accuracies: list[float]
) -> tuple[list[int], Tensor]:
    """What is pruned of the head's neurons, 4 at a time and the last one first, given each accuracy that is measured.

    The first of these is that of the whole model; none may be left over.
    """
    values = iter(accuracies)
    monkeypatch.setattr(fine_prune, "accuracy", lambda suspect, model: next(values))
    _, reader = head_layer(model)
    settings = FinePrune(pace=0.25, drop=0.1)
    found = prune(suspect(model, clean), model, reader, torch.arange(15, -1, -1), settings)
    assert next(values, None) is None
    return found.tolist(), reader.weight.detach()


@pytest.mark.parametrize(
    ("accuracies", "pruned"),
    [
        ([0.8, 0.9, 0.73, 0.72], 8),  # 0.72 is a tenth less than 0.8, and that step is taken back
        ([0.8, 0.72], 0),
        ([0.8, 0.8, 0.8, 0.8], 12),  # some neurons stay
        ([0.0, 0.0], 0),  # a model that is always wrong shows nothing
    ],
)
def test_pruning_ends_where_the_accuracy_has_fallen_by_a_tenth(
    monkeypatch: pytest.MonkeyPatch, tiny_vit: Build, clean: ImageSet, accuracies: list[float], pruned: int
) -> None:
    model = tiny_vit()
    whole = head_layer(model)[1].weight.detach().clone()
    found, left = pruned_of_16(monkeypatch, model, clean, accuracies)
    assert found == list(range(15, 15 - pruned, -1))
    assert not left[:, 16 - pruned :].any()
    assert torch.equal(left[:, : 16 - pruned], whole[:, : 16 - pruned])


# ---- step 3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("layer", ["head", "mlp"])
def test_pruned_neurons_stay_pruned_and_the_others_learn(
    tiny_vit: Build, clean: ImageSet, optimizer: Any, layer: Any
) -> None:
    model = tiny_vit()
    found = FinePrune(layer=layer, pace=0.25, drop=1.0, epochs=2, optimizer=optimizer).apply(suspect(model, clean))
    name, before = reader_of(model, layer)
    after = reader_of(found.model, layer)[1]
    activity = mean_activations(suspect(model, clean), model, before, "absolute")
    pruned = activity.argsort()[: int(found.report["pruned neurons"])]
    assert len(pruned) == 3 * len(activity) // 4
    assert found.layer == f"input of {name}"
    rest = [k for k in range(len(activity)) if k not in pruned.tolist()]
    assert not after.weight[:, pruned].any()
    assert (after.weight[:, rest] != before.weight[:, rest]).all()
    assert not torch.equal(weights(found.model), weights(model))


def test_one_step_by_hand(tiny_vit: Build, clean: ImageSet) -> None:
    """All images in one step: SGD goes lr (g + decay w) on the pruned network's loss."""
    model, lr, decay = tiny_vit(), 0.003, 0.2
    settings = FinePrune(pace=0.5, drop=1.0, epochs=1, lr=lr, weight_decay=decay)
    found = settings.apply(suspect(model, clean)).model
    _, reader = head_layer(model)
    pruned = mean_activations(suspect(model, clean), model, reader, "absolute").argsort()[:8]
    by_hand = copy.deepcopy(model)
    head = head_layer(by_hand)[1].weight
    with torch.no_grad():
        head[:, pruned] = 0
    loss = functional.cross_entropy(by_hand(pixels(clean)), clean.labels)
    slopes = torch.autograd.grad(loss, list(by_hand.parameters()))
    for before, slope, after in zip(by_hand.parameters(), slopes, found.parameters(), strict=True):
        step = slope.index_fill(1, pruned, 0) if before is head else slope
        matrix = before.ndim >= 2 and before.shape[0] > 1
        wanted = (1 - lr * decay * matrix) * before - lr * step
        torch.testing.assert_close(after, wanted, atol=5e-6, rtol=2e-4)


def test_each_optimiser_has_its_own_rate() -> None:
    assert FinePrune().lr == SGD_RATE == 0.01
    assert FinePrune(optimizer="adamw").lr == ADAMW_RATE == 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "mlp"},
        {"measure": "signed"},
        {"pace": 0.3},
        {"drop": 0.05},
        {"optimizer": "adamw"},
        {"lr": 0.02},
        {"epochs": 3},
        {"batch_size": 7},
        {"weight_decay": 0.4},
        {"clip": 0.01},
        {"crop": 2},
        {"flip": True},
    ],
)
def test_every_setting_counts(tiny_vit: Build, clean: ImageSet, change: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"pace": 0.5, "drop": 1.0, "epochs": 1}
    model = tiny_vit()
    sure = replace(clean, labels=model(pixels(clean)).argmax(1))  # the accuracy before pruning is 1
    found = [FinePrune(**{**usual, **more}).apply(suspect(model, sure)).model for more in ({}, change)]
    assert not torch.equal(weights(found[0]), weights(found[1]))


# ---- what it works on


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("beit_base_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"num_heads": 2}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    ],
)
def test_it_prunes_the_mlp_of_every_plain_family(
    tiny_vit: Build, clean: ImageSet, name: str, overrides: dict[str, Any]
) -> None:
    model = tiny_vit(name, **overrides)
    found = FinePrune(layer="mlp", pace=0.5, drop=1.0, epochs=1).apply(suspect(model, clean))
    assert found.layer == "input of body.blocks.1.mlp.fc2"
    assert 0 < found.report["pruned neurons"] < found.report["neurons"]


def test_a_network_without_a_plain_mlp_is_refused(tiny_vit: Build, clean: ImageSet) -> None:
    model = tiny_vit()
    body: Any = model.body
    body.blocks[-1].mlp = nn.Identity().eval()
    with pytest.raises(UserError, match=r'no MLP whose second layer .*; set fine_prune\'s layer = "head"'):
        FinePrune(layer="mlp").apply(suspect(model, clean))


def test_only_the_mlp_needs_a_plain_vit(clean: ImageSet) -> None:
    assert (FinePrune().needs_attention, FinePrune(layer="mlp").needs_attention) == (False, True)
    network = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    assert FinePrune(epochs=1).apply(suspect(network.eval(), clean)).layer == "input of 4"
    with pytest.raises(UserError, match="no plain token attention"):
        FinePrune(layer="mlp").apply(suspect(network, clean))


def test_it_is_a_defence() -> None:
    assert isinstance(FinePrune(), Defence)
    assert FinePrune.kind == "repair"
