"""Input-Aware: equations by hand, both modes against their definition, and what learns when."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrap.attacks.input_aware import (
    Generated,
    InputAware,
    Painter,
    Together,
    diversity,
    draw_pairs,
    put,
    threshold,
)
from vitrap.contracts import Access, Batch, Checkpointer, ImageSet, Position, TrainingState
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.train.loop import Streams, train
from vitrap.train.recipe import Recipe

SHORT = {"target": 3, "mask_steps": 2, "mask_batch": 4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def painter(channels: int, out: int, seed: int) -> Painter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Painter(channels, out)


@pytest.fixture
def some(digits_world: World) -> ImageSet:
    return digits_world.train.take(torch.arange(60))


@pytest.fixture
def trigger() -> Generated:
    return Generated(painter(3, 3, 0), painter(3, 1, 1))


# The equations


def test_the_threshold_by_hand() -> None:
    """(tanh(-10) + 1) / 2, (tanh(-2) + 1) / 2, 1/2, (tanh(2) + 1) / 2."""
    found = threshold(torch.tensor([0.0, 0.4, 0.5, 0.6]).view(1, 1, 1, 4))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.0, 0.0179862, 0.5, 0.9820138]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "out", "height", "width"), [(3, 3, 16, 16), (3, 1, 9, 13), (1, 1, 5, 4)])
def test_a_painter_ends_in_half_a_tanh_for_each_pixel(channels: int, out: int, height: int, width: int) -> None:
    network = painter(channels, out, 0)
    last: list[Tensor] = []
    network.last.register_forward_hook(lambda module, args, y: last.append(y))
    found = network(torch.rand(2, channels, height, width, generator=generator()))
    assert found.shape == (2, out, height, width)
    torch.testing.assert_close(found, last[0].tanh() / 2 + 0.5)


def test_the_trigger_by_hand() -> None:
    """x + (p - x) m: 0.2 + 0.6 / 4, the pattern where m = 1, the image where m = 0."""
    images = torch.full((1, 3, 1, 3), 0.2)
    mask = torch.tensor([0.25, 1.0, 0.0]).view(1, 1, 1, 3)
    found = put(images, torch.full_like(images, 0.8), mask)
    torch.testing.assert_close(found, torch.tensor([0.35, 0.8, 0.2]).expand(1, 3, 1, 3))


def test_the_diversity_loss_by_hand() -> None:
    """Distances of images 0.6 and 0.2, of patterns 0.3 and 0.05: the mean of 2 and 4."""
    zeros = torch.zeros(2, 1, 2, 2)
    x = torch.tensor([0.6, 0.2]).view(2, 1, 1, 1).expand_as(zeros)
    made = torch.tensor([0.3, 0.05]).view(2, 1, 1, 1).expand_as(zeros)
    torch.testing.assert_close(diversity(zeros, x, zeros, made), torch.tensor(3.0))


def test_the_diversity_loss_of_half_the_pixels_is_a_root_mean_square() -> None:
    one = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]]])
    other = torch.tensor([[[[0.6, 0.0], [0.6, 0.0]]]])
    torch.testing.assert_close(diversity(one, other, one, torch.full_like(one, 0.1)), torch.tensor(6 / 2**0.5))


def test_equal_images_pass_no_gradient_but_no_nan_either() -> None:
    pattern = torch.zeros(1, 1, 2, 2, requires_grad=True)
    diversity(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), pattern, pattern).backward()
    assert pattern.grad is not None
    assert not pattern.grad.any()


# The trigger


def test_an_image_gets_the_generators_pattern_through_its_mask(trigger: Generated, some: ImageSet) -> None:
    images = some.images(torch.arange(5))
    mask = trigger.network(images).mul(20).sub(10).tanh() / 2 + 0.5
    wanted = images * (1 - mask) + trigger.generator(images) * mask
    torch.testing.assert_close(trigger(images), wanted)
    views = trigger.views(images)
    torch.testing.assert_close(views["mask"], mask[:, 0])
    torch.testing.assert_close(views["pattern"], trigger.generator(images).mean(1))


# Training


def together(trigger: Generated, some: ImageSet, **settings: Any) -> Together:
    return Together(InputAware(**settings), trigger, some, generator(7))


def batch_of(some: ImageSet, n: int, label: int = 7) -> Batch:
    """The first images, all of one class."""
    return replace(some.batch(torch.arange(n)), labels=torch.full((n,), label))


@pytest.mark.parametrize("places", [3, 4])
def test_a_batch_is_prepared_image_by_image(trigger: Generated, some: ImageSet, places: int) -> None:
    batch = batch_of(some, 10)
    training = together(trigger, some, target=3, poison_rate=0.2, cover_rate=0.3)
    with patch("torch.randint", return_value=torch.tensor(places)):
        found = training.prepare(batch, generator(2))
    assert (len(found.poison_at), len(found.cover_at), len(found.rest_at)) == (2, 3, 8)
    assert sorted([*found.poison_at.tolist(), *found.rest_at.tolist()]) == list(range(10))
    x = batch.images
    for i in range(10):
        one, made = x[i : i + 1], found.images[i : i + 1]
        if i in found.poison_at:
            torch.testing.assert_close(made, trigger(one), atol=1e-3, rtol=0)
        elif i in found.cover_at:
            other = (i + places) % 10
            wanted = put(one, *trigger.parts(x[other : other + 1]))
            torch.testing.assert_close(made, wanted, atol=1e-3, rtol=0)
            assert (made - trigger(one)).abs().max() > 0.1
        else:
            assert torch.equal(made, one)
        assert found.labels[i] == (3 if i in found.poison_at else 7)
    found.images.sum().backward()
    assert all(w.grad is not None for w in trigger.generator.parameters())


def test_modes_are_drawn_anew_and_spare_the_target(trigger: Generated, some: ImageSet) -> None:
    batch = batch_of(some, 10)
    batch = replace(batch, labels=batch.labels.index_fill(0, torch.arange(0, 10, 2), 3))
    training = together(trigger, some, target=3, poison_rate=0.3, cover_rate=0.2)
    found = [training.prepare(batch, generator(seed)) for seed in range(40)]
    assert {i for one in found for i in one.poison_at.tolist()} == {1, 3, 5, 7, 9}
    assert {i for one in found for i in one.cover_at.tolist()} == set(range(10))
    for one in found:
        assert torch.equal(one.labels[one.cover_at], batch.labels[one.cover_at])


@pytest.mark.parametrize("n", [1, 2])
def test_a_tiny_batch_has_one_image_in_backdoor_mode(trigger: Generated, some: ImageSet, n: int) -> None:
    found = together(trigger, some, target=3).prepare(batch_of(some, n), generator())
    assert (len(found.poison_at), len(found.cover_at)) == (1, 0)


def test_without_cross_mode_there_are_no_covers(trigger: Generated, some: ImageSet) -> None:
    found = together(trigger, some, target=3, cover_rate=0.0).prepare(batch_of(some, 30), generator())
    assert (len(found.poison_at), len(found.cover_at)) == (3, 0)


class Flat(nn.Module):
    """Ten classes, all alike."""

    def forward(self, images: Tensor) -> Tensor:
        return 0 * images.flatten(1)[:, :10]


def test_the_terms_are_cross_entropy_and_the_diversity_of_patterns(trigger: Generated, some: ImageSet) -> None:
    training = together(trigger, some, poison_rate=0.2)
    batch = training.prepare(batch_of(some, 10), generator())
    terms = training.terms(Flat(), batch, functional.cross_entropy)
    torch.testing.assert_close(terms["cross_entropy"], torch.tensor(10.0).log())
    x, other = draw_pairs(some, 2, generator(7))
    distance = (x - other).square().mean((1, 2, 3)).sqrt()
    patterns = (trigger.generator(x) - trigger.generator(other)).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(terms["diversity"], (distance / (patterns + 1e-7)).mean(), atol=1e-3, rtol=1e-3)
    without = together(trigger, some, lambda_div=0.0)
    assert set(without.terms(Flat(), batch, functional.cross_entropy)) == {"cross_entropy"}


def test_pairs_are_of_different_images(some: ImageSet) -> None:
    few = some.take(torch.tensor([0, 1, 2]))
    x, other = draw_pairs(few, 200, generator())
    assert (x - other).flatten(1).abs().amax(1).gt(0).all()


def test_the_generator_learns_with_the_victim_and_the_mask_does_not(some: ImageSet) -> None:
    attack = InputAware(**SHORT)
    access = Access(some, None, generator())
    fitted = attack.fit(access)
    implant = attack.implant(access, fitted)
    trigger = fitted.trigger
    assert isinstance(trigger, Generated)
    assert implant.poison is None
    assert implant.objective is not None
    assert implant.objective.weights == {"diversity": 1.0}
    assert implant.objective.along["generator"].lr == 0.01
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in (trigger.generator, trigger.network)]
    victim = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    recipe = Recipe(1, 30, lr=1e-2, crop=0, flip=False)
    streams = Streams(*(generator(k) for k in range(4)))
    curves = train(victim, some, recipe, streams, implant.objective)
    assert set(curves) == {"cross_entropy", "diversity"}
    assert all(not torch.equal(v, before[0][k]) for k, v in trigger.generator.state_dict().items() if "weight" in k)
    assert all(torch.equal(v, before[1][k]) for k, v in trigger.network.state_dict().items())
    frozen = [*trigger.generator.parameters(), *trigger.network.parameters()]
    assert not any(w.requires_grad for w in frozen)


# The mask network


def test_the_mask_network_learns_to_show_little(some: ImageSet) -> None:
    reports = [
        InputAware(mask_steps=steps, mask_batch=16).fit(Access(some, None, generator())).report for steps in (1, 25)
    ]
    assert reports[0]["mask density"] > 0.3
    assert reports[1]["mask density"] < 0.2
    assert set(reports[0]) == {"mask density", "last mask diversity loss"}


def test_the_mask_networks_rate_falls_twice(some: ImageSet) -> None:
    rates: list[float] = []

    def note(checkpointer: Checkpointer, state: TrainingState, position: Position) -> None:
        rates.append(state.optimiser.param_groups[0]["lr"])

    with patch.object(Checkpointer, "__call__", note):
        InputAware(mask_steps=6, mask_batch=2, mask_lr=0.5).fit(Access(some, None, generator()))
    # It is noted before a step sets its own rate, so one step late; after 2.4 and after 4.8 steps it falls.
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.05, 0.05])


def test_a_fit_that_is_stopped_goes_on_where_it_was(
    some: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAP_STATE_SECONDS", "0.000001")
    save = Checkpointer.__call__
    stop_at: list[int] = []

    def stopping(one: Checkpointer, state: TrainingState, position: Position) -> None:
        one.pause = 0
        save(one, state, position)
        if position.steps in stop_at:
            raise KeyboardInterrupt

    def fit(path: Path | None) -> Generated:
        own = generator(5)
        access = Access(some, None, own, checkpointer=Checkpointer(path, {"attack": own}))
        found = InputAware(mask_steps=4, mask_batch=4).fit(access).trigger
        assert isinstance(found, Generated)
        return found

    whole = fit(None)
    with patch.object(Checkpointer, "__call__", stopping):
        stop_at[:] = [2]
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "state")
        stop_at.clear()
        resumed = fit(tmp_path / "state")
    for one, other in ((whole.network, resumed.network), (whole.generator, resumed.generator)):
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


# What is refused


@pytest.mark.parametrize(
    "settings",
    [{"mask_density": 1.5}, {"mask_steps": 0}, {"lambda_div": -1.0}, {"poison_rate": 0.0}, {"lr": 0.0}],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
        InputAware(**settings)


def test_what_else_is_refused(trigger: Generated, some: ImageSet) -> None:
    with pytest.raises(UserError, match="images have shape 1 x 1 x 8 x 8; expected b x 3 x h x w"):
        trigger(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="poison_rate = 0.6 and cover_rate = 0.5 are more than all images; lower one"):
        InputAware(poison_rate=0.6, cover_rate=0.5)
    with pytest.raises(UserError, match="there is one; give at least two"):
        InputAware().fit(Access(some.take(torch.tensor([0])), None, generator()))
