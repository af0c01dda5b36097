"""A trigger that shows a pattern through an opacity mask, in a box of the image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vitrap.contracts import Images
from vitrap.data.sources import decode
from vitrap.errors import UserError
from vitrap.tensors.pixels import image_hash


@dataclass(frozen=True)
class Masked:
    """Images with `mask * pattern + (1 - mask) * image` in a box, or with `mask * (pattern - behind)` added to it.

    Attributes:
        pattern: in [0, 1].
        masks: opacities in [0, 1]; of several, an image's own 8-bit pixels pick one.
        top: first row of the box, in pixels.
        left: its first column.
        behind: what is taken from the pattern, one value a channel; None for the image itself.
        linf: greatest change of a pixel, in [0, 1]; 0 for no bound.
    """

    pattern: Float[Tensor, "c s t"]
    masks: Float[Tensor, "cells s t"]
    top: int
    left: int
    behind: tuple[float, ...] | None = None
    linf: float = 0.0

    def __call__(self, images: Images) -> Images:
        """Images in [0, 1] with the pattern; differentiable with respect to it."""
        box = self._box(images)
        pattern = self.pattern.to(images.device, non_blocking=True)
        behind = box
        if self.behind is not None:
            behind = torch.tensor(self.behind)[:, None, None].to(images.device, non_blocking=True)
        change = self._mask(images)[:, None] * (pattern - behind)
        change = change.clamp(-self.linf, self.linf) if self.linf else change
        triggered = images.clone()
        self._box(triggered)[:] = (box + change).clamp(0, 1)
        return triggered

    def views(self, images: Images) -> Mapping[str, Float[Tensor, "b h w"]]:
        """The opacity of every pixel."""
        opacity = torch.zeros_like(images[:, 0])
        self._box(opacity)[:] = self._mask(images)
        return {"opacity": opacity}

    def _box(self, images: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b s t"]:
        height, width = self.masks.shape[-2:]
        return images[..., self.top : self.top + height, self.left : self.left + width]

    def _mask(self, images: Images) -> Float[Tensor, "b s t"]:
        masks = self.masks.to(images.device, non_blocking=True)
        if len(masks) == 1:
            return masks.expand(len(images), -1, -1)
        return masks[image_hash(images) % len(masks)]


def make_pattern(picture: str, generator: torch.Generator, shape: tuple[int, int, int]) -> Float[Tensor, "c s s"]:
    """What a mask lets through: uniform noise, white, or the middle square of a picture file, in [0, 1].

    Args:
        picture: "noise", "white" or the path of an image file.
        generator: draws the noise, on the CPU.
        shape: channels, height and width.

    Raises:
        UserError: it is neither a word that is known nor a file, or the file is no readable image.
    """
    if picture == "noise":
        return torch.rand(shape, generator=generator)
    if picture == "white":
        return torch.ones(shape)
    if not Path(picture).is_file():
        raise UserError(f"picture = {picture!r} is no file; give one, noise or white")
    return torch.from_numpy(decode([Path(picture)], shape[1])[0]).permute(2, 0, 1).float() / 255
