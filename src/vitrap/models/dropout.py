"""Dropout in a plain ViT at inference, with masks that the caller draws once.

The ViT's own dropout layers stay as they are: most are off, and they would draw from torch's global state. Instead,
hooks multiply what flows between the parts of each block by the caller's masks, so that the same masks serve every
image. On exit the model is as before.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrap.models.observe import token_layout, transformer

Where = Literal["stream", "residual", "token"]
"""What is dropped: elements of each block's output ("stream"); elements of what attention and MLP each add to it
("residual"); whole image tokens in the input of each block's attention ("token")."""

Noise = Float[Tensor, "passes sites tokens width"]
"""A number for each element that may be dropped, in each pass and at each hooked place (site)."""
Masks = Float[Tensor, "passes sites tokens width"]
"""What each element is multiplied by, in each pass and at each hooked place (site)."""


def dropout_noise(model: nn.Module, where: Where, passes: int, generator: torch.Generator) -> Noise:
    """Uniform numbers in [0, 1), on the generator's device.

    Raises:
        UserError: the model has no plain token attention.
    """
    vit = transformer(model)
    layout = token_layout(model)
    tokens = layout.prefix + layout.grid[0] * layout.grid[1]
    width = 1 if where == "token" else vit.embed_dim
    shape = (passes, len(_sites(vit, where)), tokens, width)
    return torch.rand(shape, generator=generator, device=generator.device)


def dropout_masks(model: nn.Module, where: Where, noise: Noise, rate: float) -> Masks:
    """Dropout masks: 0 where the noise is below `rate`, so that a greater rate drops all that a smaller one drops.

    The other elements are scaled by 1 / (1 - rate), as in dropout. Whole tokens are not scaled, since attention
    compares them by softmax, which a scale would sharpen; and prefix tokens (class, distillation, registers) are never
    dropped.
    """
    kept = (noise >= rate).float()
    if where != "token":
        return kept / (1 - rate)
    kept[:, :, : token_layout(model).prefix] = 1
    return kept


@contextmanager
def dropout(model: nn.Module, where: Where, masks: Masks) -> Iterator[None]:
    """Within the block, the model drops by the masks: image i of a batch under mask i modulo the number of passes.

    So a batch must hold each image once for every pass, the copies of one image following each other.

    Raises:
        UserError: the model has no plain token attention.
    """
    with ExitStack() as restore:
        for site, mask in zip(_sites(transformer(model), where), masks.unbind(1), strict=True):
            if where == "token":
                hook = site.register_forward_pre_hook(_drop_input(mask))
            else:
                hook = site.register_forward_hook(_drop_output(mask))
            restore.callback(hook.remove)
        yield


def masked(
    tokens: Float[Tensor, "b tokens dim"], mask: Float[Tensor, "passes tokens width"]
) -> Float[Tensor, "b tokens dim"]:
    """Multiply the tokens of image i by mask i modulo the number of passes, in the tokens' own precision.

    >>> masked(torch.ones(2, 1, 2), torch.tensor([[[0.0]], [[3.0]]])).tolist()
    [[[0.0, 0.0]], [[3.0, 3.0]]]
    """
    copies = tokens.unflatten(0, (len(tokens) // len(mask), len(mask)))
    return (copies * mask.to(tokens.dtype)).flatten(0, 1)


def _sites(vit: Any, where: Where) -> list[nn.Module]:
    """The modules to hook: in every family, what a block adds goes through its `drop_path1` and `drop_path2`."""
    if where == "stream":
        return list(vit.blocks)
    if where == "token":
        return [block.attn for block in vit.blocks]
    return [added for block in vit.blocks for added in (block.drop_path1, block.drop_path2)]


def _drop_input(mask: Tensor) -> Any:
    """A hook that masks the input of a module."""
    return lambda module, args: (masked(args[0], mask), *args[1:])


def _drop_output(mask: Tensor) -> Any:
    """A hook that masks the output of a module."""
    return lambda module, args, output: masked(output, mask)
