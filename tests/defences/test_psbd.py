"""PSBD: PSU and shift ratios by hand and by loops, the choice of the rate, and a score that an image alone decides."""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Suspect
from vitrap.data.sources import World
from vitrap.defences.psbd import Form, Psbd, best_rate_index, prediction_shift_uncertainty, sample, shift_ratios, shifts
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.models.dropout import Where, dropout, dropout_masks, dropout_noise

Build = Callable[..., Classifier]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=generator(seed))


def some(world: World, n: int) -> ImageSet:
    return world.clean.take(torch.arange(n))


def suspect(
    model: nn.Module, clean: ImageSet, train: ImageSet | None = None, seed: int = 0, n_classes: int = 10
) -> Suspect:
    return Suspect(model, clean, n_classes, generator(seed), train)


@torch.no_grad()
def passes_by_loop(model: Classifier, image: Tensor, where: Where, masks: Tensor) -> np.ndarray:
    """Probabilities of one image, one pass at a time."""
    found = []
    for mask in masks:
        with dropout(model, where, mask[None]):
            found.append(model(image[None])[0].softmax(0).double().numpy())
    return np.array(found)


# The equations


def test_psu_by_hand() -> None:
    bare = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    dropped = torch.tensor([[[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], [[0.1, 0.0, 0.9], [0.0, 0.1, 0.9]]])
    # class 0: 0.7 - (0.1 + 0.3) / 2; class 2, of which dropout makes the model surer: 0.6 - 0.9
    torch.testing.assert_close(prediction_shift_uncertainty(bare, dropped), torch.tensor([0.5, -0.3]))


def test_shifts_by_hand() -> None:
    bare = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    dropped = torch.tensor([[[0.1, 0.8, 0.1], [0.5, 0.2, 0.3]], [[0.1, 0.0, 0.9], [0.0, 0.1, 0.9]]])
    assert shifts(bare, dropped).tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("clean", "training", "best"),
    [
        ([0.1, 0.5, 0.8, 0.9], None, 2),  # the smallest that reaches 0.8
        ([0.1, 0.5, 0.7, 0.6], None, 2),  # none does: the greatest
        ([0.8, 0.9, 0.85], [0.7, 0.5, 0.6], 1),  # the greatest lead
        ([0.3, 0.8, 0.9], [0.0, 0.75, 0.8], 2),  # a lead below 0.8 does not count
        ([0.3, 0.5, 0.6], [0.0, 0.4, 0.5], 0),  # but where nothing reaches 0.8
        ([0.9, 0.9], [0.5, 0.5], 0),  # a tie goes to the smaller rate
        ([0.0, 0.0], None, 0),
    ],
)
def test_the_choice_of_the_rate(clean: Sequence[float], training: Sequence[float] | None, best: int) -> None:
    assert best_rate_index(clean, training, 0.8) == best


@pytest.mark.parametrize("where", get_args(Where))
def test_shift_ratios_are_those_of_a_loop(tiny_vit: Build, digits_world: World, where: Where) -> None:
    model, clean, rates = tiny_vit(), some(digits_world, 12), [0.2, 0.5, 0.8]
    noise = dropout_noise(model, where, 4, generator())
    found = shift_ratios(model, where, noise, rates, clean)
    images = clean.images(torch.arange(12))
    for rate, ratio in zip(rates, found, strict=True):
        masks, moved = dropout_masks(model, where, noise, rate), 0
        for image in images:
            own = model(image[None]).argmax().item()
            moved += int((passes_by_loop(model, image, where, masks).argmax(1) != own).sum())
        assert ratio == pytest.approx(moved / 48)
    assert max(found) > 0


# The score


@pytest.mark.parametrize("psu", get_args(Form))
@pytest.mark.parametrize("where", get_args(Where))
@torch.no_grad()
def test_the_score_is_minus_psu_of_a_loop(tiny_vit: Build, digits_world: World, where: Where, psu: Form) -> None:
    model, images = tiny_vit(), drawn(4)
    screen = Psbd(where=where, psu=psu, passes=5, rate=0.4).apply(suspect(model, some(digits_world, 5)))
    masks = dropout_masks(model, where, dropout_noise(model, where, 5, generator()), 0.4)
    wanted = []
    for image in images:
        bare = model(image[None])[0].softmax(0).double().numpy()
        own = bare.argmax()
        left = passes_by_loop(model, image, where, masks)[:, own].mean()
        wanted.append(left / bare[own] - 1 if psu == "ratio" else left - bare[own])
    torch.testing.assert_close(screen.score(images).double(), torch.tensor(wanted), atol=1e-6, rtol=1e-5)
    assert screen.score(images).std() > 1e-3


def test_a_prediction_that_dropout_does_not_move_scores_zero_and_the_others_less(tiny_vit: Build) -> None:
    model = tiny_vit()
    bare, still, moved = torch.tensor([[0.9, 0.1]]), torch.tensor([[[0.9, 0.1]]]), torch.tensor([[[0.2, 0.8]]])
    psu = [prediction_shift_uncertainty(bare, dropped).item() for dropped in (still, moved)]
    assert psu[0] == pytest.approx(0)
    assert -psu[0] > -psu[1]
    head: Any = model.body.head
    with torch.no_grad():
        head.weight.mul_(1e-9)  # the bias alone decides
        head.bias[0] = 1
    images = ImageSet(
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1).long(), torch.zeros(1).long(), 10, 16
    )
    screen = Psbd(passes=3).apply(suspect(model, images))
    torch.testing.assert_close(screen.score(drawn()), torch.zeros(3))
    assert screen.report == {"rate": 0.1, "shift ratio, clean": 0.0}


def test_a_score_depends_on_the_image_alone(tiny_vit: Build, digits_world: World) -> None:
    screen, images = Psbd(passes=3, images=20).apply(suspect(tiny_vit(), some(digits_world, 20))), drawn(5)
    first = screen.score(images)
    assert first.shape == (5,)
    assert torch.equal(screen.score(images), first)
    torch.testing.assert_close(screen.score(images.flip(0)).flip(0), first)
    for number in range(5):
        torch.testing.assert_close(screen.score(images[number : number + 1])[0], first[number])
    assert screen.score(images[:0]).shape == (0,)


def test_the_model_and_the_global_random_state_stay(tiny_vit: Build, digits_world: World) -> None:
    model = tiny_vit()
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    Psbd(passes=3, images=20).apply(suspect(model, some(digits_world, 20))).score(drawn())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(w.requires_grad and w.grad is None for w in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in model.modules())


def test_half_precision_ends_at_the_logits(tiny_vit: Build, digits_world: World) -> None:
    screen, images = Psbd(passes=3, rate=0.3).apply(suspect(tiny_vit(), some(digits_world, 5))), drawn()
    with torch.autocast("cpu", torch.bfloat16):
        found = screen.score(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, screen.score(images), atol=0.05, rtol=0)


# The choice of the rate


def test_without_a_training_set_the_first_rate_that_shifts_enough(tiny_vit: Build, digits_world: World) -> None:
    model, clean = tiny_vit(), some(digits_world, 40)
    noise = dropout_noise(model, "stream", 3, generator())
    rates = [i / 10 for i in range(1, 10)]
    ratios = shift_ratios(model, "stream", noise, rates, clean)
    first = next(i for i, ratio in enumerate(ratios) if ratio >= 0.4)
    screen = Psbd(passes=3, shift=0.4).apply(suspect(model, clean))
    assert screen.report == {"rate": rates[first], "shift ratio, clean": ratios[first]}
    assert screen.layer == "blocks, stream"


def test_a_training_set_decides_among_the_rates_that_shift_enough(tiny_vit: Build, digits_world: World) -> None:
    model, clean = tiny_vit(), some(digits_world, 30)
    train = digits_world.train.take(torch.arange(30))
    noise = dropout_noise(model, "stream", 3, generator())
    rates = [i / 10 for i in range(1, 10)]
    own, theirs = (np.array(shift_ratios(model, "stream", noise, rates, data)) for data in (clean, train))
    lead = np.where(own >= 0.3, own - theirs, -np.inf)
    report = Psbd(passes=3, shift=0.3).apply(suspect(model, clean, train)).report
    best = lead.argmax()
    assert report == {"rate": rates[best], "shift ratio, clean": own[best], "shift ratio, training": theirs[best]}


def test_a_given_rate_is_taken_as_it_is(tiny_vit: Build, digits_world: World) -> None:
    model, clean = tiny_vit(), some(digits_world, 20)
    assert Psbd(passes=3, rate=0.37).apply(suspect(model, clean)).report == {"rate": 0.37}


def test_a_sample_is_drawn_without_replacement(digits_world: World) -> None:
    clean = some(digits_world, 30)
    assert len(set(sample(clean, 12, generator()).index.tolist())) == 12
    assert sorted(sample(clean, 99, generator()).index.tolist()) == sorted(clean.index.tolist())


@pytest.mark.parametrize(
    "changed",
    [
        {"where": "residual"},
        {"where": "token"},
        {"psu": "ratio"},
        {"passes": 5},
        {"rate": 0.35},
        {"rates": 2},
        {"shift": 0.05},
    ],
)
def test_every_parameter_has_an_effect(tiny_vit: Build, digits_world: World, changed: dict[str, Any]) -> None:
    model, clean = tiny_vit(), some(digits_world, 20)
    usual, other = (
        Psbd(**{"passes": 3, "shift": 0.4, **how}).apply(suspect(model, clean)).score(drawn()) for how in ({}, changed)
    )
    assert not torch.allclose(usual, other, atol=1e-4)


def test_only_so_many_images_choose_the_rate(
    tiny_vit: Build, digits_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "vitrap.defences.psbd.shift_ratios", lambda *args: seen.append(len(args[-1])) or [0.0] * len(args[3])
    )
    clean, train = some(digits_world, 20), digits_world.train.take(torch.arange(50))
    Psbd(passes=3, images=30).apply(suspect(tiny_vit(), clean, train))
    assert seen == [20, 30]


def test_one_clean_image_and_more_classes_than_it_shows_will_do(tiny_vit: Build, digits_world: World) -> None:
    screen = Psbd(passes=3).apply(suspect(tiny_vit(n_classes=23), some(digits_world, 1), n_classes=23))
    assert screen.score(drawn()).isfinite().all()
    assert 0 <= screen.report["shift ratio, clean"] <= 1


# Refusals


def test_a_network_without_plain_attention_is_refused(digits_world: World) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 10)).eval()
    with pytest.raises(UserError, match="no plain token attention"):
        Psbd(passes=3).apply(suspect(network, some(digits_world, 5)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"passes": 0},
        {"rate": 0.0},
        {"rate": 1.0},
        {"rates": 0},
        {"shift": 1.2},
        {"images": 0},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Psbd(**wrong)
