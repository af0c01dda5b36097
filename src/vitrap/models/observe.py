"""Looking at the attention of a network of any plain family, without changing the model.

Inside `with observe(model) as seen:` each forward pass leaves the softmax attention of the chosen blocks in
`seen`. Fused attention is switched off for those blocks alone, so the others stay as fast as they were; on exit
everything is as before.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.models.families import PLAIN as PLAIN_FAMILIES
from vitrap.models.families import plain_names
from vitrap.models.layers import name_of, outputs_of


def _classes(names: Iterable[str]) -> tuple[type[nn.Module], ...]:
    """The classes that the table of families names as "module:class"."""
    split = [name.split(":") for name in sorted(set(names))]
    return tuple(getattr(import_module(module), kind) for module, kind in split)


TRANSFORMERS = _classes(family.network for family in PLAIN_FAMILIES)
PLAIN = _classes(name for family in PLAIN_FAMILIES for name in family.attention)

Maps = Float[Tensor, "b heads tokens tokens"]


@dataclass(frozen=True)
class TokenLayout:
    """Where a ViT's tokens stand in its sequence.

    Attributes:
        prefix: tokens before the image's: class, distillation, registers.
        grid: rows and columns of image tokens.
        read: positions of the tokens that the head reads, one after the other: the class token (and distillation
            token), or all pooled tokens.
    """

    prefix: int
    grid: tuple[int, int]
    read: tuple[int, ...]


def attends(model: nn.Module) -> bool:
    """Whether there is a ViT inside `model` whose plain token attention can be looked at."""
    return _plain_vit(model) is not None


def transformer(model: nn.Module) -> Any:
    """The ViT inside `model`, which may wrap it.

    Raises:
        UserError: there is none with plain token attention (Swin, CaiT, XCiT, CNNs and others).
    """
    found = _plain_vit(model)
    if found is None:
        raise UserError(
            f"model {name_of(model)} has no plain token attention to look at; take one of the families {plain_names()}"
        )
    return found


def _plain_vit(model: nn.Module) -> Any | None:
    found: list[Any] = [module for module in model.modules() if isinstance(module, TRANSFORMERS)]
    for module in found:
        attentions = [getattr(block, "attn", None) for block in module.blocks]  # parallel blocks have no single one
        if attentions and all(isinstance(a, PLAIN) for a in attentions):
            return module
    return None


def transformer_keeping_tokens(model: nn.Module) -> Any:
    """The ViT inside `model`, of which every token can be found again in training, too.

    Raises:
        UserError: there is none with plain token attention, or it drops tokens.
    """
    vit = transformer(model)
    if getattr(getattr(vit, "patch_drop", None), "prob", 0):
        raise UserError(
            "the model drops tokens in training (patch_drop_rate), so its attention has no grid; set it to 0"
        )
    return vit


def token_layout(model: nn.Module) -> TokenLayout:
    """Where the tokens of `model` stand, and which of them its head reads."""
    vit = transformer(model)
    prefix, grid = vit.num_prefix_tokens, tuple(vit.patch_embed.grid_size)
    if isinstance(vit, VisionTransformerDistilled):
        return TokenLayout(prefix, grid, (0, 1))
    if vit.global_pool == "token":
        return TokenLayout(prefix, grid, (0,))
    first = 0 if getattr(vit, "pool_include_prefix", False) else prefix
    return TokenLayout(prefix, grid, tuple(range(first, prefix + grid[0] * grid[1])))


@contextmanager
def eager_attention(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within the block, attention is computed step by step where `wanted`, not fused.

    On a CPU in bf16 that is twice as fast (`python -m benchmarks arithmetic`); other networks than plain ViTs stay as
    they are.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, PLAIN)] if wanted else []
    with ExitStack() as restore:
        for layer in layers:
            restore.callback(setattr, layer, "fused_attn", layer.fused_attn)
            layer.fused_attn = False
        yield


@contextmanager
def observe(
    model: nn.Module, blocks: Sequence[int] = (-1,), *, frozen: bool = False, as_leaf: bool = False
) -> Iterator[dict[int, Maps]]:
    """Collect the softmax attention of `blocks`, numbered from 0, or from -1 backwards, at each forward pass.

    Args:
        model: a ready model with a plain ViT inside.
        blocks: which blocks to look at.
        frozen: the weights ask for no gradient meanwhile.
        as_leaf: cut the graph at the attention maps: each becomes a leaf that requires a gradient, and nothing
            before it or beside it (the weights, which it freezes) records one. For the gradient at the last attention
            alone this costs little more than a forward pass.

    Yields:
        block number as given -> attention after softmax, b x heads x queries x keys.

    Raises:
        UserError: the model has no plain token attention.
    """
    attentions = [block.attn for block in transformer(model).blocks]
    seen: dict[int, Maps] = {}
    with ExitStack() as restore:
        for number in blocks:
            attention = attentions[number]
            restore.callback(setattr, attention, "fused_attn", attention.fused_attn)
            attention.fused_attn = False
            hook = attention.attn_drop.register_forward_pre_hook(_keeper(seen, number, as_leaf))
            restore.callback(hook.remove)
        if frozen or as_leaf:
            for weight in [w for w in model.parameters() if w.requires_grad]:
                restore.callback(weight.requires_grad_, True)
                weight.requires_grad_(False)
        yield seen


def attention_outputs(
    model: nn.Module, blocks: Sequence[int]
) -> AbstractContextManager[dict[int, Float[Tensor, "b tokens dim"]]]:
    """Collect what the attention of `blocks` (numbered as for `observe`) adds to the tokens, at each forward pass.

    Raises:
        UserError: the model has no plain token attention.
    """
    attentions = [block.attn for block in transformer(model).blocks]
    return outputs_of({number: attentions[number] for number in blocks})


def block_outputs(
    model: nn.Module, blocks: Sequence[int]
) -> AbstractContextManager[dict[int, Float[Tensor, "b tokens dim"]]]:
    """Collect the tokens that `blocks` (numbered as for `observe`) put out, at each forward pass.

    Raises:
        UserError: the model has no plain token attention.
    """
    return outputs_of({number: transformer(model).blocks[number] for number in blocks})


def head_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """The linear layer that gives the logits, and its name: a ViT's head, or a network's last linear layer.

    Raises:
        UserError: the model has none.
    """
    vit = next((m for m in model.modules() if isinstance(m, TRANSFORMERS)), None)
    head = getattr(vit, "head", None)  # a distilled ViT's has a second one beside it
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if isinstance(head, nn.Linear):
        found = [(name, m) for name, m in found if m is head]
    if not found:
        raise UserError(f"model {type(model).__name__} has no linear layer, so its features cannot be looked at")
    return found[-1]


@torch.no_grad()
def features(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim"]:
    """What the head reads of each image, in fp32: the input of `head_layer`."""
    seen: list[Tensor] = []
    hook = head_layer(model)[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(images)
    finally:
        hook.remove()
    return seen[-1].float()


def read_tokens(maps: Maps, layout: TokenLayout) -> Float[Tensor, "b gh gw"]:
    """Mean over heads and over the rows that the head reads; the columns of the image's tokens, as their grid."""
    first, last = layout.read[0], layout.read[-1]  # a slice, since a list of rows would make the host wait
    rows = maps[:, :, first : last + 1, layout.prefix :]
    return rows.mean((1, 2)).unflatten(1, layout.grid)


def _keeper(seen: dict[int, Maps], number: int, as_leaf: bool) -> Any:
    def keep(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        maps = args[0].detach().requires_grad_() if as_leaf else args[0]
        seen[number] = maps
        return (maps,)

    return keep
