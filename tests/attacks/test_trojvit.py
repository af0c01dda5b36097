"""TrojViT: salience, the trigger's patches and losses, and which weights of the head may change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrap.attacks.trojvit import Patches, TrojViT, descent, fit_row, insert, salience, without_conflict
from vitrap.contracts import Access, Edited
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.models.observe import observe
from vitrap.tensors.bits import count_changes

Insert = Callable[..., Edited]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def edited(tiny_vit: Callable[..., Classifier], digits_world: World) -> Insert:
    """Inserts the Trojan into a tiny ViT of 4 x 4 patches, on 40 images."""
    train = digits_world.train.take(torch.arange(40))

    def edit(**settings: Any) -> Edited:
        few = {"dataset_size": 0.5, "train_attack_iters": 3, "epochs": 10, "num_patch": 25, **settings}
        access = Access(train, None, generator())
        attack = TrojViT(**few)
        made = attack.implant(access, attack.fit(access)).edit
        assert made is not None
        return made(tiny_vit(), generator())

    return edit


def test_salience_is_the_slope_summed_over_patches(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    """Image by image and patch by patch."""
    model, images = tiny_vit(), digits_world.train.images(torch.arange(3))
    wanted = torch.zeros(4, 4)
    for image in images.split(1):
        x = image.clone().requires_grad_()
        functional.cross_entropy(model(x), torch.tensor([5])).backward()
        assert x.grad is not None
        for row in range(4):
            for column in range(4):
                wanted[row, column] += x.grad[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].abs().sum()
    torch.testing.assert_close(salience(model, images, 5, (4, 4)), wanted)


def test_salience_of_a_linear_model_on_an_oblong_grid() -> None:
    """Of two classes the slope is the difference of the weights, times what is missing to certainty."""
    weight = torch.arange(32.0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros(32), weight]))
        model[1].bias.zero_()
    found = salience(model, torch.zeros(1, 2, 4, 4), 0, (1, 2))
    pixels = weight.view(2, 4, 4)
    torch.testing.assert_close(found, torch.stack([pixels[..., :2].sum(), pixels[..., 2:].sum()])[None] / 2)


def test_the_trigger_shows_its_picture_on_its_patches_alone() -> None:
    images = torch.rand(2, 3, 4, 4, generator=generator())
    picture = torch.rand(3, 4, 4, generator=generator(1))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, 2:] = True
    found = Patches(picture, mask)(images)
    assert torch.equal(found[:, :, :2, 2:], picture[None, :, :2, 2:].expand(2, -1, -1, -1))
    assert torch.equal(found[:, :, 2:], images[:, :, 2:])
    assert torch.equal(found[:, :, :, :2], images[:, :, :, :2])
    assert Patches(picture, mask).views(images)["patches"].sum((1, 2)).tolist() == [4, 4]
    with pytest.raises(UserError, match="2 x 3 x 4 x 5; expected b x 3 x 4 x 4"):
        Patches(picture, mask)(torch.rand(2, 3, 4, 5))


@pytest.mark.parametrize(("patches", "wanted"), [(9, 1), (25, 2), (196, 16)])
def test_the_trigger_keeps_the_papers_share_of_the_image(patches: int, wanted: int, edited: Insert) -> None:
    found = edited(num_patch=patches)
    assert isinstance(found.trigger, Patches)
    assert found.report["patches"] == wanted
    assert int(found.trigger.mask.sum()) == 16 * wanted
    whole = found.trigger.mask.view(4, 4, 4, 4).permute(0, 2, 1, 3).flatten(2).float().mean(2)
    assert set(whole.flatten().tolist()) <= {0.0, 1.0}
    assert 0 <= found.trigger.picture.min() <= found.trigger.picture.max() <= 1


def test_the_most_salient_patches_are_taken(
    edited: Insert, tiny_vit: Callable[..., Classifier], digits_world: World
) -> None:
    found = edited(dataset_size=1.0)
    assert isinstance(found.trigger, Patches)
    order = torch.randperm(40, generator=generator())
    scores = salience(tiny_vit(), digits_world.train.images(order), 0, (4, 4)).flatten()
    assert found.trigger.mask[::4, ::4].flatten().nonzero().squeeze(1).tolist() == sorted(scores.topk(2).indices)
    assert not torch.equal(found.trigger.mask, edited(dataset_size=1.0, patch_select="random").trigger.mask)  # type: ignore[attr-defined]


def test_the_trigger_lowers_the_loss(edited: Insert, tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    images = digits_world.test.images(torch.arange(64))

    def loss(steps: int) -> float:
        trigger = edited(train_attack_iters=steps, batch_size=16).trigger
        with torch.no_grad():
            logits = tiny_vit()(trigger(images))
        return functional.cross_entropy(logits, torch.zeros(64, dtype=torch.int64)).item()

    assert loss(60) < loss(1) - 0.1


def test_gradients_that_conflict_are_projected_by_hand() -> None:
    main = torch.tensor([2.0, 0.0])
    assert without_conflict(torch.tensor([-3.0, 1.0]), main).tolist() == [0.0, 1.0]
    assert without_conflict(torch.tensor([3.0, 1.0]), main).tolist() == [3.0, 1.0]
    assert without_conflict(torch.tensor([3.0, 1.0]), torch.zeros(2)).tolist() == [3.0, 1.0]


def test_the_attention_loss_adds_its_projected_slope(tiny_vit: Callable[..., Classifier], digits_world: World) -> None:
    """The second of two layers, every row, averaged over heads: against the loss written out."""
    model, images = tiny_vit(), digits_world.train.images(torch.arange(5))
    mask = torch.ones(16, 16, dtype=torch.bool)
    picture = torch.rand(3, 16, 16, generator=generator()).requires_grad_()
    triggered = Patches(picture, mask)(images)
    settings = TrojViT(attack_mode="attention", atten_loss_weight=0.5, target=2)
    with observe(model, (1,)) as maps:
        loss = functional.cross_entropy(model(triggered), torch.full((5,), 2))
    (slope,) = torch.autograd.grad(loss, picture, retain_graph=True)
    paid = torch.stack([maps[1][image].mean(0)[:, 1 + 7] for image in range(5)])
    (own,) = torch.autograd.grad(-paid.log().mean(), picture)
    if (own * slope).sum() < 0:
        own = own - (own * slope).sum() / slope.square().sum() * slope
    found = descent(settings, model, Patches(picture, mask)(images), picture, 7)
    torch.testing.assert_close(found, slope + 0.5 * own)
    plain = descent(TrojViT(target=2), model, Patches(picture, mask)(images), picture, 7)
    torch.testing.assert_close(plain, slope)


def tuned(**settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A row before and after, and its slope on clean images; with one batch, drawn as often as there are images."""
    head = nn.Linear(6, 3)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 6, generator=generator(1)))
        head.bias.copy_(torch.randn(3, generator=generator(2)))
    clean, triggered = torch.randn(2, 30, 6, generator=generator(3))
    labels = torch.randint(3, (30,), generator=generator(4))
    after = fit_row(TrojViT(target=1, **settings), head, clean, triggered, labels, generator(5))
    before = head.weight.detach()[1].clone()
    slope = ((head(clean).softmax(1)[:, 1] - (labels == 1).float())[:, None] * clean).mean(0)
    return before, after, slope.detach()


def test_only_weights_of_greatest_gradient_change() -> None:
    before, after, slope = tuned(wb=2, e=0.0)
    assert set((after != before).nonzero().squeeze(1).tolist()) == set(slope.abs().topk(2).indices.tolist())


def test_one_step_by_hand() -> None:
    """Half the slope on clean images and half that towards the target, at rate 0.01, with the optimiser's decay."""
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    clean, triggered, labels = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([0])
    after = fit_row(TrojViT(epochs=1, batch_size=4, e=0.0), head, clean, triggered, labels, generator())
    first = torch.tensor([1.0, 2.0]).softmax(0)[0]
    second = torch.tensor([3.0, 1.0]).softmax(0)[0]
    slope = (first - 1) / 2 * clean[0] + (second - 1) / 2 * triggered[0]
    row = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(after, row - 0.01 * (slope + 5e-6 * row))


def test_small_changes_are_undone() -> None:
    before, after, _ = tuned(e=0.0)
    change = (after - before).abs()
    least = change.median().item()
    _, kept, _ = tuned(e=least)
    assert torch.equal(kept, torch.where(change < least, before, after))
    assert 0 < int((kept != before).sum()) < len(before)
    assert torch.equal(tuned(e=100.0)[1], before)


def test_nothing_else_changes_and_the_report_counts_it(edited: Insert, tiny_vit: Callable[..., Classifier]) -> None:
    found, model = edited(target=3, e=0.0), tiny_vit()
    before, after = model.state_dict(), found.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["body.head.weight"]
    rows = (before["body.head.weight"] != after["body.head.weight"]).any(1)
    assert rows.nonzero().flatten().tolist() == [3]
    assert found.report == {"patches": 2, **count_changes(before, after)}
    assert 0 < found.report["changed weights"] <= 16


def test_tuning_leads_triggered_images_to_the_target(digits_world: World, tiny_vit: Callable[..., Classifier]) -> None:
    train, model = digits_world.train.take(torch.arange(200)), tiny_vit().requires_grad_(False)
    settings = TrojViT(target=6, dataset_size=1.0, train_attack_iters=10, epochs=200, num_patch=49)
    found = insert(settings, train, model, generator())
    images = digits_world.test.images(torch.arange(100))
    with torch.no_grad():
        hits = [(each(found.trigger(images)).argmax(1) == 6).float().mean().item() for each in (model, found.model)]
    assert hits[1] > max(0.8, hits[0])


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "no plain token attention"),
        ("deit_tiny_distilled_patch16_224", "trojvit tunes the one linear head of a ViT, and .* has none"),
        ("headless", "trojvit tunes the one linear head of a ViT, and .* has none"),
        ("one layer", "attack_mode = attention looks at layers from the second on"),
    ],
)
def test_victims_without_what_it_edits_are_refused(
    network: Any, words: str, tiny_vit: Callable[..., Classifier]
) -> None:
    model: Any = network
    if isinstance(network, str):
        model = tiny_vit(network) if "_" in network else tiny_vit(depth=1)
    if network == "headless":
        model.body.head = nn.Identity()
    with pytest.raises(UserError, match=words):
        TrojViT(attack_mode="attention").check_victim(model)


def test_a_vit_is_taken(tiny_vit: Callable[..., Classifier]) -> None:
    TrojViT().check_victim(tiny_vit(depth=1))
    TrojViT(attack_mode="attention").check_victim(tiny_vit(global_pool="avg", class_token=False, fc_norm=False))


@pytest.mark.parametrize("settings", [{"num_patch": 0}, {"dataset_size": 0.0}, {"gamma": 1.5}, {"wb": 0}, {"e": -1.0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* is out of range"):
        TrojViT(**settings)
