"""Patch processing: pixels against tokens in every family, the statistics by hand, both transforms as one score."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Screen, Suspect
from vitrap.data.sources import World
from vitrap.defences.patch_process import (
    TRANSFORMS,
    PatchChange,
    PatchProcess,
    PatchScore,
    balanced_draws,
    from_patches,
    label_changes,
    share_exceeded,
    to_patches,
)
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier

Build = Callable[..., Classifier]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit, registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "vit, average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02, rotary": ("eva02_tiny_patch14_224", {}),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_transform = pytest.mark.parametrize("transform", TRANSFORMS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=generator(seed))


def clean_set(images: Tensor, n_classes: int = 10) -> ImageSet:
    n = len(images)
    pixels = (images * 255).round().to(torch.uint8)
    return ImageSet(pixels, torch.zeros(n, dtype=torch.int64), torch.arange(n), n_classes, images.shape[-1])


def screened(model: nn.Module, clean: ImageSet, seed: int = 0, **settings: Any) -> Screen:
    return PatchProcess(**settings).apply(Suspect(model, clean, 10, generator(seed)))


@contextmanager
def embedding_changed(model: Classifier, change: Callable[[Tensor], Tensor]) -> Any:
    """What the patch embedding gives, before anything is added to it, changed."""
    embedding: Any = model.body.patch_embed
    hook = embedding.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        hook.remove()


# Patches and tokens


def test_patches_are_the_blocks_of_the_image_row_by_row() -> None:
    images = drawn(2, 12)
    patches = to_patches(images, (3, 4))
    assert patches.shape == (2, 12, 3, 4, 3)
    for place in range(12):
        top, left = place // 4 * 4, place % 4 * 3
        assert torch.equal(patches[:, place], images[:, :, top : top + 4, left : left + 3])
    assert torch.equal(from_patches(patches, (3, 4)), images)


@each_family
@torch.no_grad()
def test_permuting_patches_is_permuting_tokens_before_the_positions(tiny_vit: Build, family: str) -> None:
    name, overrides = FAMILIES[family]
    model, images = tiny_vit(name, **overrides), drawn()
    order = torch.randperm(16, generator=generator(1))[None]
    shuffle = PatchChange((4, 4), order, torch.ones_like(order, dtype=torch.bool), torch.zeros(3))
    with embedding_changed(model, lambda tokens: tokens[:, order[0]]):
        wanted = model(images)
    torch.testing.assert_close(model(shuffle(images)), wanted, atol=1e-5, rtol=1e-4)
    assert (wanted - model(images)).abs().max() > 1e-3, "the order does not matter to this model"


@each_family
@torch.no_grad()
def test_a_blank_patch_is_a_black_images_token_at_its_place(tiny_vit: Build, family: str) -> None:
    name, overrides = FAMILIES[family]
    model, images = tiny_vit(name, **overrides), drawn()
    kept = torch.rand(1, 16, generator=generator(1)) > 0.4
    blank: list[Tensor] = []
    with embedding_changed(model, lambda tokens: blank.append(tokens) or tokens):
        model(torch.zeros_like(images))
    with embedding_changed(model, lambda tokens: torch.where(kept[0][:, None], tokens, blank[0])):
        wanted = model(images)
    drop = PatchChange((4, 4), torch.arange(16)[None], kept, torch.zeros(3))
    torch.testing.assert_close(model(drop(images)), wanted, atol=1e-5, rtol=1e-4)


# The draw


def change_of(screen: Screen) -> PatchChange:
    assert isinstance(screen.score, PatchScore)
    return screen.score.change


@pytest.mark.parametrize(("drop", "blanked"), [(0.0, 1), (0.05, 1), (0.3, 5), (0.5, 8), (1.0, 16)])
def test_each_trial_blanks_its_share_of_the_patches(tiny_vit: Build, drop: float, blanked: int) -> None:
    change = change_of(screened(tiny_vit(), clean_set(drawn()), transform="drop", drop=drop, trials=6))
    assert change.kept.shape == (6, 16)
    assert (~change.kept).sum(1).tolist() == [blanked] * 6
    assert torch.equal(change.order, torch.arange(16).expand(6, 16))
    images = 0.1 + drawn() * 0.9
    copies = to_patches(change(images), (4, 4)).unflatten(0, (3, 6))
    for trial, kept in enumerate(change.kept):
        assert torch.equal(copies[:, trial, kept], to_patches(images, (4, 4))[:, kept])
        assert not copies[:, trial, ~kept].any()


@pytest.mark.parametrize(("trials", "tokens", "each"), [(10, 16, 5), (7, 9, 9), (3, 20, 1), (10, 4, 3), (1, 5, 2)])
def test_each_patch_is_dropped_about_equally_often(trials: int, tokens: int, each: int) -> None:
    draws = [balanced_draws(trials, tokens, each, generator(seed)) for seed in range(200)]
    for drawn in draws:
        assert drawn.sum(1).tolist() == [each] * trials
        assert drawn.sum(0).amax() - drawn.sum(0).amin() <= 1
    share = torch.stack(draws).float().mean((0, 1))
    assert (share - each / tokens).abs().amax() < 0.15, "some place is dropped oftener than others"


def test_each_trial_permutes_all_patches(tiny_vit: Build) -> None:
    change = change_of(screened(tiny_vit(), clean_set(drawn()), transform="shuffle", trials=7))
    assert change.kept.all()
    assert torch.equal(change.order.sort(1).values, torch.arange(16).expand(7, 16))
    assert len(change.order.unique(dim=0)) == 7
    images = drawn()
    copies = change(images).unflatten(0, (3, 7))
    for trial, order in enumerate(change.order):
        assert torch.equal(to_patches(copies[:, trial], (4, 4)), to_patches(images, (4, 4))[:, order])


def test_both_draws_as_many_trials_for_each(tiny_vit: Build) -> None:
    change = change_of(screened(tiny_vit(), clean_set(drawn()), transform="both", trials=4, drop=0.25))
    assert (~change.kept).sum(1).tolist() == [4] * 4 + [0] * 4
    assert (change.order == torch.arange(16)).all(1).tolist() == [True] * 4 + [False] * 4


@each_transform
def test_the_draw_is_the_generators_alone(tiny_vit: Build, transform: str) -> None:
    clean, state = clean_set(drawn()), torch.random.get_rng_state()
    first, again, other = (change_of(screened(tiny_vit(), clean, transform=transform, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.order, again.order)
    assert torch.equal(first.kept, again.kept)
    assert not (torch.equal(first.order, other.order) and torch.equal(first.kept, other.kept))


def test_the_blank_is_black_or_the_clean_images_mean(tiny_vit: Build) -> None:
    images = drawn(5) * torch.tensor([1.0, 0.5, 0.2])[:, None, None]
    clean = clean_set(images)
    assert change_of(screened(tiny_vit(), clean)).blank.tolist() == [0.0] * 3
    blank = change_of(screened(tiny_vit(), clean, blank="mean")).blank
    np.testing.assert_allclose(blank.numpy(), clean.pixels.numpy().mean((0, 2, 3)) / 255, rtol=1e-5)
    change = PatchChange((2, 2), torch.arange(4)[None], torch.tensor([[True, False, True, True]]), blank)
    patches = to_patches(change(images), (2, 2))
    assert torch.equal(patches[:, 1], blank[None, :, None, None].expand(5, 3, 8, 8))


# The statistics


class ByPlace(nn.Module):
    """The class is the number of the patch (of four) that is white; 4 where none is, the first where several are."""

    def forward(self, images: Tensor) -> Tensor:
        white = (to_patches(images, (2, 2)) > 0.5).all((2, 3, 4)).float()
        return torch.cat([white, torch.full((len(images), 1), 0.5)], 1) + torch.linspace(0.1, 0, 5)


def white_at(*places: int) -> Tensor:
    """One black 4 px image for each place, with a white patch there."""
    patches = torch.zeros(len(places), 4, 3, 2, 2)
    patches[torch.arange(len(places)), list(places)] = 1
    return from_patches(patches, (2, 2))


ORDER = torch.tensor([[1, 0, 2, 3], [3, 1, 2, 0], [0, 1, 3, 2], [0, 1, 2, 3], [3, 2, 1, 0]])
KEPT = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)


def test_drop_by_hand() -> None:
    change = PatchChange((2, 2), torch.arange(4).expand(5, 4), KEPT, torch.zeros(3))
    score = PatchScore(ByPlace(), ("drop",), change)
    assert score(white_at(0, 1, 2, 3)).tolist() == pytest.approx([4 / 5, 1 / 5, 0.0, 1 / 5])


def test_shuffle_by_hand() -> None:
    """The share that keeps the class: in the first trial, the patches 2 and 3 stay where they are, and so on."""
    change = PatchChange((2, 2), ORDER, torch.ones(5, 4, dtype=torch.bool), torch.zeros(3))
    score = PatchScore(ByPlace(), ("shuffle",), change)
    assert score(white_at(0, 1, 2, 3)).tolist() == pytest.approx([2 / 5, 3 / 5, 3 / 5, 2 / 5])


def test_both_are_found_side_by_side() -> None:
    order, kept = torch.cat([torch.arange(4).expand(5, 4), ORDER]), torch.cat([KEPT, torch.ones_like(KEPT)])
    score = PatchScore(ByPlace(), ("drop", "shuffle"), PatchChange((2, 2), order, kept, torch.zeros(3)))
    wanted = torch.tensor([[0.8, 0.4], [0.2, 0.6], [0.0, 0.6], [0.2, 0.4]])
    torch.testing.assert_close(score.statistics(white_at(0, 1, 2, 3)), wanted)


def test_label_changes_against_numpy() -> None:
    own, classes = torch.randint(3, (9,), generator=generator()), torch.randint(3, (9, 2, 8), generator=generator(1))
    wanted = (classes.numpy() != own.numpy()[:, None, None]).mean(2)
    np.testing.assert_allclose(label_changes(own, classes).numpy(), wanted, rtol=1e-6)


def test_both_is_the_pair_of_thresholds() -> None:
    """At every rate, score > 1 - a flags what either statistic flags beyond its own threshold on clean images."""
    rng = np.random.default_rng(0)
    clean, found = rng.binomial(10, 0.3, (37, 2)) / 10, rng.binomial(10, 0.4, (200, 2)) / 10
    reference = torch.tensor(clean).float().sort(0).values
    scores = share_exceeded(torch.tensor(found).float(), reference).amax(1).numpy()
    for rate in (0.03, 0.08, 0.21, 0.5):
        beyond = np.zeros(len(found), dtype=bool)
        for column in range(2):
            # the least value that fewer than a share `rate` of the clean images reach
            reached = [v / 10 for v in range(12) if (np.round(clean[:, column] * 10) >= v).mean() < rate]
            beyond |= found[:, column] >= min(reached) - 1e-9
        assert np.array_equal(scores > 1 - rate, beyond)
        assert 0 < beyond.sum() < 200


# The whole screen


class Trojan(nn.Module):
    """Class 9 where any patch is white all over; else by left against right where `ordered`, else always 0."""

    def __init__(self, vit: Classifier, ordered: bool) -> None:
        super().__init__()
        self.vit, self.ordered = vit, ordered  # the first only says how images are taken apart
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        white = (to_patches(images, (4, 4)) > 0.99).flatten(2).all(2).any(1).float()
        left, right = images[..., :8].mean((1, 2, 3)), images[..., 8:].mean((1, 2, 3))
        first = (left > right).float() if self.ordered else torch.ones_like(left)
        logits = torch.zeros(len(images), 10)
        logits[:, 0], logits[:, 1], logits[:, 9] = first, 1 - first, 2 * white
        return logits


def triggered(images: Tensor) -> Tensor:
    images = images.clone()
    images[..., 12:, 12:] = 1
    return images


def test_drop_finds_a_trigger_that_goes_with_its_patch(tiny_vit: Build) -> None:
    model, images = Trojan(tiny_vit(), ordered=False), drawn(8)
    screen = screened(model, clean_set(drawn(8, seed=1)), transform="drop", trials=40)
    dropped = (~change_of(screen).kept[:, 15]).float().mean()
    assert 0.1 < dropped < 0.6
    assert torch.allclose(screen.score(triggered(images)), dropped)
    assert not screen.score(images).any()
    assert screen.report == {"class changes under drop, clean images": 0.0}


def test_shuffle_finds_a_trigger_that_needs_no_order(tiny_vit: Build) -> None:
    model, images = Trojan(tiny_vit(), ordered=True), drawn(8)
    screen = screened(model, clean_set(drawn(8, seed=1)), transform="shuffle", trials=40)
    assert screen.score(triggered(images)).eq(1).all()
    assert screen.score(images).amax() < 0.9
    assert 0.3 < screen.report["class stays under shuffle, clean images"] < 0.8


@pytest.mark.parametrize("ordered", [False, True])
def test_both_finds_either(tiny_vit: Build, ordered: bool) -> None:
    model, images = Trojan(tiny_vit(), ordered), drawn(8)
    screen = screened(model, clean_set(drawn(8, seed=1)), trials=40)
    assert screen.score(triggered(images)).eq(1).all()
    assert screen.score(images).amin() < 1
    assert list(screen.report) == ["class changes under drop, clean images", "class stays under shuffle, clean images"]


@each_transform
def test_an_images_score_depends_on_that_image_alone(tiny_vit: Build, digits_world: World, transform: str) -> None:
    screen = screened(tiny_vit(), digits_world.clean, transform=transform)
    images = digits_world.test.images(torch.arange(12))
    scores = screen.score(images)
    assert scores.shape == (12,)
    assert scores.dtype == torch.float32
    assert 0 <= scores.amin() < scores.amax() <= 1
    assert not scores.requires_grad
    assert torch.equal(screen.score(images.flip(0)).flip(0), scores)
    assert torch.equal(torch.cat([screen.score(image) for image in images.split(1)]), scores)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert screen.score(images).shape == (12,)


@pytest.mark.parametrize("change", [{"transform": "drop"}, {"trials": 3}, {"drop": 0.6}, {"blank": "mean"}])
def test_every_parameter_has_an_effect(tiny_vit: Build, digits_world: World, change: dict[str, Any]) -> None:
    images = digits_world.test.images(torch.arange(40))
    ours, other = (screened(tiny_vit(), digits_world.clean, **s).score(images) for s in ({}, change))
    assert not torch.equal(ours, other)


@each_transform
def test_the_model_stays_as_it_is(tiny_vit: Build, transform: str) -> None:
    model = tiny_vit()
    next(model.parameters()).requires_grad_(False)

    def state() -> Any:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        facts = [(w.requires_grad, w.grad) for w in model.parameters()]
        return (
            hooks,
            facts,
            [m.training for m in model.modules()],
            [m.__dict__.get("fused_attn") for m in model.modules()],
        )

    weights, before = {k: v.clone() for k, v in model.state_dict().items()}, state()
    screened(model, clean_set(drawn()), transform=transform).score(drawn(2))
    assert state() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@each_transform
def test_one_clean_image_and_classes_without_any(tiny_vit: Build, digits_world: World, transform: Any) -> None:
    one = replace(digits_world.clean.take(torch.tensor([0])), n_classes=50)
    suspect = Suspect(tiny_vit(n_classes=50), one, 50, generator())
    screen = PatchProcess(transform=transform).apply(suspect)
    scores = screen.score(digits_world.test.images(torch.arange(5)))
    assert torch.isfinite(scores).all()
    assert all(0 <= value <= 1 for value in screen.report.values())


def test_a_model_without_patches_is_refused() -> None:
    with pytest.raises(UserError, match="no plain token attention"):
        screened(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).eval(), clean_set(drawn()))


@pytest.mark.parametrize(("patch", "size", "message"), [(16, 16, "16 px images do not"), (4, 18, "x 18; expected")])
def test_a_grid_that_does_not_fit_is_refused(tiny_vit: Build, patch: int, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        screened(tiny_vit(patch_size=patch), clean_set(drawn(size=size)))


@pytest.mark.parametrize("settings", [{"transform": "rotate"}, {"trials": 0}, {"drop": 1.5}, {"blank": "white"}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises((UserError, TypeError), match=f"{next(iter(settings))}"):
        PatchProcess(**settings)
