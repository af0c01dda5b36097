"""Fine-tuning: one step by hand for each optimiser, what it leaves alone, and that every setting counts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from vitrap.contracts import Defence, ImageSet, Repaired, Suspect
from vitrap.data.sources import World
from vitrap.defences.fine_tune import ADAMW_RATE, SGD_RATE, FineTune, recipe
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.train.arithmetic import Arithmetic

Build = Callable[..., Classifier]


@pytest.fixture
def clean(digits_world: World) -> ImageSet:
    return digits_world.clean.take(torch.arange(24))


def suspect(model: nn.Module, clean: ImageSet, n_classes: int = 10, seed: int = 0) -> Suspect:
    return Suspect(model, clean, n_classes, torch.Generator().manual_seed(seed))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def repair(model: nn.Module, clean: ImageSet, seed: int = 0, **settings: Any) -> torch.Tensor:
    return weights(FineTune(**{"epochs": 2, **settings}).apply(suspect(model, clean, seed=seed)).model)


def snapshot(model: nn.Module) -> list[Any]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [(w.requires_grad, w.grad) for w in model.parameters()]
    return [weights(model).tolist(), [m.training for m in model.modules()], flags, hooks]


# ---- the method


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_step_by_hand(tiny_vit: Build, clean: ImageSet, optimizer: Any) -> None:
    """All images in one step: SGD goes lr (g + decay w); AdamW shrinks by lr decay, then goes lr in each sign."""
    model, rows, lr, decay = tiny_vit(), torch.arange(len(clean)), 0.003, 0.2
    loss = functional.cross_entropy(model(clean.images(rows)), clean.labels)
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    settings = FineTune(epochs=1, optimizer=optimizer, lr=lr, weight_decay=decay)
    repaired = settings.apply(suspect(model, clean))
    for before, slope, after in zip(model.parameters(), slopes, repaired.model.parameters(), strict=True):
        matrix = before.ndim >= 2 and before.shape[0] > 1
        kept = 1 - lr * decay * matrix
        step = slope if optimizer == "sgd" else slope / (slope.abs() + 1e-8)
        clear = (slope.abs() > 1e-5) | (optimizer == "sgd")  # the others' signs are rounding (a key's bias has none)
        torch.testing.assert_close(after[clear], (kept * before - lr * step)[clear], atol=5e-6, rtol=2e-4)
    assert repaired.report == {"cross_entropy": pytest.approx(loss.item(), rel=1e-5), "lr": lr}


def test_each_optimiser_has_its_own_rate() -> None:
    assert FineTune().lr == FineTune(optimizer="sgd").lr == SGD_RATE == 0.01
    assert FineTune(optimizer="adamw").lr == ADAMW_RATE == 1e-4
    assert FineTune(optimizer="adamw", lr=0.3).lr == 0.3


def test_it_learns_what_the_clean_images_say(tiny_vit: Build, clean: ImageSet) -> None:
    model = tiny_vit()
    found = FineTune(epochs=60, optimizer="adamw", lr=3e-3).apply(suspect(model, clean))
    with torch.no_grad():
        before, after = (
            m(clean.images(torch.arange(24))).argmax(1).eq(clean.labels).sum() for m in (model, found.model)
        )
    assert before < 12
    assert after == 24
    assert found.report["cross_entropy"] < 0.3


@pytest.mark.parametrize(
    "change",
    [
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
    assert not torch.equal(repair(tiny_vit(), clean), repair(tiny_vit(), clean, **change))


def test_the_generator_decides_what_is_random(tiny_vit: Build, clean: ImageSet) -> None:
    found = [repair(tiny_vit(), clean, seed, batch_size=5) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ---- what it leaves alone, and what it hands back


@pytest.mark.parametrize("frozen", [False, True])
def test_the_suspect_stays_and_the_copy_is_ready(tiny_vit: Build, clean: ImageSet, frozen: bool) -> None:
    model = tiny_vit().requires_grad_(not frozen)
    before = snapshot(model)
    repaired = FineTune(epochs=1).apply(suspect(model, clean))
    assert snapshot(model) == before
    assert isinstance(repaired, Repaired)
    pairs = list(zip(model.parameters(), repaired.model.parameters(), strict=True))
    changed = [not torch.equal(a, b) for a, b in pairs]
    assert all(changed), "some weight was not trained"
    assert not any(w.requires_grad or w.grad is not None for w in repaired.model.parameters())
    assert not any(m.training for m in repaired.model.modules())
    assert type(repaired.model) is Classifier


def test_dropout_is_off_and_torchs_random_state_stays(tiny_vit: Build, clean: ImageSet) -> None:
    with_dropout = tiny_vit(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    state = torch.get_rng_state()
    found = repair(with_dropout, clean)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, repair(tiny_vit(), clean))


def test_it_trains_where_gradients_are_off_and_as_the_suspect_computes(tiny_vit: Build, clean: ImageSet) -> None:
    """In bf16, copies of the weights must not outlive a step."""
    exact = repair(tiny_vit(), clean, epochs=8, lr=0.003)
    with torch.no_grad():
        assert torch.equal(repair(tiny_vit(), clean, epochs=8, lr=0.003), exact)
    model = tiny_vit()
    start = weights(model)
    in_bf16 = replace(suspect(model, clean), compute=Arithmetic("bf16", "eager"))
    rough = weights(FineTune(epochs=8, lr=0.003).apply(in_bf16).model)
    assert 0 < (rough - exact).norm() < 0.2 * (exact - start).norm()


# ---- edge cases and refusals


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_image_and_missing_classes(tiny_vit: Build, clean: ImageSet, optimizer: Any) -> None:
    model, one = tiny_vit(n_classes=15), clean.take(torch.tensor([3]))
    settings = FineTune(epochs=2, optimizer=optimizer)
    assert (recipe(settings, 1).batch_size, recipe(settings, 24).batch_size) == (1, 24)
    found = settings.apply(suspect(model, one, n_classes=15)).model
    assert found(clean.images(torch.arange(2))).isfinite().all()


def test_any_network_will_do(clean: ImageSet) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    network(clean.images(torch.arange(2)))
    assert torch.isfinite(repair(network.eval(), clean)).all()


def test_a_training_that_diverges_is_named(tiny_vit: Build, clean: ImageSet) -> None:
    with pytest.raises(UserError, match=r"fine_tune diverged \(cross_entropy is .*\); lower its lr = 1e\+30"):
        FineTune(lr=1e30, epochs=3).apply(suspect(tiny_vit(), clean))


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "adam"}, {"lr": 0.0}, {"epochs": 0}, {"batch_size": 0}, {"weight_decay": -1.0}, {"clip": -1.0}],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises((UserError, TypeError), match=f"{next(iter(settings))}"):
        FineTune(**settings)


def test_it_is_a_defence() -> None:
    assert isinstance(FineTune(), Defence)
    assert FineTune.kind == "repair"
