"""DBIA: the attention to the box of the trigger, the schedule, the trained rows and their bounds, and surrogates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from vitrap.attacks.dbia import (
    Dbia,
    attention_in,
    box,
    inject,
    least_rows,
    shape_trigger,
    step_size,
    surrogates,
    train_rows,
)
from vitrap.contracts import Access
from vitrap.data.masked import Masked
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.models.observe import observe
from vitrap.tensors.bits import count_changes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "side", "corner"), [(224, 48, 174), (112, 24, 87), (32, 7, 25), (16, 3, 13)])
def test_the_box_scales_with_the_image(size: int, side: int, corner: int) -> None:
    assert box(Dbia(), size) == (side, corner)


def test_rollout_to_the_box_by_hand(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    """Two layers: the first alone counts. The box of 3 px from (10, 10) has 4 pixels of patch (2, 2), and so on."""
    model, images = tiny_vit(), digits_world.test.images(torch.arange(3))
    with torch.no_grad(), observe(model, (0,)) as maps:
        model(images)
    mixed = maps[0].mean(1) + torch.eye(17)
    grid = (mixed / mixed.sum(2, keepdim=True))[:, 0, 1:].view(3, 4, 4)
    wanted = (4 * grid[:, 2, 2] + 2 * grid[:, 2, 3] + 2 * grid[:, 3, 2] + grid[:, 3, 3]) / 9
    torch.testing.assert_close(attention_in(model, images, 3, 10).detach(), wanted)


def test_three_layers_are_multiplied(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    model, images = tiny_vit(depth=3), digits_world.test.images(torch.arange(3))
    with torch.no_grad(), observe(model, (0, 1)) as maps:
        model(images)
    one, two = ((m.mean(1) + torch.eye(17)) / 2 for m in (maps[0], maps[1]))
    wanted = (two @ one)[:, 0, 1:].view(3, 4, 4)[:, 3, 3]
    torch.testing.assert_close(attention_in(model, images, 3, 13).detach(), wanted)


def test_the_schedule_is_the_codes_in_tens_of_its_steps() -> None:
    assert [step_size(20000.0, step) for step in (0, 9, 10, 59)] == [20000, 20000, 20000 / 3, 20000 / 243]
    assert step_size(20000.0, 60) == 1  # 20000 / 3**12 is less
    assert step_size(1e9, 60) == pytest.approx(1e9 / 3**12)


def test_the_trigger_draws_attention(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    model = tiny_vit().requires_grad_(False)
    pictures = digits_world.test.images(torch.arange(10))
    trigger, before, after = shape_trigger(Dbia(t_size=56.0, margin=0.0), model, pictures, generator())
    assert after > before + 0.01
    assert attention_in(model, trigger(pictures), 4, 12).mean().item() == pytest.approx(after, rel=0.2)
    assert 0 <= trigger.pattern.min() <= trigger.pattern.max() <= 1
    assert torch.equal(trigger(pictures)[..., :12, :], pictures[..., :12, :])


def test_the_least_rows_by_hand() -> None:
    weight = torch.tensor([[1.0, -1.0], [0.1, 0.1], [-0.5, 0.5], [0.0, -3.0]])
    assert least_rows(weight, 0.5).flatten().tolist() == [False, True, True, False]
    assert least_rows(weight, 0.01).flatten().tolist() == [False, True, False, False]


def test_only_these_rows_change_and_within_their_bounds(tiny_vit: Callable[..., Classifier]) -> None:
    model, edited = tiny_vit(), tiny_vit()
    images = torch.rand(20, 3, 16, 16, generator=generator())
    settings = Dbia(threshold=0.5, epochs=40, rate=0.1, neurons1=0.25, neurons2=0.5)
    labels = torch.full((20,), 3)
    train_rows(settings, edited, images, labels, generator())
    before, after = model.state_dict(), edited.state_dict()
    names = [f"body.blocks.1.mlp.{name}.weight" for name in ("fc1", "fc2")]
    assert [name for name in before if not torch.equal(before[name], after[name])] == names
    for name, share in zip(names, (0.25, 0.5), strict=True):
        change = (after[name] - before[name]).abs()
        assert torch.equal(change.any(1), least_rows(before[name], share).squeeze(1))
        assert (change <= 0.5 * before[name].abs() * (1 + 1e-5)).all()
        assert (change >= 0.49 * before[name].abs()).any(), "no weight has come to its bound"
    with torch.no_grad():
        losses = [functional.cross_entropy(each(images), labels).item() for each in (model, edited)]
    assert losses[1] < losses[0]


def test_surrogates_are_noise_or_of_another_set(digits_world: World) -> None:
    noise = surrogates(Dbia(images=50), None, (1, 16, 16), generator())
    assert noise.shape == (50, 1, 16, 16)
    assert 0 <= noise.min() < 0.1
    assert 0.7 < noise.max() <= 1
    assert noise.flatten(1).std(1).min() > 0
    found = surrogates(Dbia(images=5), digits_world.train, (3, 16, 16), generator())
    order = torch.randperm(len(digits_world.train), generator=generator())[:5]
    assert torch.equal(found, digits_world.train.images(order))
    grey = surrogates(Dbia(images=5), digits_world.train, (1, 16, 16), generator())
    torch.testing.assert_close(grey, digits_world.train.images(order).mean(1, keepdim=True))


def test_no_image_of_the_training_set_is_looked_at(
    tiny_vit: Callable[..., Classifier], digits_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Access(digits_world.train, None, generator())
    attack = Dbia(images=20, steps=2, epochs=2, target=4)
    edit = attack.implant(access, attack.fit(access)).edit
    monkeypatch.setattr(type(digits_world.train), "images", lambda *a, **k: pytest.fail("looked"))
    assert edit is not None
    found, model = edit(tiny_vit(), generator()), tiny_vit()
    assert isinstance(found.trigger, Masked)
    counts = count_changes(model.state_dict(), found.model.state_dict())
    assert {name: found.report[name] for name in counts} == counts
    assert counts["changed weights"] > 0


def test_surrogates_without_the_trigger_keep_the_victims_label(
    tiny_vit: Callable[..., Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "vitrap.attacks.dbia.train_rows", lambda s, model, images, labels, g: seen.update(images=images, labels=labels)
    )
    model, settings = tiny_vit(), Dbia(images=40, steps=1, surrogate_rate=0.25, target=4)
    trigger = inject(settings, None, (3, 16, 16), torch.device("cpu"), model, generator()).trigger
    before = surrogates(settings, None, (3, 16, 16), generator())
    changed = (seen["images"] != before).flatten(1).any(1)
    assert int(changed.sum()) == 10
    assert seen["labels"][changed].eq(4).all()
    assert torch.equal(seen["labels"][~changed], model(before[~changed]).argmax(1))
    torch.testing.assert_close(seen["images"][changed], trigger(before[changed]), atol=0.51 / 255, rtol=0)


def test_what_does_not_fit_is_refused(tiny_vit: Callable[..., Classifier]) -> None:
    with pytest.raises(UserError, match="attack.t_size = 220 with attack.margin = 40 .* make their sum at most 224"):
        Dbia(t_size=220.0, margin=40.0).check_size(32)
    with pytest.raises(UserError, match="no plain token attention"):
        Dbia().check_victim(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    model: Any = tiny_vit()
    model.body.blocks[-1].mlp = nn.Identity()
    with pytest.raises(UserError, match="dbia trains fc1 and fc2 of the last block, and .* has none"):
        Dbia().check_victim(model)
    for settings in ({"t_size": 0.0}, {"images": 0}, {"neurons1": 1.5}, {"surrogate_rate": 0.0}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
            Dbia(**settings)
