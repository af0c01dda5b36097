"""AGEB, equation by equation: gradients against finite differences, the trigger by hand.

Finite differences are central and in double precision; a perturbation of the attention or of the scores goes in
through a hook of the test's own, each perturbed copy as one image of a batch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from vitrap.attacks.ageb import (
    Ageb,
    Erosion,
    Route,
    attention_gradient,
    diagonal_gradient_at_score,
    feature_gradient,
    gradient_at_score,
    head_attention,
    own_class_loss,
    pixel_gradient,
)
from vitrap.contracts import Access, AllToOne, Fitted
from vitrap.data.sources import World
from vitrap.errors import UserError
from vitrap.models.classifier import Architecture, Classifier, open_model
from vitrap.models.maps import last_map
from vitrap.models.observe import TokenLayout, observe, token_layout
from vitrap.tensors.colour import brightness, saturation
from vitrap.tensors.morphology import element
from vitrap.tensors.patches import tokens_to_pixels
from vitrap.tensors.pixels import hashed_noise

Build = Callable[..., Classifier]
STEP = 1e-5


def drawn(n: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def exact(tiny_vit: Build) -> Classifier:
    """A tiny surrogate in double precision: 5 tokens of 16 px images."""
    return tiny_vit(patch_size=8, n_classes=4).double()


def losses(logits: Tensor, classes: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, classes, reduction="none")


def with_attention(model: Classifier, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits with the softmax attention of the last block replaced."""
    attention: Any = model.body.blocks[-1].attn
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_pre_hook(lambda module, args: (change(args[0]),))
    try:
        return model(images)
    finally:
        hook.remove()
        attention.fused_attn = True


def one_hot_steps(shape: torch.Size) -> Tensor:
    """As many tensors of `shape` as it has entries, each with STEP at one entry."""
    return STEP * torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)


@torch.no_grad()
def attention_differences(model: Classifier, image: Tensor, maps: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """dL at each entry of `maps` (of one image), by central differences; `read` turns them into attention."""
    own = model(image).argmax(1)
    steps = one_hot_steps(maps.shape)
    many = image.expand(len(steps), -1, -1, -1)
    up, down = (
        losses(with_attention(model, many, lambda a, s=sign: read(maps + s * steps)), own.expand(len(steps)))
        for sign in (1, -1)
    )
    return ((up - down) / (2 * STEP)).view(maps.shape)


def scores(model: Classifier, images: Tensor) -> Tensor:
    """Pre-softmax scores of the last block, from its queries and keys."""
    entered: list[Tensor] = []
    attention: Any = model.body.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        model(images)
        hook.remove()
        q, k, _ = attention.qkv(entered[0]).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return q @ k.mT / q.shape[-1] ** 0.5


# Step 1: the attention gradient


def test_the_attention_gradient_is_that_of_finite_differences(exact: Classifier) -> None:
    images = drawn().double()
    attention, slope = attention_gradient(exact, images)
    assert attention.shape == slope.shape == (2, 2, 5, 5)
    assert not attention.requires_grad
    for number, image in enumerate(images.split(1)):
        found = attention_differences(exact, image, attention[number], lambda maps: maps)
        assert found.abs().max() > 1e-3
        torch.testing.assert_close(slope[number], found, atol=1e-7, rtol=1e-5)


def test_the_attention_is_the_softmax_of_the_scores(exact: Classifier) -> None:
    images = drawn().double()
    torch.testing.assert_close(attention_gradient(exact, images)[0], scores(exact, images).softmax(-1))


def test_the_score_gradient_is_autograds_and_that_of_finite_differences(exact: Classifier) -> None:
    images = drawn().double()
    found = gradient_at_score(*attention_gradient(exact, images))
    at_score = scores(exact, images).requires_grad_()
    loss = own_class_loss(with_attention(exact, images, lambda a: at_score.softmax(-1)))
    (wanted,) = torch.autograd.grad(loss, at_score)
    torch.testing.assert_close(found, wanted.abs(), atol=1e-10, rtol=1e-8)
    for number, image in enumerate(images.split(1)):
        by_steps = attention_differences(exact, image, at_score[number].detach(), lambda e: e.softmax(-1))
        torch.testing.assert_close(found[number], by_steps.abs(), atol=1e-7, rtol=1e-5)


def test_the_two_slopes_by_hand() -> None:
    attention = torch.tensor([[[[0.25, 0.75], [0.5, 0.5]]]])
    slope = torch.tensor([[[[2.0, -4.0], [-1.0, 3.0]]]])
    # |dL/dA A (1 - A)|: 2 * 0.25 * 0.75, 4 * 0.75 * 0.25; 1 * 0.25, 3 * 0.25
    assert diagonal_gradient_at_score(attention, slope).tolist() == [[[[0.375, 0.75], [0.25, 0.75]]]]
    # rows' means of dL/dA under A: -2.5 and 1; |A (dL/dA - mean)|
    assert gradient_at_score(attention, slope).tolist() == [[[[1.125, 1.125], [1.0, 1.0]]]]


def test_the_loss_is_that_of_each_images_own_class() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    by_hand = -logits.log_softmax(1)[0, 0] - logits.log_softmax(1)[1, 1]
    torch.testing.assert_close(own_class_loss(logits), by_hand)


@pytest.mark.parametrize("size", [8, 16])
def test_the_pixel_route_is_that_of_finite_differences(tiny_vit: Build, size: int) -> None:
    model = tiny_vit(size=size, patch_size=size // 2, n_classes=4).double()
    images = drawn(1, size).double()
    _, slope = attention_gradient(model, images)
    steps = one_hot_steps(images.shape[1:])

    @torch.no_grad()
    def weighted(perturbed: Tensor) -> Tensor:
        with observe(model) as seen:
            model(perturbed)
        return (seen[-1] * slope).sum((1, 2, 3))

    by_steps = ((weighted(images + steps) - weighted(images - steps)) / (2 * STEP)).view(1, 3, size, size)
    found = pixel_gradient(model, images)
    assert found.max() > 1e-4
    torch.testing.assert_close(found, by_steps.abs().amax(1), atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("route", get_args(Route))
def test_batch_mates_do_not_matter_to_the_gradient(exact: Classifier, route: Route) -> None:
    trigger, images = Erosion(exact, Ageb(route=route)), drawn(3).double()
    together = trigger.gradient(images)
    for number in range(3):
        torch.testing.assert_close(trigger.gradient(images[number : number + 1])[0], together[number])


def test_head_attention_on_made_maps() -> None:
    """b x heads x queries x keys, where an entry tells its place: 1000 head + 100 query + key."""
    head, query, key = torch.meshgrid(torch.arange(2), torch.arange(6), torch.arange(6), indexing="ij")
    maps = (1000 * head + 100 * query + key).float()[None]
    classes = head_attention(maps, TokenLayout(prefix=2, grid=(2, 2), head_tokens=(0, 1)))
    assert classes.tolist() == [[[552.0, 553.0], [554.0, 555.0]]]  # mean over heads 500, over rows 50
    pooled = head_attention(maps, TokenLayout(prefix=2, grid=(1, 4), head_tokens=(2, 3, 4, 5)))
    assert pooled.tolist() == [[[852.0, 853.0, 854.0, 855.0]]]


def test_the_absolute_value_is_taken_before_the_mean_over_heads(exact: Classifier) -> None:
    images = drawn().double()
    attention, slope = attention_gradient(exact, images)
    rows = (slope * attention * (1 - attention))[:, :, 0, 1:]
    assert (rows.mean(1).abs() < rows.abs().mean(1) - 1e-9).any(), "heads agree in sign: nothing to tell apart"
    found = Erosion(exact, Ageb(upsample="nearest")).gradient(images)
    torch.testing.assert_close(found[:, ::8, ::8], rows.abs().mean(1).view(2, 2, 2))


# Step 2: the mask


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.7, 0.9])
def test_the_quantile_selects_its_share_of_the_highest(tiny_vit: Build, tau: float) -> None:
    trigger, images = Erosion(tiny_vit(), Ageb(tau=tau)), drawn(4)
    gradient, mask = trigger.gradient(images), trigger.mask(images)
    # bilinear up-sampling is flat outside the centres of the corner tokens: a corner of 2 x 2 pixels ties
    assert (mask.sum((1, 2)) - round((1 - tau) * 256)).abs().max() <= 4
    for scores_, chosen in zip(gradient, mask, strict=True):
        if tau:
            assert scores_[chosen].min() > scores_[~chosen].max()


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_the_value_threshold_acts_on_the_map_over_its_maximum(tiny_vit: Build, tau: float) -> None:
    trigger, images = Erosion(tiny_vit(), Ageb(threshold="value", tau=tau)), drawn(3)
    gradient = trigger.gradient(images).double()
    share = gradient / gradient.amax((1, 2), keepdim=True)
    mask, clear = trigger.mask(images), (share - tau).abs() > 1e-6
    assert mask.any()
    assert torch.equal(mask[clear], (share > tau)[clear])


def test_nearest_selects_whole_patches(tiny_vit: Build) -> None:
    mask = Erosion(tiny_vit(), Ageb(upsample="nearest")).mask(drawn(3))
    patches = mask.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    assert torch.equal(patches.all(-1), patches.any(-1))
    # 30 % of 256 pixels is 76.8: four whole patches are 64, and the fifth, which holds the quantile, ties with it
    assert mask.sum((1, 2)).tolist() == [64, 64, 64]


@pytest.mark.parametrize("how", [{"tau": 0.3}, {"tau": 0.7, "upsample": "nearest"}, {"tau": 0.5, "threshold": "value"}])
def test_the_random_ablation_selects_the_same_number_by_noise(tiny_vit: Build, how: dict[str, Any]) -> None:
    images, settings = drawn(4), Ageb(select="random", **how)
    mask = Erosion(tiny_vit(), settings).mask(images)
    assert torch.equal(Erosion(tiny_vit(), settings).mask(images.flip(0)).flip(0), mask), "batch mates matter"
    assert not torch.equal(mask[0], mask[1])
    for noise, chosen in zip(hashed_noise(images), mask, strict=True):
        assert noise[chosen].min() > noise[~chosen].max()
    gradient = Erosion(tiny_vit(), Ageb(**how)).mask(images)
    assert torch.equal(gradient.sum((1, 2)), mask.sum((1, 2)))
    assert not torch.equal(gradient, mask)


def test_random_tokens_select_the_same_number_in_whole_patches(tiny_vit: Build) -> None:
    images, how = drawn(4), {"upsample": "nearest", "tau": 0.7}
    mask = Erosion(tiny_vit(), Ageb(select="random-tokens", **how)).mask(images)
    patches = mask.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    assert torch.equal(patches.all(-1), patches.any(-1))
    gradient = Erosion(tiny_vit(), Ageb(**how)).mask(images)
    assert torch.equal(gradient.sum((1, 2)), mask.sum((1, 2)))
    assert not torch.equal(gradient, mask)
    assert not torch.equal(mask[0], mask[1])


def test_random_tokens_are_as_smooth_as_the_gradient(tiny_vit: Build) -> None:
    images = drawn(8)

    def edges(select: Any) -> int:
        mask = Erosion(tiny_vit(), Ageb(select=select, tau=0.5)).mask(images)
        return int((mask[:, 1:] != mask[:, :-1]).sum() + (mask[:, :, 1:] != mask[:, :, :-1]).sum())

    # Of the pairs of neighbours, chance has half on either side of an edge.
    assert edges("random") > 0.4 * 8 * 2 * 16 * 15
    assert edges("random-tokens") < 0.25 * 8 * 2 * 16 * 15


# Steps 3 to 5: erosion, blend, signal, adjustment


IMAGE = torch.tensor([[0.8, 0.2, 0.6, 0.4], [0.5, 0.7, 0.3, 0.9], [0.1, 0.6, 0.8, 0.2], [0.7, 0.4, 0.5, 0.6]])
CROSS = torch.tensor([[0.2, 0.2, 0.2, 0.4], [0.1, 0.2, 0.3, 0.2], [0.1, 0.1, 0.2, 0.2], [0.1, 0.4, 0.4, 0.2]])
SQUARE = torch.tensor([[0.2, 0.2, 0.2, 0.3], [0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]])
CROSS_TWICE = torch.tensor([[0.1, 0.2, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.1, 0.2], [0.1, 0.1, 0.2, 0.2]])
MASK = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Erosion, "mask", lambda self, images: MASK.expand(len(images), -1, -1))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(
    ("settings", "eroded"),
    [
        (Ageb(shape="cross", alpha=0.5, signal=4.0, adjust=False), CROSS),
        (Ageb(shape="square", alpha=0.25, signal=10.0, adjust=False), SQUARE),
        (Ageb(shape="cross", iterations=2, alpha=0.0, signal=0.0, adjust=False), CROSS_TWICE),
        (Ageb(shape="square", size=1, alpha=0.3, signal=51.0, adjust=False), IMAGE),
    ],
)
def test_the_trigger_by_hand(settings: Ageb, eroded: Tensor) -> None:
    images = torch.stack([IMAGE, IMAGE.flip(0), IMAGE / 2])[None]
    triggered = Erosion(nn.Identity(), settings)(images)
    inside = settings.alpha * IMAGE + (1 - settings.alpha) * eroded + settings.signal / 255
    wanted = torch.where(MASK, inside.clamp(0, 1), IMAGE)
    torch.testing.assert_close(triggered[0, 0], wanted, atol=1e-6, rtol=0)
    assert torch.equal(triggered[0, 0][~MASK], IMAGE[~MASK])
    halved = settings.alpha * IMAGE / 2 + (1 - settings.alpha) * eroded / 2 + settings.signal / 255
    torch.testing.assert_close(triggered[0, 2][MASK], halved[MASK], atol=1e-6, rtol=0)


@pytest.mark.usefixtures("forced")
def test_the_signal_is_cut_off_at_white() -> None:
    images = IMAGE.expand(1, 3, 4, 4)
    assert Erosion(nn.Identity(), Ageb(signal=255.0, adjust=False))(images)[0, 0][MASK].eq(1).all()


@pytest.mark.usefixtures("forced")
def test_alpha_1_without_signal_leaves_the_image() -> None:
    images = drawn(2, 4)
    triggered = Erosion(nn.Identity(), Ageb(alpha=1.0, signal=0.0))(images)
    torch.testing.assert_close(triggered, images, atol=1e-6, rtol=0)


def test_adjustment_keeps_mean_brightness_and_saturation(tiny_vit: Build) -> None:
    images = 0.3 + 0.4 * drawn(4)  # so that nothing is cut off
    plain = Erosion(tiny_vit(), Ageb(adjust=False))(images)
    adjusted = Erosion(tiny_vit(), Ageb(adjust=True))(images)
    for measure in (brightness, saturation):
        clean, before, after = (measure(x).mean((1, 2, 3)) for x in (images, plain, adjusted))
        assert ((before - clean).abs() > 0.01).all(), "nothing to adjust"
        torch.testing.assert_close(after, clean, atol=1e-4, rtol=0)


def test_more_alpha_keeps_more_of_the_original(tiny_vit: Build) -> None:
    images, model = drawn(2), tiny_vit()
    changes = [
        (Erosion(model, Ageb(alpha=alpha, signal=0.0, adjust=False))(images) - images).abs().mean().item()
        for alpha in (0.0, 0.3, 0.6, 0.9)
    ]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] > 0


# The whole attack


SURROGATES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit, registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "vit, average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "requires_grad": [w.requires_grad for w in model.parameters()],
        "grad": [w.grad for w in model.parameters()],
        "fused": [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "training": [m.training for m in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    weights = before["weights"]
    assert all(torch.equal(v, weights[k]) for k, v in now["weights"].items())
    assert {k: v for k, v in now.items() if k != "weights"} == {k: v for k, v in before.items() if k != "weights"}


@pytest.mark.parametrize("route", get_args(Route))
@pytest.mark.parametrize("family", SURROGATES)
def test_every_family_serves_as_surrogate_and_stays_as_it_is(tiny_vit: Build, family: str, route: Route) -> None:
    name, overrides = SURROGATES[family]
    model, images = tiny_vit(name, **overrides), drawn(3)
    next(model.parameters()).requires_grad_(False)
    before, trigger = snapshot(model), Erosion(model, Ageb(route=route))
    gradient, triggered = trigger.gradient(images), trigger(images)
    assert_unchanged(model, before)
    assert gradient.shape == (3, 16, 16)
    assert (gradient >= 0).all()
    assert (gradient.amax((1, 2)) > 0).all()
    assert triggered.shape == images.shape
    assert not triggered.requires_grad
    assert 0 <= triggered.min() <= triggered.max() <= 1
    assert ((triggered - images).abs().amax((1, 2, 3)) > 1 / 255).all()
    if route != "pixel":
        layout = token_layout(model)
        attention, slope = attention_gradient(model, images)
        ours = (
            diagonal_gradient_at_score(attention, slope)
            if route == "attention"
            else gradient_at_score(attention, slope)
        )
        rows = ours[:, :, list(layout.head_tokens), -16:].mean((1, 2)).view(3, *layout.grid)
        torch.testing.assert_close(gradient, tokens_to_pixels(rows, (16, 16), "bilinear"))


@pytest.mark.parametrize("route", get_args(Route))
def test_without_gradients_around_it_the_trigger_is_the_same(tiny_vit: Build, route: Route) -> None:
    trigger, images = Erosion(tiny_vit().requires_grad_(False), Ageb(route=route)), drawn()
    wanted = trigger(images)
    with torch.no_grad():
        assert torch.equal(trigger(images), wanted)


@pytest.mark.parametrize("route", get_args(Route))
def test_the_surrogate_is_restored_when_its_pass_fails(tiny_vit: Build, route: Route) -> None:
    model = tiny_vit()
    before = snapshot(model)
    with pytest.raises(UserError, match="images have shape"):
        Erosion(model, Ageb(route=route)).gradient(drawn(1, 12))  # a size that the model is not for
    assert_unchanged(model, before)


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (8, 4), (16, 8), (24, 4), (32, 16)])
@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
def test_image_and_patch_size_vary(tiny_vit: Build, size: int, patch: int, upsample: Any) -> None:
    model = tiny_vit(size=size, patch_size=patch)
    trigger, images = Erosion(model, Ageb(upsample=upsample, tau=0.5)), drawn(2, size)
    assert trigger.mask(images).shape == (2, size, size)
    assert trigger.mask(images).any((1, 2)).all()
    assert trigger(images).shape == images.shape


@pytest.mark.parametrize("select", ["gradient", "random", "random-tokens"])
def test_the_views_are_the_map_over_its_maximum_and_the_mask(tiny_vit: Build, select: Any) -> None:
    trigger, images = Erosion(tiny_vit(), Ageb(select=select)), drawn(3)
    views = trigger.views(images)
    assert list(views) == ["attention gradient", "mask"]
    assert views["attention gradient"].amax((1, 2)).tolist() == pytest.approx([1.0] * 3)
    assert views["attention gradient"].min() >= 0
    assert torch.equal(views["mask"], trigger.mask(images).float())


def test_fitting_hands_on_the_surrogate_and_the_settings(tiny_vit: Build, digits_world: World) -> None:
    surrogate, settings = tiny_vit(), Ageb(target=7, poison_rate=0.2, tau=0.5)
    train = digits_world.train.take(torch.arange(50))
    access = Access(train, surrogate, torch.Generator().manual_seed(0))
    fitted = settings.fit(access)
    assert fitted == Fitted(Erosion(surrogate, settings))
    assert settings.goal_for(10) == AllToOne(7)
    poison = settings.implant(access, fitted).poison
    assert poison is not None
    poisoned = poison(train, torch.Generator().manual_seed(1))
    rows = poisoned.poisoned.nonzero().squeeze(1)
    assert len(rows) == 10
    assert poisoned.labels[rows].eq(7).all()
    wanted = fitted.in_training(train.images(rows))
    torch.testing.assert_close(poisoned.images(rows), wanted, atol=0.5 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize("route", get_args(Route))
@pytest.mark.parametrize("role", ["surrogate", "test_surrogate"])
def test_a_surrogate_without_a_gradient_is_refused(
    tiny_vit: Build, digits_world: World, role: str, route: Route
) -> None:
    """It is so sure that its softmax is one-hot, which leaves its loss without a gradient."""
    sure: Any = tiny_vit()
    with torch.no_grad():
        sure.body.head.weight.mul_(1e9)
    access = Access(digits_world.train.take(torch.arange(50)), tiny_vit(), torch.Generator(), tiny_vit())
    with pytest.raises(UserError, match=rf"^\[{role}\] has an attention gradient of 0 everywhere"):
        Ageb(route=route).fit(replace(access, **{role: sure}))
    assert Ageb(route=route).fit(access).stored is not None


def test_another_surrogate_at_test_time_leaves_the_poison_alone(tiny_vit: Build, digits_world: World) -> None:
    first, second, settings = tiny_vit(seed=1), tiny_vit(seed=2), Ageb(poison_rate=0.2)
    train = digits_world.train.take(torch.arange(50))
    access = Access(train, first, torch.Generator(), test_surrogate=second)
    fitted = settings.fit(access)
    assert fitted == Fitted(Erosion(second, settings), stored=Erosion(first, settings))
    one, other = (settings.implant(access, made).poison for made in (fitted, Fitted(Erosion(first, settings))))
    assert one is not None
    assert other is not None
    stored = [poison(train, torch.Generator().manual_seed(1)).stamped for poison in (one, other)]
    assert stored[0] is not None
    assert torch.equal(stored[0], stored[1])


OTHERS = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4},
    "xcit_nano_12_p16_224": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
}


@pytest.mark.parametrize("name", OTHERS)
def test_without_attention_the_last_feature_map_takes_its_place(name: str, tiny_vit: Build) -> None:
    """The gradient is that of the loss with respect to what the stage puts out, by torch itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = open_model(Architecture(name, 32, 5, OTHERS[name])).requires_grad_(False)
    images, settings = drawn(2, 32), Ageb(tau=0.5)
    settings.check_surrogate(model, images)
    layer = last_map(model, images)
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    hook = layer.module.register_forward_hook(keep)
    own = images.clone().requires_grad_()
    logits = model(own)
    functional.cross_entropy(logits, logits.argmax(1), reduction="sum").backward()
    hook.remove()
    assert kept[0].grad is not None
    wanted = layer.to_map(kept[0].grad).abs().mean(1)
    assert min(wanted.shape[1:]) >= 4
    torch.testing.assert_close(feature_gradient(model, images), wanted)
    trigger = Erosion(model, settings)
    torch.testing.assert_close(trigger.gradient(images), tokens_to_pixels(wanted, (32, 32), "bilinear"))
    assert trigger.mask(images).any((1, 2)).all()


def test_a_surrogate_without_a_map_that_is_large_enough_is_refused(tiny_vit: Build) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(16, 5)).eval()
    with pytest.raises(UserError, match="no stage with a map of at least 4 x 4 at 16 px"):
        Ageb().check_surrogate(model, drawn(1, 16))
    with pytest.raises(UserError, match="no plain token attention"):
        Ageb(route="pixel").check_surrogate(model, drawn(1, 16))
    Ageb(route="pixel").check_surrogate(tiny_vit(), drawn(1, 16))


@pytest.mark.parametrize("operation", ["erosion", "dilation", "opening", "closing"])
def test_each_operation_against_scipy(tiny_vit: Build, operation: Any) -> None:
    """Selected pixels hold scipy's result where nothing else is done to them."""
    oracle = getattr(ndimage, f"grey_{operation}")
    settings = Ageb(operation=operation, alpha=0.0, signal=0.0, adjust=False, shape="cross", size=3, tau=0.5)
    trigger, images = Erosion(tiny_vit(), settings), drawn(2)
    footprint = element("cross", 3).numpy()
    whole = torch.stack(
        [
            torch.stack([torch.from_numpy(morphed(oracle, c.numpy(), footprint, operation)) for c in image])
            for image in images
        ]
    )
    mask = trigger.mask(images)
    torch.testing.assert_close(trigger(images), torch.where(mask[:, None], whole, images), atol=1e-6, rtol=0)


def morphed(oracle: Any, channel: Any, footprint: Any, operation: str) -> Any:
    """By scipy, whose opening and closing treat the border once for both steps, by their two steps."""
    erosion, dilation = ndimage.grey_erosion, ndimage.grey_dilation
    steps = {"opening": (erosion, dilation), "closing": (dilation, erosion)}.get(operation, (oracle,))
    for step in steps:
        channel = step(channel, footprint=footprint, mode="nearest")
    return channel


@pytest.mark.parametrize(
    "settings",
    [{"size": 2}, {"size": 0}, {"alpha": 1.5}, {"tau": -0.1}, {"signal": 256.0}, {"iterations": 0}, {"route": "head"}],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises((UserError, TypeError), match=f"{next(iter(settings))}"):
        Ageb(**settings)
