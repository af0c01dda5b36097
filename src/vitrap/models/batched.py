"""Logits of many changed copies of each image, in batches of about equal size."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrap.contracts import Images

BATCH = 512
"""Images per forward pass: enough to fill two CPU cores or a GPU, 0.3 GB of pixels at 224 px."""


@torch.no_grad()
def logits_under(
    model: nn.Module, images: Images, change: Callable[[Images], Images], times: int, most: int = BATCH
) -> Float[Tensor, "b times k"]:
    """Logits, in fp32, of `times` changed copies of each image.

    Args:
        model: a function of images in [0, 1].
        images: the images.
        change: returns `times` changed copies of each of n images; those of one image follow each other.
        times: number of copies.
        most: changed images per forward pass; it bounds memory, not the result.
    """
    logits = [model(change(some)).float() for some in images.split(max(1, most // times))]
    return torch.cat(logits).unflatten(0, (len(images), times))
