"""BadNets: the patch, pixel by pixel."""

import pytest
import torch
from torch import Tensor

from vitrap.attacks.badnets import BadNets, Patch
from vitrap.contracts import Access, AllToAll, AllToOne, Fitted, SourceToTarget
from vitrap.data.sources import World
from vitrap.errors import UserError


def drawn(height: int = 5, width: int = 6) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 0.5


@pytest.mark.parametrize(
    ("size", "margin", "rows"),
    [
        (1, 0, ["000000", "000000", "000000", "000000", "000001"]),
        (2, 0, ["000000", "000000", "000000", "000011", "000011"]),
        (2, 1, ["000000", "000000", "000110", "000110", "000000"]),
        (3, 2, ["011100", "011100", "011100", "000000", "000000"]),
        (5, 0, ["011111"] * 5),
    ],
)
@pytest.mark.parametrize("value", [1.0, 0.75])
def test_the_patch_by_hand(size: int, margin: int, rows: list[str], value: float) -> None:
    images, before = drawn(), drawn()
    painted = torch.tensor([[digit == "1" for digit in row] for row in rows])
    wanted = torch.where(painted, value, images)
    assert torch.equal(Patch(size, margin, value)(images), wanted)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("height", "width"), [(4, 9), (9, 4), (2, 9), (1, 1)])
def test_images_smaller_than_the_patch_and_its_margin_are_refused(height: int, width: int) -> None:
    fitting = torch.zeros(1, 3, 5, 5)
    assert Patch(3, 2, 1.0)(fitting).sum() == 3 * 3**2
    with pytest.raises(UserError, match=f"2 x 3 x {height} x {width}; expected b x c x 5 x 5 or larger"):
        Patch(3, 2, 1.0)(drawn(height, width))


def test_the_trigger_is_the_settings_patch(digits_world: World) -> None:
    train = digits_world.train.take(torch.arange(50))
    access = Access(train, None, torch.Generator().manual_seed(0))
    attack = BadNets(target=3, size=2, margin=1, value=0.5, poison_rate=0.2)
    fitted = attack.fit(access)
    assert fitted == Fitted(Patch(2, 1, 0.5))
    assert attack.goal_for(10) == AllToOne(3)
    poison = attack.implant(access, fitted).poison
    assert poison is not None
    poisoned = poison(train, torch.Generator().manual_seed(0))
    rows = poisoned.poisoned.nonzero().squeeze(1)
    assert len(rows) == 10
    assert poisoned.labels[rows].eq(3).all()
    stamped = poisoned.images(rows)
    assert stamped[..., -3:-1, -3:-1].eq(128 / 255).all()
    stamped[..., -3:-1, -3:-1] = train.images(rows)[..., -3:-1, -3:-1]
    torch.testing.assert_close(stamped, train.images(rows), atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", [{"size": 0}, {"margin": -1}, {"value": 1.01}, {"poison_rate": 0.0}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
        BadNets(**settings)


@pytest.mark.parametrize(("size", "margin", "fits"), [(16, 0, True), (10, 6, True), (17, 0, False), (1, 16, False)])
def test_a_patch_must_lie_within_the_image(digits_world: World, size: int, margin: int, fits: bool) -> None:
    access = Access(digits_world.train.take(torch.arange(4)), None, torch.Generator())
    attack = BadNets(size=size, margin=margin)
    if fits:
        black = torch.zeros(1, 3, 16, 16)
        assert attack.fit(access).in_training(black).sum() == 3 * size**2
    else:
        with pytest.raises(UserError, match=f"size = {size} with .*margin = {margin} does not fit on images of 16 px"):
            attack.fit(access)


def test_the_papers_goals(digits_world: World) -> None:
    """The next class for each image, and one class for the images of another."""
    train, access = digits_world.train, Access(digits_world.train, None, torch.Generator())
    for attack, goal in (
        (BadNets(goal="all-to-all", poison_rate=0.1), AllToAll(10)),
        (BadNets(goal="source-to-target", target=7, source=1, poison_rate=0.05), SourceToTarget(1, 7)),
    ):
        assert attack.goal_for(10) == goal
        poison = attack.implant(access, attack.fit(access)).poison
        assert poison is not None
        poisoned = poison(train, torch.Generator().manual_seed(0))
        rows = poisoned.poisoned
        assert int(rows.sum()) == round(attack.poison_rate * len(train))
        wanted = (train.labels + 1) % 10 if attack.goal == "all-to-all" else torch.full_like(train.labels, 7)
        assert torch.equal(poisoned.labels, torch.where(rows, wanted, train.labels))
        assert attack.source is None or train.labels[rows].eq(1).all()
