"""Observing a ViT of any plain family, without changing it: its attention, its tokens and what its head reads.

Inside `with observe(model) as seen:`, each forward pass puts the softmax attention of the chosen blocks into `seen`.
Fused attention, which never forms these maps, is switched off in those blocks only. On exit all is as before.
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
    """Import the classes that the table of families names as "module:class"."""
    split = [name.split(":") for name in sorted(set(names))]
    return tuple(getattr(import_module(module), kind) for module, kind in split)


TRANSFORMERS = _classes(family.network for family in PLAIN_FAMILIES)
PLAIN = _classes(name for family in PLAIN_FAMILIES for name in family.attention)

Maps = Float[Tensor, "b heads tokens tokens"]
"""Attention after softmax: row i says how much token i attends to each token."""


@dataclass(frozen=True)
class TokenLayout:
    """Where a ViT's tokens are in its sequence.

    Attributes:
        prefix: number of tokens before the image tokens: class, distillation, registers.
        grid: rows and columns of image tokens.
        head_tokens: consecutive positions of the tokens that the head reads: the class token (and distillation token),
            or all pooled tokens.
    """

    prefix: int
    grid: tuple[int, int]
    head_tokens: tuple[int, ...]


def attends(model: nn.Module) -> bool:
    """Whether there is a ViT inside `model` whose attention can be observed: plain, over tokens."""
    return _plain_vit(model) is not None


def transformer(model: nn.Module) -> Any:
    """The ViT inside `model`, which may wrap it.

    Raises:
        UserError: there is none with plain token attention (as in Swin, CaiT, XCiT and CNNs).
    """
    found = _plain_vit(model)
    if found is None:
        raise UserError(
            f"model {name_of(model)} has no plain token attention to look at; take one of the families {plain_names()}"
        )
    return found


def _plain_vit(model: nn.Module) -> Any | None:
    """The first ViT inside `model` with plain attention in all blocks; None where there is none."""
    found: list[Any] = [module for module in model.modules() if isinstance(module, TRANSFORMERS)]
    for module in found:
        attentions = [getattr(block, "attn", None) for block in module.blocks]  # parallel blocks have no single one
        if attentions and all(isinstance(a, PLAIN) for a in attentions):
            return module
    return None


def transformer_keeping_tokens(model: nn.Module) -> Any:
    """The ViT inside `model`, which must keep all image tokens in training, so that their grid is known.

    Raises:
        UserError: there is no ViT with plain token attention, or it drops tokens in training.
    """
    vit = transformer(model)
    if getattr(getattr(vit, "patch_drop", None), "prob", 0):
        raise UserError(
            "the model drops tokens in training (patch_drop_rate), so its attention has no grid; set it to 0"
        )
    return vit


def token_layout(model: nn.Module) -> TokenLayout:
    """Where the tokens of `model` are, and which of them its head reads."""
    vit = transformer(model)
    prefix = vit.num_prefix_tokens
    grid = tuple(vit.patch_embed.grid_size)
    if isinstance(vit, VisionTransformerDistilled):
        return TokenLayout(prefix, grid, (0, 1))
    if vit.global_pool == "token":
        return TokenLayout(prefix, grid, (0,))
    first = 0 if getattr(vit, "pool_include_prefix", False) else prefix
    return TokenLayout(prefix, grid, tuple(range(first, prefix + grid[0] * grid[1])))


@contextmanager
def eager_attention(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within the block, plain attention is computed step by step, not fused; nothing changes unless `wanted`.

    On a CPU in bf16 that is twice as fast (`python -m benchmarks arithmetic`). Networks without plain attention stay
    as they are.
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
    """Collect the softmax attention of `blocks` at each forward pass.

    Args:
        model: a ready model with a plain ViT inside.
        blocks: numbers of the blocks, from 0, or from -1 backwards.
        frozen: whether the weights require no gradient within the block.
        as_leaf: whether to cut the graph at the attention maps: each becomes a leaf that requires a gradient, and
            neither the layers before it nor any weight records one. The gradient at the last attention then costs
            little more than a forward pass.

    Yields:
        The maps of the last forward pass, by block number as given.

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
            hook = attention.attn_drop.register_forward_pre_hook(_attention_hook(seen, number, as_leaf))
            restore.callback(hook.remove)
        if frozen or as_leaf:
            for weight in [w for w in model.parameters() if w.requires_grad]:
                restore.callback(weight.requires_grad_, True)
                weight.requires_grad_(False)
        yield seen


def attention_outputs(
    model: nn.Module, blocks: Sequence[int]
) -> AbstractContextManager[dict[int, Float[Tensor, "b tokens dim"]]]:
    """Collect what the attention layers of `blocks` (numbered as for `observe`) return, at each forward pass.

    Raises:
        UserError: the model has no plain token attention.
    """
    attentions = [block.attn for block in transformer(model).blocks]
    return outputs_of({number: attentions[number] for number in blocks})


def block_outputs(
    model: nn.Module, blocks: Sequence[int]
) -> AbstractContextManager[dict[int, Float[Tensor, "b tokens dim"]]]:
    """Collect the tokens that `blocks` (numbered as for `observe`) return, at each forward pass.

    Raises:
        UserError: the model has no plain token attention.
    """
    return outputs_of({number: transformer(model).blocks[number] for number in blocks})


def head_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """The name of the linear layer that gives the logits, and that layer: a ViT's head, or the last linear layer.

    For a defence that looks at features alone; `activations.logit_layer` knows other networks of timm's, too.

    Raises:
        UserError: the model has no linear layer.
    """
    vit = next((m for m in model.modules() if isinstance(m, TRANSFORMERS)), None)
    head = getattr(vit, "head", None)  # a distilled ViT's has a second one beside it
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if isinstance(head, nn.Linear):
        found = [(name, m) for name, m in found if m is head]
    if not found:
        raise UserError(
            f"model {type(model).__name__} has no linear layer, so its features cannot be observed;"
            " choose another network or another defence"
        )
    return found[-1]


@torch.no_grad()
def features(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim"]:
    """The features of each image, in fp32: the input of `head_layer`."""
    seen: list[Tensor] = []
    hook = head_layer(model)[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(images)
    finally:
        hook.remove()
    return seen[-1].float()


def head_attention(maps: Maps, layout: TokenLayout) -> Float[Tensor, "b gh gw"]:
    """The attention that the head's tokens pay to each image token: the mean over heads and over their rows."""
    # A slice, since a list of rows would make the host wait.
    rows = maps[:, :, layout.head_tokens[0] : layout.head_tokens[-1] + 1, layout.prefix :]
    return rows.mean((1, 2)).unflatten(1, layout.grid)


def _attention_hook(seen: dict[int, Maps], number: int, as_leaf: bool) -> Any:
    """A hook that puts the input of a block's attention dropout, the softmax attention, into `seen`."""

    def keep(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        maps = args[0].detach().requires_grad_() if as_leaf else args[0]
        seen[number] = maps
        return (maps,)

    return keep
