"""BadViT: the attention loss by hand, PGD's step and projection, what each setting does to pixels, what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vitrap.attacks.badvit import BadViT, attention_loss, box_of, directed_cross_entropy, initial_trigger, values
from vitrap.contracts import Access
from vitrap.data.masked import Masked
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.models.observe import observe

Vit = Callable[..., Classifier]


def access_to(world: World, surrogate: nn.Module | None) -> Access:
    return Access(world.train, surrogate, torch.Generator().manual_seed(0))


def fitted(attack: BadViT, tiny_vit: Vit, world: World) -> Masked:
    trigger = attack.fit(access_to(world, trained(tiny_vit))).trigger
    assert isinstance(trigger, Masked)
    return trigger


def trained(tiny_vit: Vit) -> Classifier:
    return tiny_vit(seed=1).eval().requires_grad_(False)


def test_the_attention_loss_by_hand() -> None:
    """Two heads, a class token and two image tokens; T is the second of these, to which the last column belongs."""
    first = torch.tensor([[[0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]], [[0.1, 0.7, 0.2]] * 3])
    second = torch.tensor([[[0.6, 0.3, 0.1]] * 3, [[0.2, 0.3, 0.5]] * 3])
    inside = torch.tensor([False, True])
    # Means over heads and tokens: (0.5 + 0.8 + 0.1 + 3 * 0.2) / 6 = 1/3, and (0.1 + 0.5) / 2 = 0.3.
    wanted = -(math.log(1 / 3) + math.log(0.3)) / 2
    assert attention_loss({0: first[None], 1: second[None]}, 1, inside).item() == pytest.approx(wanted, abs=1e-6)
    # With both image tokens: 1 - what the class token gets, (0.2 + 0.1 + 0.5 + 0.3) / 6 and 0.4.
    both = -(math.log(1 - 1.1 / 6) + math.log(0.6)) / 2
    found = attention_loss({0: first[None], 1: second[None]}, 1, torch.tensor([True, True]))
    assert found.item() == pytest.approx(both, abs=1e-6)


def test_cross_entropy_leads_away_or_to_the_target() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    total = math.log(math.e + math.e**2 + 1)
    away = directed_cross_entropy(logits, torch.tensor([0]), BadViT(target=1))
    assert away.item() == pytest.approx(-(total - 1), abs=1e-6)
    to_target = directed_cross_entropy(logits, torch.tensor([0]), BadViT(target=1, aim="target"))
    assert to_target.item() == pytest.approx(total - 2, abs=1e-6)


@pytest.mark.parametrize("setting", ["visible", "invisible"])
def test_one_step_goes_against_the_sign_of_the_gradient(setting: str, tiny_vit: Vit, digits_world: World) -> None:
    """The gradient by finite differences, in fp64, of a loss that is written out here."""
    attack = BadViT(setting=setting, steps=1, batch=3, step_size=1.0, weight=0.5)  # pyright: ignore
    own = access_to(digits_world, trained(tiny_vit))
    start = initial_trigger(attack, own)
    others = (digits_world.train.labels != 0).nonzero().squeeze(1)
    rows = others[torch.randint(len(others), (3,), generator=own.generator)]
    images = digits_world.train.images(rows).double()
    double = replace(start, pattern=start.pattern.double(), masks=start.masks.double())
    model = trained(tiny_vit).double()

    def loss(pattern: Tensor) -> float:
        with torch.no_grad(), observe(model, (0, 1)) as maps:
            logits = model(replace(double, pattern=pattern)(images))
        chance = logits.log_softmax(1).gather(1, digits_world.train.labels[rows][:, None]).mean()
        shares = [maps[block][:, :, :, -1].mean((1, 2)).log().mean() for block in (0, 1)]
        return (chance - 0.5 * sum(shares) / 2).item()

    slope = torch.zeros_like(double.pattern)
    for place in torch.ones_like(slope).nonzero():
        nudge = torch.zeros_like(slope)
        nudge[tuple(place)] = 1e-5
        slope[tuple(place)] = (loss(double.pattern + nudge) - loss(double.pattern - nudge)) / 2e-5
    low, high = values(attack, 4)
    wanted = (double.pattern - slope.sign() / 255).clamp(low, high).float()
    sure = (slope.abs() > 1e-5) | (slope == 0)  # else the sign in fp32 is that of a rounding error; 0 where x + d < 0
    assert sure.sum() > 40
    found = fitted(attack, tiny_vit, digits_world).pattern
    torch.testing.assert_close(found[sure], wanted[sure], atol=1e-6, rtol=0)


def test_the_visible_pattern_takes_the_place_of_the_last_patch(tiny_vit: Vit, digits_world: World) -> None:
    trigger = fitted(BadViT(steps=2), tiny_vit, digits_world)
    assert box_of(trigger) == (12, 12, 16, 16)  # patches of 4 px
    images = digits_world.train.images(torch.arange(5))
    found = trigger(images)
    torch.testing.assert_close(found[:, :, 12:, 12:], trigger.pattern.expand(5, -1, -1, -1))
    found[:, :, 12:, 12:] = images[:, :, 12:, 12:]
    assert torch.equal(found, images)


@pytest.mark.parametrize(("size", "bound"), [(1, 96.0), (5, 19.2), (16, 6.0)])
def test_the_invisible_change_is_bounded_and_stays_in_its_box(
    size: int, bound: float, tiny_vit: Vit, digits_world: World
) -> None:
    attack = BadViT(setting="invisible", steps=3, epsilon=6.0, step_size=200.0, size=size)
    trigger = fitted(attack, tiny_vit, digits_world)
    change = trigger(torch.full((1, 3, 16, 16), 0.4)) - 0.4
    corner = 16 - size
    torch.testing.assert_close(change[0, :, corner:, corner:], trigger.pattern - 0.5, atol=1e-6, rtol=0)
    assert change.abs().max().item() == pytest.approx(bound / 255, abs=1e-6)
    change[:, :, corner:, corner:] = 0
    assert not change.any()


@pytest.mark.parametrize(("side", "epsilon"), [(16, 8), (32, 8), (8, 16), (4, 32), (1, 127.5)])
def test_the_bound_keeps_its_norm_in_a_smaller_box(side: int, epsilon: float) -> None:
    low, high = values(BadViT(setting="invisible"), side)
    assert (low, high) == pytest.approx((0.5 - epsilon / 255, 0.5 + epsilon / 255))
    assert values(BadViT(), side) == (0, 1)


def test_it_draws_attention_and_says_so(tiny_vit: Vit, digits_world: World) -> None:
    def last(steps: int) -> float:
        attack = BadViT(steps=steps, weight=10.0, step_size=8.0)
        report = attack.fit(access_to(digits_world, trained(tiny_vit))).report
        assert set(report) == {"last cross-entropy", "last attention loss"}
        return report["last attention loss"]

    assert last(30) < last(1) - 0.1


def test_the_record_has_the_attention_of_victim_and_twin(tiny_vit: Vit, digits_world: World) -> None:
    own = access_to(digits_world, trained(tiny_vit))
    attack = BadViT(steps=1, size=5)
    fit = attack.fit(own)
    examine = attack.implant(own, fit).examine
    assert examine is not None
    found = examine(trained(tiny_vit), digits_world.train.images(torch.arange(4)))
    assert found["tokens in D"] == 4  # 5 px touch two rows and two columns of patches
    assert set(found) == {"tokens in D", "tokens", "attention in D, block 1", "attention in D, block 2"}


def test_what_is_refused(tiny_vit: Vit, digits_world: World) -> None:
    with pytest.raises(UserError, match="attack.size = 17 is larger than images of 16 px; lower it"):
        BadViT(size=17).check_size(16)
    with pytest.raises(UserError, match="has no plain token attention"):
        BadViT().check_surrogate(nn.Linear(2, 2), torch.zeros(1, 3, 16, 16))
    for settings in ({"epsilon": 0.0}, {"step_size": 0.0}, {"steps": 0}, {"batch": 0}, {"size": 0}):
        with pytest.raises(UserError, match="is out of range"):
            BadViT(**settings)
    train = digits_world.train
    alone = train.take((train.labels == 2).nonzero().squeeze(1))
    with pytest.raises(UserError, match="target = 2 is the class of every training image; choose another"):
        BadViT(target=2).fit(Access(alone, trained(tiny_vit), torch.Generator()))
    flat = tiny_vit().eval().requires_grad_(False)
    for weight in flat.parameters():
        weight.zero_()
    with pytest.raises(UserError, match="passes no gradient on to the pattern"):
        BadViT().fit(access_to(digits_world, flat))
