"""How much attention the head of a ViT pays to each image token: in the last layer, or through all layers (rollout)."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.models.observe import Maps, TokenLayout, head_attention, observe, token_layout, transformer
from vitrap.tensors.rollout import rollout, weighted_heads

AttentionMap = Literal["last", "rollout", "gradient"]
"""Which map: the last layer's attention, attention rollout, or rollout of attention weighted by its gradient."""
MAPS_BATCH = 32
"""Images per forward pass where the attention maps of all blocks are stored: 0.7 GB for a ViT-B/16 at 224 px."""


def blocks_needed(kind: AttentionMap, depth: int) -> tuple[int, ...]:
    """The blocks that `token_attention` needs from `observe`, in a ViT of `depth` blocks."""
    return (depth - 1,) if kind == "last" else tuple(range(depth))


def token_attention(
    maps: Mapping[int, Maps],
    layout: TokenLayout,
    kind: AttentionMap,
    score: Float[Tensor, ""] | None = None,
    discard: float = 0.0,
) -> Float[Tensor, "b image_tokens"]:
    """The attention that the tokens read by the head pay to each image token; differentiable, in fp32.

    Args:
        maps: attention by block, from `observe` over `blocks_needed`, in their order.
        layout: where the model's tokens are.
        kind: which map.
        score: for "gradient": the sum over images of the logit whose gradient weights the attention.
        discard: for "gradient": the share of each layer's entries to drop, in [0, 1).
    """
    layers = list(maps.values())
    if kind == "last":
        return head_attention(layers[-1].float(), layout).flatten(1)
    with torch.autocast(layers[0].device.type, enabled=False):  # rollout multiplies many layers: fp32 throughout
        if kind == "rollout":
            fused = [layer.float().mean(1) for layer in layers]
        else:
            assert score is not None, "gradient rollout needs the score that it explains"
            # Where the result is a loss, the gradient itself must be differentiable.
            gradients = torch.autograd.grad(score, layers, create_graph=torch.is_grad_enabled())
            pairs = zip(layers, gradients, strict=True)
            fused = [weighted_heads(layer.float(), gradient.float(), discard) for layer, gradient in pairs]
        return head_attention(rollout(fused)[:, None], layout).flatten(1)


@torch.no_grad()
def mass_by_block(
    model: nn.Module, images: Float[Tensor, "b c h w"], inside: Bool[Tensor, "gh gw"]
) -> list[Float[Tensor, " b"]]:
    """For each block: the share of the head's attention that falls on the tokens `inside`, for each image."""
    layout = token_layout(model)
    depth = len(transformer(model).blocks)
    by_block: list[list[Float[Tensor, " b"]]] = [[] for _ in range(depth)]
    for some in images.split(MAPS_BATCH):
        with observe(model, range(depth)) as seen:
            model(some)
        for block, maps in seen.items():
            tokens = head_attention(maps.float(), layout)
            by_block[block].append(tokens[:, inside.to(images.device)].sum(1))
    return [torch.cat(masses) for masses in by_block]


def attention_report(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    area: Callable[[tuple[int, int]], Bool[Tensor, "gh gw"]],
) -> dict[str, float]:
    """For the record: how many image tokens lie in the area D, and the mean attention that D gets at each block.

    Args:
        model: any network; the report is empty where it has no plain token attention.
        images: the images to look at.
        area: returns D, given rows and columns of the token grid.
    """
    try:
        inside = area(token_layout(model).grid)
    except UserError:
        return {}
    masses = mass_by_block(model, images, inside)
    shares = {f"attention in D, block {block}": mass.mean().item() for block, mass in enumerate(masses, 1)}
    return {"tokens in D": int(inside.sum()), "tokens": inside.numel(), **shares}
