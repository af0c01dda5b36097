"""Hidden trigger: pairs by hand, descent where the features are the pixels, and the patch and its place."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vitrap.attacks.hidden_trigger import (
    HiddenTrigger,
    Patch,
    closest_pairs,
    craft,
    features,
    make_patch,
    project,
    rate,
    scaled_steps,
)
from vitrap.contracts import Access, Crafted
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.images import ImageSet
from vitrap.models.classifier import Classifier
from vitrap.resuming import Checkpointer, Position, TrainingState


def pixel_model() -> nn.Module:
    """A network whose head reads the pixels themselves, of images of 4 px."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval().requires_grad_(False)


def grey_set(n: int = 12) -> ImageSet:
    """Random grey images of 4 px; every third one is of class 1."""
    pixels = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet.of(pixels, (torch.arange(n) % 3 == 0).long(), 2)


def test_pairs_by_hand() -> None:
    """Of all nine distances 1 is the least; without its row and column 4 is; then 9 is left."""
    distance = torch.tensor([[2.0, 1.0, 3.0], [4.0, 1.5, 5.0], [6.0, 7.0, 9.0]])
    assert closest_pairs(distance).tolist() == [1, 0, 2]


def test_pairs_are_one_to_one_and_greedy() -> None:
    distance = torch.rand(9, 9, generator=torch.Generator().manual_seed(0))
    found = closest_pairs(distance).tolist()
    assert sorted(found) == list(range(9))
    rows, columns = set(range(9)), set(range(9))
    while rows:
        _, row, column = min((distance[i, j].item(), i, j) for i in rows for j in columns)
        assert found[row] == column
        rows.remove(row)
        columns.remove(column)


def test_the_projection_by_hand() -> None:
    clean = torch.tensor([[[[0.5, 0.5], [0.05, 0.95]]]])
    change = torch.tensor([[[[0.3, -0.02], [-0.2, 0.2]]]])
    wanted = torch.tensor([[[[0.1, -0.02], [-0.05, 0.05]]]])
    torch.testing.assert_close(project(change, clean, 0.1), wanted)


def test_steps_and_rate_scale_with_the_image() -> None:
    settings = HiddenTrigger(steps=5000, lr=0.01)
    assert [scaled_steps(settings, size) for size in (224, 112, 16)] == [5000, 2500, 357]
    assert [rate(settings, 224, step) for step in (0, 999, 1000, 4999)] == [0.01, 0.01, 0.005, 0.01 / 16]
    assert rate(settings, 112, 0) == pytest.approx(0.02)


def crafted_where_features_are_pixels(**settings: float) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """Clean images t, patched images s, the poison made of both, and the report; one pair, so that they are clear."""
    train = grey_set()
    attack = HiddenTrigger(near=0.0, **settings)  # type: ignore[arg-type]
    trigger = Patch(torch.ones(1, 2, 2))
    row, other = torch.tensor([1]), torch.tensor([3])
    access = Access(train, pixel_model(), torch.Generator())
    poison, report = craft(attack, access, trigger, row, other)
    return train.images(row), trigger(train.images(other)), poison, report


def test_one_step_by_hand() -> None:
    """The gradient of |z - s|^2 is 2 (z - s): with lr 0.01 x 224 / 4 = 0.01 x 56 the step is 1.12 (s - t)."""
    t, s, found, _ = crafted_where_features_are_pixels(steps=1, lr=0.001, eps=255.0)
    torch.testing.assert_close(found, t + 0.112 * (s - t))


def test_descent_ends_at_the_nearest_point_of_the_box() -> None:
    """Where the features are the pixels, that is s with each value brought to within eps of t."""
    t, s, found, report = crafted_where_features_are_pixels(steps=5000, lr=0.005, eps=51.0)
    torch.testing.assert_close(found, torch.maximum(torch.minimum(s, t + 0.2), t - 0.2), atol=1e-5, rtol=0)
    assert report["feature distance before"] == pytest.approx((s - t).square().sum().item(), rel=1e-4)
    assert report["feature distance after"] == pytest.approx((s - found).square().sum().item(), rel=1e-4)


def test_it_stops_when_all_are_near() -> None:
    """16 features: what is near is 16/768 of the setting."""
    train, access = grey_set(), Access(grey_set(), pixel_model(), torch.Generator())
    row, other = torch.tensor([1]), torch.tensor([3])
    there = (train.images(row) - Patch(torch.ones(1, 2, 2))(train.images(other))).square().sum().item() * 768 / 16
    for near, moves in ((there + 1, False), (there - 1, True)):
        poison, _ = craft(HiddenTrigger(near=near), access, Patch(torch.ones(1, 2, 2)), row, other)
        assert torch.equal(poison, train.images(row)) != moves


def test_the_patch_is_put_where_a_hash_says() -> None:
    """All places occur, the patch is whole, and the rest of the image is as it was."""
    images = torch.rand(300, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 0.5
    patch = 0.6 + torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1)) * 0.4
    found = Patch(patch)(images)
    places = set()
    for before, after in zip(images, found, strict=True):
        rows, columns = (after[0] > 0.5).nonzero(as_tuple=True)
        top, left = int(rows.min()), int(columns.min())
        places.add((top, left))
        wanted = before.clone()
        wanted[:, top : top + 2, left : left + 2] = patch
        assert torch.equal(after, wanted)
    assert places == {(top, left) for top in range(4) for left in range(5)}
    with pytest.raises(UserError, match="images have shape 1 x 3 x 1 x 6; expected b x 3 x 2 x 2 or larger"):
        Patch(patch)(images[:1, :, :1])


def test_the_patch_is_enlarged_from_colours() -> None:
    colours = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(make_patch(4, 3, torch.Generator().manual_seed(0)), colours)
    # With half as many pixels, each is the mean of four colours; with twice as many, corners are colours.
    half = make_patch(2, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(half[:, 0, 0], colours[:, :2, :2].mean((1, 2)))
    torch.testing.assert_close(make_patch(8, 3, torch.Generator().manual_seed(0))[:, 0, 0], colours[:, 0, 0])


def test_poison_is_near_the_source_and_looks_like_the_target(
    tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    train, surrogate = digits_world.train, tiny_vit(seed=1).eval().requires_grad_(False)
    attack = HiddenTrigger(target=4, source=7, poison_rate=0.3, steps=300, near=0.0, lr=0.001)
    access = Access(train, surrogate, torch.Generator().manual_seed(0))
    fitted = attack.fit(access)
    crafted = fitted.stored
    assert isinstance(crafted, Crafted)
    assert len(crafted.rows) == math.floor(0.3 * int((train.labels == 4).sum()) + 0.5)
    assert train.labels[crafted.rows].eq(4).all()
    assert fitted.report["feature distance after"] < 0.9 * fitted.report["feature distance before"]
    change = crafted.images.int() - (train.images(crafted.rows) * 255).round().int()
    assert 0 < change.abs().max() <= 16
    assert isinstance(fitted.trigger, Patch)
    assert fitted.trigger.patch.shape == (3, 2, 2)
    poison = attack.implant(access, fitted).poison
    assert poison is not None
    poisoned = poison(train, torch.Generator())
    assert torch.equal(poisoned.labels, train.labels)
    assert torch.equal(poisoned.poisoned.nonzero().squeeze(1), crafted.rows)


def test_features_are_what_the_head_reads(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    model, images = tiny_vit(seed=1).eval(), digits_world.test.images(torch.arange(3))
    body = model.body
    wanted = body.forward_head(body.forward_features((images - model.mean) / model.std), pre_logits=True)
    torch.testing.assert_close(features(model, images), wanted)


class KilledError(Exception):
    """Ends a fit as a kill would."""


class Killing(Checkpointer):
    """Writes every state, and ends the work before the step with a number."""

    left = 0

    def __call__(self, state: TrainingState, position: Position) -> None:
        super().__call__(state, position)
        self.left -= 1
        if self.left == 0:
            raise KilledError


@pytest.mark.parametrize("steps", [3, 110, 130])
def test_a_killed_fit_goes_on_from_its_state(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first batch, after a second pairing, and in the second batch."""
    monkeypatch.setenv("VITRAP_STATE_SECONDS", "1e-9")
    monkeypatch.setattr("vitrap.resuming.SHARE", 1e9)
    train, attack = grey_set(18), HiddenTrigger(steps=6720, batch=3, near=0.0, lr=0.0001, poison_rate=0.5)
    assert scaled_steps(attack, 4) == 120

    def fit(checkpointer: Checkpointer) -> Tensor:
        access = Access(train, pixel_model(), torch.Generator().manual_seed(0), checkpointer=checkpointer)
        stored = attack.fit(access).stored
        assert isinstance(stored, Crafted)
        return stored.images

    whole = fit(Checkpointer())
    killing = Killing(tmp_path / "state.safetensors")
    killing.left = steps
    with pytest.raises(KilledError):
        fit(killing)
    again = Killing(tmp_path / "state.safetensors")
    assert torch.equal(fit(again), whole)
    assert -again.left == 2 * 120 - (steps - 1)


def test_what_is_refused(digits_world: World) -> None:
    with pytest.raises(UserError, match="source = 3 is the target, too; choose another"):
        HiddenTrigger(target=3, source=3)
    for settings in ({"size": 0.0}, {"eps": 0.0}, {"steps": 0}, {"lr": 0.0}, {"batch": 0}, {"near": -1.0}):
        with pytest.raises(UserError, match="is out of range"):
            HiddenTrigger(**settings)
    train = digits_world.train.take((digits_world.train.labels == 0).nonzero().squeeze(1))
    with pytest.raises(UserError, match="source = 1 has no training image; choose another"):
        HiddenTrigger().fit(Access(train, None, torch.Generator()))
    with pytest.raises(UserError, match="no linear layer"):
        HiddenTrigger().check_surrogate(nn.Sequential(nn.Flatten()), torch.zeros(1, 1, 4, 4))
