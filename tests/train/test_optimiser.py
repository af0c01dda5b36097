"""Which weight learns at which rate, and which of them decays; by hand, and against a loop of its own."""

import re
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import ImageSet
from vitrap.errors import UserError
from vitrap.models.classifier import Architecture, Classifier, open_model
from vitrap.train.loop import Streams, train
from vitrap.train.optimiser import head_weights, make_optimiser, warmup_cosine
from vitrap.train.recipe import Recipe

N, CLASSES, SIZE = 40, 3, 8
TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
RECIPE = Recipe(2, 16, lr=1e-2, layer_decay=0.5, weight_decay=0.3)


def vit(name: str = "vit_tiny_patch16_224") -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_model(Architecture(name, SIZE, CLASSES, TINY))


def rates(model: nn.Module, recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each weight, by name."""
    found = {
        id(w): (g["lr"], g["weight_decay"]) for g in make_optimiser(model, recipe).param_groups for w in g["params"]
    }
    return {name: found[id(weight)] for name, weight in model.named_parameters() if weight.requires_grad}


def layer_of(name: str) -> int:
    """How many layers below the head a weight lies, as timm counts; the last norm is part of the last block."""
    if name.startswith("body.head"):
        return 0
    if name.startswith("body.norm"):
        return 1
    if name.startswith("body.blocks"):
        return 2 - int(name.split(".")[2])
    return 3  # patches, position embeddings, class token


def test_each_layer_learns_at_half_the_rate_of_the_one_above() -> None:
    found = rates(vit(), RECIPE)
    assert {name: rate for name, (rate, _) in found.items()} == pytest.approx(
        {name: 1e-2 * 0.5 ** layer_of(name) for name in found}
    )
    assert found["body.blocks.0.attn.qkv.weight"] == pytest.approx((2.5e-3, 0.3))
    assert found["body.pos_embed"] == pytest.approx((1.25e-3, 0.0))


@pytest.mark.parametrize("change", [{}, {"layer_decay": 0.5}, {"layer_decay": 0.5, "head_lr": 0.1}])
def test_decay_is_for_matrices_however_weights_are_grouped(change: dict[str, float]) -> None:
    for name, (_, decay) in rates(vit(), Recipe(weight_decay=0.3, **change)).items():
        matrix = name.endswith("weight") and "norm" not in name
        assert decay == (0.3 if matrix else 0.0), name


def test_a_rate_of_one_for_all_is_two_groups() -> None:
    optimiser = make_optimiser(vit(), replace(RECIPE, layer_decay=1.0))
    assert [(g["lr"], g["weight_decay"]) for g in optimiser.param_groups if g["params"]] == [(1e-2, 0.3), (1e-2, 0.0)]


@pytest.mark.parametrize("layer_decay", [0.5, 1.0])
def test_the_head_may_have_its_own_rate(layer_decay: float) -> None:
    recipe = replace(RECIPE, layer_decay=layer_decay)
    plain, own = rates(vit(), recipe), rates(vit(), replace(recipe, head_lr=0.25))
    heads = {"body.head.weight", "body.head.bias"}
    assert {name for name in own if own[name] != plain[name]} == heads
    assert {own[name][0] for name in heads} == {0.25}


def test_both_heads_of_a_distilled_network_are_its_head() -> None:
    body = timm.create_model("deit_tiny_distilled_patch16_224", img_size=SIZE, num_classes=CLASSES, **TINY)
    assert [tuple(w.shape) for w in head_weights(body, "recipe.head_lr")] == [(CLASSES, 16), (CLASSES,)] * 2


class Outsider(nn.Module):
    """A network of somebody else's, with a part that is called as a part of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def test_all_of_a_network_from_outside_learns() -> None:
    assert rates(Outsider(), replace(RECIPE, layer_decay=1.0)) == {
        "body.1.weight": (1e-2, 0.3),
        "body.1.bias": (1e-2, 0.0),
        "head.weight": (1e-2, 0.3),
        "head.bias": (1e-2, 0.0),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"layer_decay": 0.5},
            "recipe.layer_decay = 0.5 needs a network whose layers timm knows, and Outsider is none",
        ),
        ({"layer_decay": 1.0, "head_lr": 0.1}, "recipe.head_lr needs a network that says what its head is"),
    ],
)
def test_layers_that_a_network_does_not_name_are_refused(change: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}.*leave it out$"):
        make_optimiser(Outsider(), replace(RECIPE, **change))


def test_something_else_may_learn_where_the_network_does_not() -> None:
    extra = nn.Parameter(torch.zeros(1))
    optimiser = make_optimiser(Outsider().requires_grad_(False), replace(RECIPE, layer_decay=1.0), [extra])
    assert [w for group in optimiser.param_groups for w in group["params"]] == [extra]
    assert optimiser.param_groups[-1]["weight_decay"] == 0


def test_frozen_weights_are_left_out() -> None:
    model = vit().requires_grad_(False)
    for weight in head_weights(model.body, "linear_probe"):
        weight.requires_grad_(True)
    assert set(rates(model, RECIPE)) == {"body.head.weight", "body.head.bias"}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_training_is_that_of_a_loop_of_its_own(optimizer: str) -> None:
    """An optimiser for each weight, with its own peak; one schedule."""
    labels = torch.arange(N) % CLASSES
    pixels = torch.randint(256, (N, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ImageSet(pixels, labels, torch.arange(N), CLASSES, SIZE)
    recipe = replace(RECIPE, optimizer=optimizer, head_lr=3e-2, clip=0.0)
    model, other = vit(), vit().train()
    train(model, data, recipe, Streams(*(torch.Generator().manual_seed(k) for k in range(4))))
    owns = []
    for name, weight in other.named_parameters():
        peak = 3e-2 if "head" in name else 1e-2 * 0.5 ** layer_of(name)
        decay = 0.3 if name.endswith("weight") and "norm" not in name else 0.0
        make = torch.optim.AdamW if optimizer == "adamw" else lambda w, **k: torch.optim.SGD(w, momentum=0.9, **k)
        owns.append((make([weight], lr=peak, weight_decay=decay), peak))
    order = torch.Generator().manual_seed(0)
    for step in range(6):
        if step % 3 == 0:
            batches = torch.randperm(N, generator=order).split(16)
        rows: Tensor = batches[step % 3]
        other.zero_grad()
        functional.cross_entropy(other(data.images(rows)), labels[rows]).backward()
        for optimiser, peak in owns:
            optimiser.param_groups[0]["lr"] = peak * warmup_cosine(step / 6, recipe.warmup)
            optimiser.step()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-3, atol=1e-5, msg=name)
