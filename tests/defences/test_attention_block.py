"""Attention blocking: a network made by hand that looks at one token, rollout against numpy, boxes at borders."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Repaired, Suspect
from vitrap.data.sources import World
from vitrap.defences.attention_block import (
    AttentionBlock,
    Blocking,
    blacken,
    box_side,
    gradient_heat,
    hottest_box,
)
from vitrap.errors import UserError
from vitrap.models.attention import MAPS_BATCH
from vitrap.models.classifier import Classifier
from vitrap.models.observe import token_layout

Build = Callable[..., Classifier]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit, registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "vit, average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def drawn(n: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def repaired(model: nn.Module, clean: ImageSet, **settings: Any) -> Repaired:
    return AttentionBlock(**settings).apply(Suspect(model, clean, clean.n_classes, torch.Generator().manual_seed(0)))


def blocking(found: Repaired) -> Blocking:
    assert isinstance(found.model, Blocking)
    return found.model


def one_clean(size: int = 16) -> ImageSet:
    zero = torch.zeros(1, dtype=torch.int64)
    return ImageSet(torch.zeros(1, 3, size, size, dtype=torch.uint8), zero, zero, 10, size)


# A network by hand


@torch.no_grad()
def looks_at_white(model: Classifier) -> Classifier:
    """One layer whose class token looks at white patches, and whose class 1 grows with what it sees there.

    Channel 0 of a token is 0 for a black patch and 2 for a white one; the class token is 1 in channel 2. Its query
    meets keys of channel 0, and what it reads of them goes to channel 1, which class 1 stands for.
    """
    body: Any = model.body
    for weight in body.parameters():
        weight.zero_()
    for norm in (body.blocks[0].norm1, body.blocks[0].norm2, body.norm):
        norm.weight.fill_(1)
    pixels = body.patch_embed.proj.weight[0].numel()
    body.patch_embed.proj.weight[0] = 1 / pixels  # black is -1 after normalisation, white 1
    body.patch_embed.proj.bias[0] = 1
    body.cls_token[0, 0, 2] = 1
    width = body.embed_dim
    qkv = body.blocks[0].attn.qkv
    qkv.bias[0] = 3  # the query
    qkv.weight[width, 0] = 3  # the key
    qkv.weight[2 * width + 1, 0] = 1  # the value
    body.blocks[0].attn.proj.weight.copy_(torch.eye(width))
    body.head.weight[1, 1] = 1
    return model


@pytest.fixture
def white_seer(tiny_vit: Build) -> Classifier:
    model = tiny_vit(depth=1, num_heads=1)
    assert model.mean.flatten().tolist() == model.std.flatten().tolist() == [0.5] * 3
    return looks_at_white(model)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("column", range(4))
def test_the_patch_that_the_model_looks_at_is_black_and_nothing_else(
    white_seer: Classifier, row: int, column: int
) -> None:
    images = 0.2 * drawn()
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = True
    images = torch.where(inside, 1.0, images)
    assert white_seer(images).argmax(1).eq(1).all()
    model = blocking(repaired(white_seer, one_clean(), edge=56))  # 4 px of 16
    assert torch.equal(model.blocked(images), torch.where(inside, 0.0, images))
    torch.testing.assert_close(model(images), white_seer(torch.where(inside, 0.0, images)))


# The heat map


def own_maps(model: Classifier, images: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Attention of all blocks and the gradient of the own class's logit there, by hooks of the test's own."""
    maps: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        maps.append(args[0])

    blocks: Any = model.body.blocks
    hooks = []
    for block in blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_pre_hook(keep))
    logits = model(images)
    logits.amax(1).sum().backward()
    for block, hook in zip(blocks, hooks, strict=True):
        block.attn.fused_attn = True
        hook.remove()
    slopes = [m.grad.double().numpy() for m in maps if m.grad is not None]
    return [m.detach().double().numpy() for m in maps], slopes


@pytest.mark.parametrize("discard", [0.0, 0.5, 0.9])
def test_the_heat_is_rollout_by_numpy(tiny_vit: Build, discard: float) -> None:
    model, images = tiny_vit(depth=3).double(), drawn(4).double()
    maps, slopes = own_maps(model, images)
    assert len(slopes) == 3
    wanted = []
    for i in range(4):
        flow = np.eye(17)
        for attention, slope in zip(maps, slopes, strict=True):
            fused = np.maximum((attention[i] * slope[i]).mean(0), 0)
            fused.flat[np.argsort(fused, None, kind="stable")[: int(discard * 289)]] = 0
            mixed = (fused + np.eye(17)) / 2
            flow = mixed / mixed.sum(1, keepdims=True) @ flow
        wanted.append(flow[0, 1:].reshape(4, 4))
    found = gradient_heat(model, images, discard)
    assert found.shape == (4, 4, 4)
    np.testing.assert_allclose(found.numpy(), np.stack(wanted), atol=1e-6)


@each_family
def test_every_family_is_blocked_and_its_model_stays_as_it_is(tiny_vit: Build, family: str) -> None:
    name, overrides = FAMILIES[family]
    model, images = tiny_vit(name, **overrides), drawn()
    next(model.parameters()).requires_grad_(False)

    def state(of: nn.Module) -> Any:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in of.modules()]
        fused = [m.__dict__.get("fused_attn") for m in of.modules()]
        return hooks, fused, [m.training for m in of.modules()], [(w.requires_grad, w.grad) for w in of.parameters()]

    weights, before = {k: v.clone() for k, v in model.state_dict().items()}, state(model)
    found = repaired(model, one_clean()).model
    inside_before = state(found)
    logits = found(images)
    assert state(model) == before
    assert state(found) == inside_before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not {id(w) for w in model.parameters()} & {id(w) for w in found.parameters()}
    assert not found.training
    assert logits.shape == (3, 10)
    assert (logits - model(images)).abs().max() > 1e-4, "blocking changes nothing"


# The box


def test_the_box_scales_with_the_image() -> None:
    assert [box_side(30, size) for size in (4, 16, 32, 64, 224, 384)] == [1, 2, 4, 9, 30, 51]


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7])
def test_the_hottest_box_against_all_boxes(side: int) -> None:
    heat = torch.rand(6, 7, 9, generator=torch.Generator().manual_seed(side))
    top, left = hottest_box(heat, side)
    for i, of in enumerate(heat.double().numpy()):
        sums = np.array([[of[r : r + side, c : c + side].sum() for c in range(10 - side)] for r in range(8 - side)])
        assert (int(top[i]), int(left[i])) == np.unravel_index(sums.argmax(), sums.shape)


@pytest.mark.parametrize("place", [(0, 0), (0, 7), (7, 0), (7, 7), (0, 3), (4, 7)])
def test_a_box_at_a_border_is_whole_and_inside(place: tuple[int, int]) -> None:
    heat = torch.zeros(1, 8, 8)
    heat[0, place[0], place[1]] = 1
    top, left = hottest_box(heat, 3)
    black = blacken(torch.ones(1, 3, 8, 8), top, left, 3).eq(0)
    assert black.sum() == 3 * 9
    assert black[0, :, place[0], place[1]].all()
    assert black[0, 0, int(top) : int(top) + 3, int(left) : int(left) + 3].all()


def test_without_any_heat_the_first_box_is_taken() -> None:
    assert [int(edge) for edge in hottest_box(torch.zeros(1, 5, 5), 2)] == [0, 0]


# The model


def test_it_predicts_of_the_blackened_image(tiny_vit: Build, digits_world: World) -> None:
    """Step by step, with an up-sampling of the test's own."""
    model, images = tiny_vit(), digits_world.test.images(torch.arange(6))
    found = blocking(repaired(model, digits_world.clean, edge=40))  # 3 px of 16
    heat = gradient_heat(model, images, 0.9).numpy()
    centres, pixels = np.arange(4) * 4 + 1.5, np.arange(16)
    by_hand = images.clone()
    for i, tokens in enumerate(heat):
        down = np.stack([np.interp(pixels, centres, column) for column in tokens.T], 1)
        full = np.stack([np.interp(pixels, centres, row) for row in down])
        sums = np.array([[full[r : r + 3, c : c + 3].sum() for c in range(14)] for r in range(14)])
        r, c = np.unravel_index(sums.argmax(), sums.shape)
        by_hand[i, :, r : r + 3, c : c + 3] = 0
    assert torch.equal(found.blocked(images), by_hand)
    with torch.no_grad():
        torch.testing.assert_close(found(images), model(by_hand))


def test_an_images_prediction_depends_on_that_image_alone(tiny_vit: Build, digits_world: World) -> None:
    found = repaired(tiny_vit(), digits_world.clean).model
    images = digits_world.test.images(torch.arange(MAPS_BATCH + 5))
    with torch.no_grad():
        wanted = found(images)
        assert wanted.shape == (MAPS_BATCH + 5, 10)
        torch.testing.assert_close(found(images.flip(0)).flip(0), wanted)
        torch.testing.assert_close(torch.cat([found(image) for image in images.split(1)]), wanted)
    torch.testing.assert_close(found(images), wanted, msg="it depends on whether gradients are asked for")
    with torch.inference_mode():
        torch.testing.assert_close(found(images), wanted, msg="it does not work in inference mode")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(found(images)).all()


@pytest.mark.parametrize("change", [{"edge": 100}, {"discard": 0.99}])
def test_every_parameter_has_an_effect(tiny_vit: Build, digits_world: World, change: dict[str, Any]) -> None:
    images = digits_world.test.images(torch.arange(64))
    ours, other = (blocking(repaired(tiny_vit(), digits_world.clean, **s)).blocked(images) for s in ({}, change))
    assert not torch.equal(ours, other)


def test_one_clean_image_and_more_classes_than_it_shows(tiny_vit: Build) -> None:
    model = tiny_vit(n_classes=50)
    found = AttentionBlock().apply(Suspect(model, one_clean(), 50, torch.Generator()))
    assert found.model(drawn()).shape == (3, 50)
    assert found.report == {"side of the box, px": 2}


def test_the_generator_is_left_alone(tiny_vit: Build) -> None:
    generator, state = torch.Generator().manual_seed(3), torch.random.get_rng_state()
    AttentionBlock().apply(Suspect(tiny_vit(), one_clean(), 10, generator)).model(drawn())
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_layout_of_the_copy_is_that_of_the_model(tiny_vit: Build) -> None:
    model = tiny_vit()
    assert token_layout(repaired(model, one_clean()).model) == token_layout(model)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UserError, match="no plain token attention"):
        repaired(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).eval(), one_clean())


@pytest.mark.parametrize("settings", [{"edge": 0}, {"edge": 225}, {"discard": -0.1}, {"discard": 1.0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises((UserError, TypeError), match=f"{next(iter(settings))}"):
        AttentionBlock(**settings)
