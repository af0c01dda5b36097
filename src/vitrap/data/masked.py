"""A trigger that shows a pattern through an opacity mask, in a box of the image; for attacks to build on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitrap.contracts import Images
from vitrap.images import misshapen
from vitrap.tensors.pixels import image_hash


@dataclass(frozen=True)
class Masked:
    """The trigger: blends the pattern over the box, or adds it to the box.

    In the box, an image x becomes (1 - mask) x + mask pattern, or with `behind` x + mask (pattern - behind).

    Attributes:
        pattern: the pattern, in [0, 1].
        masks: one or more opacity masks, in [0, 1]; a hash of an image's 8-bit pixels picks its mask.
        top: first row of the box, in pixels.
        left: first column of the box, in pixels.
        behind: the colour that is subtracted from the pattern before adding it; None to blend.
        linf: greatest change of a pixel, in [0, 1]; 0 for no bound.
    """

    pattern: Float[Tensor, "c s t"]
    masks: Float[Tensor, "cells s t"]
    top: int
    left: int
    behind: tuple[float, ...] | None = None
    linf: float = 0.0

    def __call__(self, images: Images) -> Images:
        """Images with the pattern; differentiable with respect to it.

        Raises:
            UserError: the box does not lie within the images, or they have other channels than the pattern.
        """
        box = self._box(images)
        if box.shape[1:] != self.pattern.shape:
            channels, height, width = self.pattern.shape
            raise misshapen(images, f"b x {channels} x {self.top + height} x {self.left + width} or larger")
        pattern = self.pattern.to(images.device, non_blocking=True)
        # Blending is adding the difference to the image itself: x + mask (pattern - x).
        subtracted = box
        if self.behind is not None:
            subtracted = torch.tensor(self.behind)[:, None, None].to(images.device, non_blocking=True)
        change = self._mask(images)[:, None] * (pattern - subtracted)
        change = change.clamp(-self.linf, self.linf) if self.linf else change
        triggered = images.clone()
        self._box(triggered)[:] = (box + change).clamp(0, 1)
        return triggered

    def views(self, images: Images) -> Mapping[str, Float[Tensor, "b h w"]]:
        """The map that a record shows: the opacity of every pixel."""
        opacity = torch.zeros_like(images[:, 0])
        self._box(opacity)[:] = self._mask(images)
        return {"opacity": opacity}

    def _box(self, images: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b s t"]:
        """A view of the box of each image."""
        height, width = self.masks.shape[-2:]
        return images[..., self.top : self.top + height, self.left : self.left + width]

    def _mask(self, images: Images) -> Float[Tensor, "b s t"]:
        """The mask of each image."""
        masks = self.masks.to(images.device, non_blocking=True)
        if len(masks) == 1:
            return masks.expand(len(images), -1, -1)
        return masks[image_hash(images) % len(masks)]
