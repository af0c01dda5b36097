"""How much each image token counts for what a ViT's head reads: at the last layer, or through all of them."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.models.observe import Maps, TokenLayout, observe, read_tokens, token_layout, transformer
from vitrap.tensors.rollout import rollout, weighted_heads

AttentionMap = Literal["last", "rollout", "gradient"]
MAPS_BATCH = 32
"""Images at a time where the maps of all blocks are kept: 0.7 GB for a ViT-B/16 at 224 px."""


def blocks_needed(kind: AttentionMap, depth: int) -> tuple[int, ...]:
    """The blocks that `observe` must show for `token_attention`."""
    return (depth - 1,) if kind == "last" else tuple(range(depth))


def token_attention(
    maps: Mapping[int, Maps],
    layout: TokenLayout,
    kind: AttentionMap,
    score: Float[Tensor, ""] | None = None,
    discard: float = 0.0,
) -> Float[Tensor, "b image_tokens"]:
    """What the head's rows give to each image token, differentiable, in fp32; what prefix tokens get is left out.

    Args:
        maps: attention by block, from `observe` over `blocks_needed`, in their order.
        layout: of the model's tokens.
        kind: the last block's attention; rollout through all blocks; or rollout of attention weighted by the
            gradient of `score`.
        score: sum over images of the logit whose gradient weights the attention.
        discard: share of each layer that gradient rollout drops, in [0, 1).
    """
    layers = list(maps.values())
    if kind == "last":
        return read_tokens(layers[-1].float(), layout).flatten(1)
    with torch.autocast(layers[0].device.type, enabled=False):
        if kind == "rollout":
            fused = [layer.float().mean(1) for layer in layers]
        else:
            assert score is not None, "gradient rollout needs the score that it explains"
            slopes = torch.autograd.grad(score, layers, create_graph=torch.is_grad_enabled())
            pairs = zip(layers, slopes, strict=True)
            fused = [weighted_heads(layer.float(), slope.float(), discard) for layer, slope in pairs]
        return read_tokens(rollout(fused)[:, None], layout).flatten(1)


@torch.no_grad()
def mass_by_block(
    model: nn.Module, images: Float[Tensor, "b c h w"], inside: Bool[Tensor, "gh gw"]
) -> list[Float[Tensor, " b"]]:
    """The share of the head's rows' attention that falls on the tokens `inside`, at each block, for each image."""
    layout = token_layout(model)
    depth = len(transformer(model).blocks)
    found: list[list[Float[Tensor, " b"]]] = [[] for _ in range(depth)]
    for some in images.split(MAPS_BATCH):
        with observe(model, range(depth)) as seen:
            model(some)
        for block, maps in seen.items():
            found[block].append(read_tokens(maps.float(), layout)[:, inside.to(images.device)].sum(1))
    return [torch.cat(masses) for masses in found]


def attention_report(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    area: Callable[[tuple[int, int]], Bool[Tensor, "gh gw"]],
) -> dict[str, float]:
    """For a record: how many tokens lie in an area D of the token grid, and the attention that they get at each block.

    Empty for a model without plain token attention.
    """
    try:
        inside = area(token_layout(model).grid)
    except UserError:
        return {}
    masses = mass_by_block(model, images, inside)
    shares = {f"attention in D, block {block}": mass.mean().item() for block, mass in enumerate(masses, 1)}
    return {"tokens in D": int(inside.sum()), "tokens": inside.numel(), **shares}
