"""Dropout at inference: block by block against a forward pass of the test's own, and nothing of the model changed."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.models.classifier import Classifier
from vitrap.models.dropout import Where, dropout, dropout_masks, dropout_noise, masked
from vitrap.models.observe import token_layout

Build = Callable[..., Classifier]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit, registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "vit, no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
}
each_place = pytest.mark.parametrize("where", get_args(Where))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=generator(seed))


def masks_for(model: Classifier, where: Where, rate: float = 0.4, passes: int = 2) -> Tensor:
    return dropout_masks(model, where, dropout_noise(model, where, passes, generator(1)), rate)


@torch.no_grad()
def by_hand(model: Classifier, image: Tensor, where: Where, masks: Tensor) -> Tensor:
    """Logits of one image under one pass's masks, from the parts of timm's plain block."""
    body: Any = model.body
    x = body.norm_pre(body._pos_embed(body.patch_embed((image[None] - model.mean) / model.std)))
    for number, block in enumerate(body.blocks):
        read = block.norm1(x)
        attended = block.attn(read * masks[number] if where == "token" else read)
        x = x + (attended * masks[2 * number] if where == "residual" else attended)
        added = block.mlp(block.norm2(x))
        x = x + (added * masks[2 * number + 1] if where == "residual" else added)
        x = x * masks[number] if where == "stream" else x
    return body.forward_head(body.norm(x))[0]


@each_place
@torch.no_grad()
def test_logits_are_those_of_a_pass_by_hand(tiny_vit: Build, where: Where) -> None:
    model, images = tiny_vit(), drawn(3)
    masks = masks_for(model, where)
    with dropout(model, where, masks):
        found = model(images.repeat_interleave(2, 0)).unflatten(0, (3, 2))
    for number, image in enumerate(images):
        for turn in range(2):
            torch.testing.assert_close(found[number, turn], by_hand(model, image, where, masks[turn]))
    assert not torch.allclose(found[:, 0], found[:, 1], atol=1e-3)
    assert not torch.allclose(found[:, 0], model(images), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@each_place
@torch.no_grad()
def test_every_family_takes_masks_and_stays_as_it_is(tiny_vit: Build, family: str, where: Where) -> None:
    name, overrides = FAMILIES[family]
    model, images = tiny_vit(name, **overrides), drawn(4)
    bare, hooks = model(images), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    masks = masks_for(model, where)
    with dropout(model, where, torch.ones_like(masks)):
        torch.testing.assert_close(model(images), bare)
    with dropout(model, where, masks):
        assert (model(images) - bare).abs().amax(1).min() > 1e-4
    assert torch.equal(model(images), bare)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any(m.training for m in model.modules())


def test_hooks_go_when_the_block_fails(tiny_vit: Build) -> None:
    model = tiny_vit()
    with pytest.raises(RuntimeError, match="stop"), dropout(model, "stream", masks_for(model, "stream")):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_image_goes_through_its_own_mask() -> None:
    mask = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    tokens = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]], [[7.0, 8.0]]])
    assert masked(tokens, mask).tolist() == [[[1.0, 0.0]], [[0.0, 8.0]], [[5.0, 0.0]], [[0.0, 16.0]]]
    assert masked(tokens.bfloat16(), mask).dtype == torch.bfloat16
    assert masked(tokens[:0], mask).shape == (0, 1, 2)


@pytest.mark.parametrize(
    ("where", "shape"), [("stream", (5, 2, 17, 16)), ("residual", (5, 4, 17, 16)), ("token", (5, 2, 17, 1))]
)
def test_noise_has_a_number_for_whatever_may_be_dropped(tiny_vit: Build, where: Where, shape: tuple[int, ...]) -> None:
    model, before = tiny_vit(), torch.get_rng_state()
    noise = dropout_noise(model, where, 5, generator())
    assert noise.shape == shape
    assert torch.equal(noise, dropout_noise(model, where, 5, generator()))
    assert not torch.equal(noise, dropout_noise(model, where, 5, generator(1)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("where", ["stream", "residual"])
def test_elements_are_dropped_at_the_rate_and_scaled(tiny_vit: Build, where: Where, rate: float) -> None:
    masks = masks_for(tiny_vit(), where, rate, passes=30)
    kept = masks > 0
    torch.testing.assert_close(masks[kept], torch.full_like(masks[kept], 1 / (1 - rate)))
    assert abs(kept.double().mean().item() - (1 - rate)) < 4 * (rate * (1 - rate) / kept.numel()) ** 0.5


@pytest.mark.parametrize(("overrides", "prefix"), [({}, 1), ({"reg_tokens": 3}, 4)])
def test_tokens_are_dropped_whole_and_prefix_tokens_never(
    tiny_vit: Build, overrides: dict[str, Any], prefix: int
) -> None:
    model = tiny_vit(**overrides)
    masks = masks_for(model, "token", 0.7, passes=40)
    assert token_layout(model).prefix == prefix
    assert masks[:, :, :prefix].eq(1).all()
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    dropped = 1 - masks[:, :, prefix:].mean().item()
    assert abs(dropped - 0.7) < 4 * (0.21 / (40 * 2 * 16)) ** 0.5


@each_place
def test_a_greater_rate_drops_more_of_the_same(tiny_vit: Build, where: Where) -> None:
    model = tiny_vit()
    noise = dropout_noise(model, where, 3, generator())
    few, many = (dropout_masks(model, where, noise, rate) == 0 for rate in (0.3, 0.6))
    assert many[few].all()
    assert many.sum() > few.sum() > 0


def test_a_network_without_plain_attention_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 10)).eval()
    with pytest.raises(UserError, match="no plain token attention"):
        dropout_noise(network, "stream", 2, generator())
    with (
        pytest.raises(UserError, match="no plain token attention"),
        dropout(network, "stream", torch.ones(1, 2, 17, 16)),
    ):
        pass
