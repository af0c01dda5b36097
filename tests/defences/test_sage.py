"""SAGE: maps and losses against values by hand, the teacher without a gradient, the learning rate's two conditions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Defence, ImageSet, Repaired, Suspect
from vitrap.data.sources import World
from vitrap.defences import sage
from vitrap.defences.sage import (
    ADAMW_RATE,
    SGD_RATE,
    Sage,
    accuracy,
    block_outputs,
    distillation,
    losses,
    mean_losses,
    should_lower,
    stage_ends,
    token_map,
)
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.models.observe import token_layout
from vitrap.train.arithmetic import Arithmetic
from vitrap.train.loop import Epoch, smoothed
from vitrap.train.tuning import recipe_of

Build = Callable[..., Classifier]
QUICK = {"epochs": 2, "every": 1, "lr": 0.001}


@pytest.fixture
def clean(digits_world: World) -> ImageSet:
    return digits_world.clean.take(torch.arange(24))


def suspect(model: nn.Module, clean: ImageSet, n_classes: int = 10, seed: int = 0) -> Suspect:
    return Suspect(model, clean, n_classes, torch.Generator().manual_seed(seed))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def repair(model: nn.Module, clean: ImageSet, seed: int = 0, **settings: Any) -> Tensor:
    return weights(Sage(**{**QUICK, **settings}).apply(suspect(model, clean, seed=seed)).model)


def terms(model: Classifier, clean: ImageSet, **settings: Any) -> dict[str, Tensor]:
    batch = clean.batch(torch.arange(len(clean)))
    blocks = stage_ends(len(body(model).blocks), 4)
    return dict(losses(model, batch, smoothed(0.0), blocks=blocks, settings=Sage(**settings)))


def body(model: Classifier) -> Any:
    return model.body


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(maps: Sequence[np.ndarray]) -> float:
    """Sum over neighbours of the mean squared difference of maps of length 1."""
    unit = [m / np.sqrt((m**2).sum(1, keepdims=True)) for m in maps]
    return sum(((late - early) ** 2).mean() for early, late in zip(unit[:-1], unit[1:], strict=True))


# ---- equations


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_the_token_map_is_a_sum_over_channels(power: float) -> None:
    outputs = drawn(3, 5, 7) - 0.5
    wanted = (np.abs(outputs.numpy()) ** power).sum(2)
    np.testing.assert_allclose(token_map(outputs, power).numpy(), wanted, rtol=1e-5)


def test_distillation_by_hand() -> None:
    """(3, 4) / 5 and (1, 0): ((0.6 - 1)^2 + 0.8^2) / 2 = 0.4; then (1, 0) and (0, 1): 1."""
    maps = [torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 9.0]])]
    assert distillation(maps).item() == pytest.approx(1.4)
    assert distillation([maps[0], 7 * maps[0]]).item() == pytest.approx(0, abs=1e-12)
    several = [drawn(4, 6, seed=seed) for seed in range(3)]
    assert distillation(several).item() == pytest.approx(by_hand([m.numpy() for m in several]), rel=1e-5)


def test_the_teacher_gets_no_gradient() -> None:
    first, middle, last = (drawn(2, 5, seed=seed).double().requires_grad_() for seed in range(3))
    distillation([first, middle, last]).backward()
    assert first.grad is None or not first.grad.any()
    assert middle.grad is not None
    assert last.grad is not None
    alone = middle.detach().clone().requires_grad_()
    distillation([first, alone]).backward()
    assert alone.grad is not None
    torch.testing.assert_close(middle.grad, alone.grad)  # the middle one learns, and does not give way to the last
    assert middle.grad.norm() > 1e-3


@pytest.mark.parametrize(("depth", "count", "blocks"), [(4, 4, (0, 1, 2, 3)), (24, 4, (5, 11, 17, 23)), (2, 4, (0, 1))])
def test_stages_end_at_even_distances(depth: int, count: int, blocks: tuple[int, ...]) -> None:
    assert stage_ends(depth, count) == blocks
    assert stage_ends(7, 3) == (1, 3, 6)


# ---- on a model


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit, registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "vit, average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["tokens", "softmax"])
def test_the_losses_of_every_family(tiny_vit: Build, clean: ImageSet, family: str, attention: Any) -> None:
    """Against timm's own intermediate tokens, and the attention's own rows."""
    name, overrides = FAMILIES[family]
    model, images = tiny_vit(name, **overrides), clean.images(torch.arange(24))
    found, layout = terms(model, clean, attention=attention), token_layout(model)
    with torch.no_grad():
        assert found["cross_entropy"].item() == pytest.approx(
            functional.cross_entropy(model(images), clean.labels).item(), rel=1e-4
        )
        if attention == "tokens":
            tokens = body(model).forward_intermediates(
                (images - model.mean) / model.std, norm=False, output_fmt="NLC", intermediates_only=True
            )
            maps = [(t.numpy() ** 2).sum(2) for t in tokens]
        else:
            seen: list[Tensor] = []
            for block in body(model).blocks:
                block.attn.fused_attn = False
                block.attn.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            model(images)
            maps = [a[:, :, list(layout.head_tokens)].mean((1, 2))[:, layout.prefix :].numpy() for a in seen]
    assert len(maps) == 2
    assert maps[0].shape == (24, 16)
    assert found["distillation"].item() == pytest.approx(by_hand(maps), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("attention", ["tokens", "softmax"])
def test_the_distillation_reaches_the_weights_past_the_teacher(
    tiny_vit: Build, clean: ImageSet, attention: Any
) -> None:
    """Against finite differences in which the first map stays as it was."""
    model, few = tiny_vit(n_classes=4).double(), clean.take(torch.arange(3))
    images, layout, step = few.images(torch.arange(3)).double(), token_layout(model), 1e-6

    def maps() -> list[Tensor]:
        attentions: list[Tensor] = []
        hooks = [
            b.attn.attn_drop.register_forward_pre_hook(lambda module, args: attentions.append(args[0]))
            for b in body(model).blocks
        ]
        with torch.no_grad(), block_outputs(model, (0, 1)) as seen:
            model(images)
        for hook in hooks:
            hook.remove()
        if attention == "softmax":
            return [a[:, :, 0].mean(1)[:, 1:] for a in attentions]
        return [seen[block][:, layout.prefix :].square().sum(2) for block in (0, 1)]

    for block in body(model).blocks:
        block.attn.fused_attn = False
    weight = body(model).blocks[0].mlp.fc1.weight
    batch = few.batch(torch.arange(3))
    batch = replace(batch, images=images, labels=batch.labels % 4)
    found = losses(model, batch, smoothed(0.0), blocks=(0, 1), settings=Sage(attention=attention))["distillation"]
    (slope,) = torch.autograd.grad(found, weight)
    teacher, numeric = maps()[0].numpy(), []
    for sign in (1, -1):
        with torch.no_grad():
            weight.view(-1)[5] += sign * step
            numeric.append(by_hand([teacher, maps()[1].numpy()]))
            weight.view(-1)[5] -= sign * step
    assert slope.abs().max() > 1e-6
    # the losses are taken in fp32, hence the tolerance
    assert slope.view(-1)[5].item() == pytest.approx((numeric[0] - numeric[1]) / (2 * step), rel=2e-2, abs=1e-8)


def test_one_step_by_hand(tiny_vit: Build, clean: ImageSet) -> None:
    """All images in one step of SGD: lr times the slope of cross-entropy + weight * distillation."""
    model, lr = tiny_vit(), 0.002
    both = terms(model, clean)
    slopes = torch.autograd.grad(both["cross_entropy"] + 5 * both["distillation"], list(model.parameters()))
    settings = Sage(epochs=1, lr=lr, weight=5.0, weight_decay=0.0)
    repaired = settings.apply(suspect(model, clean))
    for before, slope, after in zip(model.parameters(), slopes, repaired.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - lr * slope, atol=2e-6, rtol=2e-4)
    assert repaired.report == {
        **{name: pytest.approx(term.item(), rel=1e-4) for name, term in both.items()},
        "clean accuracy": accuracy(repaired.model, clean),
        "last lr": lr,
    }
    assert repaired.layer == "blocks 1, 2"


def test_the_maps_come_closer(tiny_vit: Build, clean: ImageSet) -> None:
    model = tiny_vit(depth=4)
    found = Sage(epochs=15, optimizer="adamw", lr=2e-3).apply(suspect(model, clean))
    assert found.report["distillation"] < 0.3 * terms(model, clean)["distillation"].item()
    assert found.report["clean accuracy"] > accuracy(model, clean)


# ---- the learning rate


@pytest.mark.parametrize(
    ("history", "lowered", "wanted"),
    [
        ([0.0, 0.1, 0.2, 0.3, 0.4], False, False),  # rises each time
        ([0.0, 0.1, 0.2, 0.3, 0.2], False, False),  # 3 of 4 times
        ([0.0, 0.1, 0.2, 0.2, 0.4], False, False),  # a tie is no rise, 3 of 4 times
        ([0.0, 0.1, 0.2, 0.1, 0.1], False, True),  # C1: 2 of 4 times
        ([0.9, 0.1, 0.2, 0.3, 0.4], False, True),  # C2: the best lies before
        ([0.9, 0.1, 0.2, 0.3, 0.4], True, False),  # but the rate was lowered at the last checkpoint
        ([0.9, 0.1, 0.2, 0.1, 0.1], True, True),  # C1 does not ask
        ([0.9, 0.9, 0.0, 0.1, 0.2, 0.3, 0.2], True, False),  # what lies before the last checkpoint is not counted
    ],
)
def test_the_two_conditions(history: list[float], lowered: bool, wanted: bool) -> None:
    assert should_lower(history, 4, 0.75, lowered) is wanted


def test_the_rate_follows_the_accuracy(tiny_vit: Build, clean: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept while it rises; then halved at every other checkpoint for C2, until C1 halves it, too."""
    for seen, factor in [
        ([0.1, 0.2, 0.3, 0.4], 1.0),
        ([0.9, 0.2, 0.3, 0.4], 0.25),  # C2, kept since just lowered, C2
        ([0.9, 0.2, 0.1, 0.0], 0.125),  # C1 each time
    ]:
        values = iter([*seen, 0.0])
        monkeypatch.setattr(sage, "accuracy", lambda model, clean, values=values: next(values))
        report = Sage(epochs=3, every=1, lr=1e-3).apply(suspect(tiny_vit(), clean)).report
        assert report["last lr"] == pytest.approx(1e-3 * factor)


def test_the_rate_follows_the_loss(tiny_vit: Build, clean: ImageSet) -> None:
    falling = Sage(epochs=4, every=2, lr=1e-4, track="loss", optimizer="adamw").apply(suspect(tiny_vit(), clean))
    assert falling.report["last lr"] == 1e-4
    rising = Sage(epochs=4, every=2, lr=0.5, track="loss", clip=1.0).apply(suspect(tiny_vit(), clean))
    assert rising.report["last lr"] < 0.5


def test_the_mean_of_a_loss_is_over_images() -> None:
    epoch = Epoch({"loss": torch.tensor([1.0, 4.0])}, {"loss": [6, 2]})
    assert mean_losses(epoch) == {"loss": 1.75}


def test_accuracy_by_hand(tiny_vit: Build, clean: ImageSet) -> None:
    model = tiny_vit()
    with torch.no_grad():
        right = model(clean.images(torch.arange(24))).argmax(1).eq(clean.labels).float().mean().item()
    assert accuracy(model, clean) == pytest.approx(right)


# ---- settings, what it leaves alone, edge cases


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "softmax"},
        {"power": 1.0},
        {"stages": 2},
        {"weight": 3.0},
        {"optimizer": "adamw"},
        {"lr": 0.002},
        {"epochs": 3},
        {"batch_size": 7},
        {"weight_decay": 0.4},
        {"clip": 0.01},
        {"every": 2},
        {"factor": 0.1},
    ],
)
def test_every_setting_counts(tiny_vit: Build, clean: ImageSet, change: dict[str, Any]) -> None:
    model = tiny_vit(depth=3)
    assert not torch.equal(repair(model, clean, rises=1.0), repair(model, clean, rises=1.0, **change))


def test_the_least_share_of_rises_and_what_is_tracked_count(tiny_vit: Build, clean: ImageSet) -> None:
    model, start = tiny_vit(depth=3), {"epochs": 3, "lr": 1e-4, "track": "loss", "optimizer": "adamw"}
    found = [repair(model, clean, **start, rises=rises) for rises in (0.0, 1.0)]
    assert torch.equal(*found)  # the loss falls each time
    never = [repair(model, clean, **{**start, "track": "accuracy", "rises": rises}) for rises in (0.0, 1.0)]
    assert not torch.equal(found[0], never[1])  # the accuracy does not rise each time
    assert not torch.equal(*never)


def test_the_generator_decides_what_is_random(tiny_vit: Build, clean: ImageSet) -> None:
    found = [repair(tiny_vit(), clean, seed, batch_size=5) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_each_optimiser_has_its_own_rate() -> None:
    assert Sage().lr == Sage(optimizer="sgd").lr == SGD_RATE == 0.05
    assert Sage(optimizer="adamw").lr == ADAMW_RATE == 1e-4
    assert Sage(optimizer="adamw", lr=0.3).lr == 0.3


def snapshot(model: nn.Module) -> list[Any]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    fused = [getattr(m, "fused_attn", None) for m in model.modules()]
    flags = [(w.requires_grad, w.grad) for w in model.parameters()]
    return [weights(model).tolist(), [m.training for m in model.modules()], flags, fused, hooks]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("attention", ["tokens", "softmax"])
def test_the_suspect_stays_and_the_copy_is_ready(
    tiny_vit: Build, clean: ImageSet, frozen: bool, attention: Any
) -> None:
    model = tiny_vit().requires_grad_(not frozen)
    before = snapshot(model)
    repaired = Sage(epochs=1, attention=attention, lr=1e-3).apply(suspect(model, clean))
    assert snapshot(model) == before
    assert isinstance(repaired, Repaired)
    pairs = zip(model.parameters(), repaired.model.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs), "some weight was not trained"
    assert snapshot(repaired.model)[3:] == before[3:]
    assert not any(w.requires_grad or w.grad is not None for w in repaired.model.parameters())
    assert not any(m.training for m in repaired.model.modules())


def test_dropout_is_off_and_torchs_random_state_stays(tiny_vit: Build, clean: ImageSet) -> None:
    with_dropout = tiny_vit(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5, patch_drop_rate=0.5)
    state = torch.get_rng_state()
    found = repair(with_dropout, clean)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, repair(tiny_vit(), clean))


def test_it_trains_where_gradients_are_off_and_as_the_suspect_computes(tiny_vit: Build, clean: ImageSet) -> None:
    """In bf16, copies of the weights must not outlive a step."""
    how = {"epochs": 8, "every": 25}
    exact = repair(tiny_vit(), clean, **how)
    with torch.no_grad():
        assert torch.equal(repair(tiny_vit(), clean, **how), exact)
    model = tiny_vit()
    start = weights(model)
    in_bf16 = replace(suspect(model, clean), compute=Arithmetic("bf16", "eager"))
    rough = weights(Sage(**{**QUICK, **how}).apply(in_bf16).model)
    assert 0 < (rough - exact).norm() < 0.3 * (exact - start).norm()


@pytest.mark.parametrize("attention", ["tokens", "softmax"])
def test_one_image_and_missing_classes(tiny_vit: Build, clean: ImageSet, attention: Any) -> None:
    model, one = tiny_vit(n_classes=15), clean.take(torch.tensor([3]))
    found = Sage(**QUICK, attention=attention).apply(suspect(model, one, n_classes=15))
    assert (recipe_of(Sage(), 1).batch_size, recipe_of(Sage(), 24).batch_size) == (1, 24)
    assert found.model(clean.images(torch.arange(2))).isfinite().all()


def test_a_training_that_diverges_is_named(tiny_vit: Build, clean: ImageSet) -> None:
    with pytest.raises(UserError, match=r"diverged .* lower its lr = 1e\+30"):
        Sage(lr=1e30, epochs=3).apply(suspect(tiny_vit(), clean))


def test_it_needs_two_blocks_of_plain_attention(tiny_vit: Build, clean: ImageSet) -> None:
    with pytest.raises(UserError, match="at least 2 blocks, and the model has 1; choose"):
        Sage().apply(suspect(tiny_vit(depth=1), clean))
    with pytest.raises(UserError, match="no plain token attention"):
        Sage().apply(suspect(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).eval(), clean))


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "cnn"},
        {"power": 0.5},
        {"stages": 1},
        {"weight": -1.0},
        {"optimizer": "adam"},
        {"lr": 0.0},
        {"track": "asr"},
        {"rises": 1.5},
        {"factor": 0.0},
        {"every": 0},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises((UserError, TypeError), match=f"{next(iter(settings))}"):
        Sage(**settings)


def test_it_is_a_defence() -> None:
    assert isinstance(Sage(), Defence)
    assert Sage.kind == "repair"
    assert Sage.needs_attention
