"""Attention blocking: black out the place that the model looks at most, and predict again.

Subramanya, Saha, Koohpayegani, Tejankar, Pirsiavash: "Backdoor Attacks on Vision Transformers", 2022,
https://arxiv.org/abs/2206.08477; code: https://github.com/UCDvision/backdoor_transformer. A later version: "A Closer
Look at Robustness of Vision Transformers to Backdoor Attacks", WACV 2024.

A trigger in one place draws the attention of a ViT. So for every image, triggered or not:

    1. gradient rollout for the predicted class: in each layer attention times its gradient, mean over heads, negative
       entries and the lowest 90 % set to 0, averaged with the residual; then the product of all layers
    2. heat map: the row of the class token, which the head reads, up-sampled to pixels
    3. the 30 x 30 px box (at 224 px) that holds the most heat is painted black
    4. the model predicts again; this prediction counts

Nothing is trained, and no clean images are needed. The repaired model does all four steps in its forward pass, at about
four times the cost of one.

What differs, as read in the code (the paper's own text could not be read):

    - the code stores gradients in the order of the backward pass and attention in that of the forward pass, so it pairs
      the first layer's attention with the last layer's gradient; here each layer has its own gradient
    - it divides the columns of a layer by the sums of its rows; here rows sum to 1, as rollout is defined
    - it sums heat over 31 x 31 px, with zeros beyond the border, and moves a box that sticks out back inside; here the
      sum is over 30 x 30 px, and only of boxes inside the image; both find the same place up to a pixel

For other image sizes the box scales with the image. If the head reads several tokens (distilled models, or a mean over
all tokens), the heat map is the mean of their rows.
"""

import copy
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Card, Images, OutcomeKind, Repaired, Suspect
from vitrap.models.attention import MAPS_BATCH, blocks_needed, token_attention
from vitrap.models.observe import observe, token_layout, transformer
from vitrap.params import hyperparameters, param
from vitrap.tensors.patches import tokens_to_pixels

PAPER_SIZE = 224
"""Side of the paper's images, in pixels, which `edge` refers to."""


@hyperparameters
class AttentionBlock:
    """The defence: the hyper-parameters of attention blocking."""

    card: ClassVar[Card] = Card(
        "Backdoor Attacks on Vision Transformers",
        "Subramanya, Saha, Koohpayegani, Tejankar, Pirsiavash",
        "arXiv",
        2022,
        "2206.08477",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "repair"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = True

    edge: int = param(
        30, "side of the black box at 224 px; at least 1 px", unit="px", source="code", low=1, high=PAPER_SIZE
    )
    discard: float = param(0.9, "share of each layer that gradient rollout drops", source="code", low=0, high=0.99)

    def apply(self, suspect: Suspect) -> Repaired:
        """Wrap a copy of the model so that it blocks its attention itself; nothing is fitted."""
        token_layout(suspect.model)  # refuses a model without plain token attention
        side = box_side(self.edge, suspect.clean.size)
        model = Blocking(copy.deepcopy(suspect.model), self.edge, self.discard).eval()
        return Repaired(model, "attention, all blocks", {"side of the box, px": side})


class Blocking(nn.Module):
    """A model that blacks out each image's hottest box before it predicts.

    Args:
        model: the model inside.
        edge: side of the box at 224 px.
        discard: share of each layer that gradient rollout drops.
    """

    def __init__(self, model: nn.Module, edge: int, discard: float) -> None:
        super().__init__()
        self.model = model
        self.edge = edge
        self.discard = discard

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        """Logits of the images with their hottest boxes in black."""
        # A few images at a time, since the attention maps of all blocks are in memory together.
        return torch.cat([self.model(self.blocked(some)) for some in images.split(MAPS_BATCH)])

    @torch.no_grad()
    def blocked(self, images: Images) -> Images:
        """The images with the box that the model looks at most in black."""
        height, width = images.shape[-2:]
        # Steps 1 and 2: where the model looks, up-sampled from tokens to pixels.
        tokens = gradient_heat(self.model, images, self.discard)
        heat = tokens_to_pixels(tokens, (height, width), "bilinear")
        # Step 3: the box with the most heat.
        side = box_side(self.edge, width)
        top, left = hottest_box(heat, side)
        return blacken(images, top, left, side)


def gradient_heat(model: nn.Module, images: Images, discard: float) -> Float[Tensor, "b gh gw"]:
    """Step 1: gradient rollout for the class that the model predicts of each image, on the token grid."""
    layout = token_layout(model)
    depth = len(transformer(model).blocks)
    with torch.inference_mode(False), observe(model, blocks_needed("gradient", depth), frozen=True) as seen:
        with torch.enable_grad():
            # The weights may be frozen, so the images must require a gradient for autograd to build a graph.
            logits = model(images.detach().clone().requires_grad_()).float()
            own_class = logits.detach().argmax(1, keepdim=True)
            score = logits.gather(1, own_class).sum()
        with torch.no_grad():  # keeps autograd from recording the gradient's own graph
            return token_attention(seen, layout, "gradient", score, discard).unflatten(1, layout.grid)


def box_side(edge: int, size: int) -> int:
    """Side of the box in images of `size` px, at least 1.

    >>> [box_side(30, size) for size in (224, 32, 4)]
    [30, 4, 1]
    """
    return max(1, round(edge * size / PAPER_SIZE))


def hottest_box(heat: Float[Tensor, "b h w"], side: int) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]]:
    """Top and left edge of the box, inside the image, with the greatest sum of heat; the first one of equals.

    >>> hottest_box(torch.tensor([[[0.0, 3.0, 0.0], [0.0, 2.0, 2.0], [0.0, 2.0, 2.0]]]), 2)
    (tensor([1]), tensor([1]))
    """
    sums = functional.avg_pool2d(heat[:, None], side, stride=1)  # means, which rank the boxes as sums do
    place = sums.flatten(1).argmax(1)
    return place // sums.shape[-1], place % sums.shape[-1]


def blacken(images: Images, top: Int64[Tensor, " b"], left: Int64[Tensor, " b"], side: int) -> Images:
    """Paint a box of each image black, given its top and left edge.

    >>> blacken(torch.ones(1, 1, 2, 3), torch.tensor([0]), torch.tensor([1]), 2).flatten().tolist()
    [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    """
    down, across = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    row = (top[:, None] <= down) & (down < top[:, None] + side)
    column = (left[:, None] <= across) & (across < left[:, None] + side)
    return images.masked_fill(row[:, None, :, None] & column[:, None, None, :], 0)
