"""AGEB: erode the pixels to which the attention of a surrogate ViT answers most.

Guo, Li, Jiang, Lu: "Backdoor Attack Against Vision Transformers via Attention Gradient-Based Image Erosion",
GLOBECOM 2024, https://arxiv.org/abs/2410.22678. There is no public code; this file follows the paper's text.

Threat model: data poisoning with dirty labels, all to one (assumed: the paper does not spell it out). The trigger
depends on the image and covers the whole of it; a surrogate ViT of the attacker's computes it, when the training
set is poisoned and at test time alike. The victim need not be the surrogate. Ours, for studies: `[test_surrogate]` in a
spec has another surrogate compute it at test time; dilation, opening or closing can stand in for erosion; and a
surrogate without plain token attention (a CNN, Swin, CaiT, XCiT) shows |dL/dF| instead, F its last feature map of at
least 4 x 4 and the mean over channels, as the paper suggests for CNNs.

The steps are the paper's: attention gradient, selection above a threshold, erosion of what is selected, blend with
the original, a small constant signal, brightness and saturation adjusted. The table symbol, parameter, default,
source is the dataclass below (`vitrap explain ageb` prints it); what the paper leaves open is marked assumed.

Assumed, too, but fixed here: the loss is the cross-entropy of the surrogate's own top class, so that no label is
needed at test time; the last block is looked at, the absolute value taken before the mean over heads, and the rows
are those of the tokens that the head reads; a quantile is taken after up-sampling; the signal is added to selected
pixels only; and the adjustment scales HSV saturation, then value, by one factor an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Fitted, Images, Implant, Labels, Threat
from vitrap.data.poison import Poison
from vitrap.models.maps import last_map, observe_map
from vitrap.models.observe import Maps, attends, observe, read_tokens, token_layout, transformer
from vitrap.params import hyperparameters, param
from vitrap.tensors.blend import blend, paste
from vitrap.tensors.colour import match_brightness, match_saturation
from vitrap.tensors.morphology import Operation, element, morph
from vitrap.tensors.patches import above_quantile, above_value, as_many, tokens_to_pixels
from vitrap.tensors.pixels import hashed_noise

Route = Literal["attention", "score", "pixel"]
SIDE = 4
"""Least side of a feature map that takes the place of attention, in tokens or feature pixels."""


@hyperparameters
class Ageb:
    """The paper's table of hyper-parameters."""

    card: ClassVar[Card] = Card(
        "Backdoor Attack Against Vision Transformers via Attention Gradient-Based Image Erosion",
        "Guo, Li, Jiang, Lu",
        "GLOBECOM",
        2024,
        "2410.22678",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[Labels] = "dirty"
    needs_surrogate: ClassVar[bool] = True
    test_surrogate: ClassVar[bool] = True

    target: int = param(0, "class that triggered images shall get", symbol="y_t", low=0)
    poison_rate: float = param(0.1, "share of the training set that is poisoned", low=0, high=1, open=True)
    select: Literal["gradient", "random"] = param(
        "gradient",
        "pixels to erode: by attention gradient, or at random (the ablation)",
        source="paper",
    )
    route: Route = param(
        "attention",
        "G: dL/dA A(1-A) at the attention, the full gradient at the score, or the gradient at the pixel",
        symbol="G",
    )
    threshold: Literal["quantile", "value"] = param(
        "quantile",
        "tau is a quantile of each image's map, or a value of the map over its maximum",
    )
    tau: float = param(0.7, "threshold above which a pixel is selected", symbol="τ", low=0, high=1)
    upsample: Literal["bilinear", "nearest"] = param(
        "bilinear", "from the token grid to pixels; nearest selects whole patches"
    )
    operation: Operation = param(
        "erosion",
        "what is done to the selected pixels; opening erodes, then dilates, and closing the reverse",
        source="paper",
    )
    shape: Literal["square", "cross", "disc"] = param("square", "structuring element", symbol="b")
    size: int = param(3, "side of the structuring element", symbol="b", unit="px", low=1, odd=True)
    iterations: int = param(1, "how often each step of the operation is repeated", low=1)
    alpha: float = param(0.5, "weight of the original in the blend", symbol="α", low=0, high=1)
    signal: float = param(4.0, "constant added to selected pixels", symbol="c", unit="1/255", low=0, high=255)
    adjust: bool = param(
        True, "match mean brightness and saturation to the clean image (how is assumed)", source="paper"
    )

    def goal_for(self, n_classes: int) -> AllToOne:
        """One class for all images."""
        return AllToOne(self.target)

    def check_surrogate(self, model: nn.Module, images: Images) -> None:
        """Refuse a surrogate that has neither plain token attention nor a feature map to take its place."""
        if self.route == "pixel" or attends(model):
            transformer(model)
        else:
            last_map(model, images, SIDE)

    def fit(self, access: Access) -> Fitted:
        """The trigger is the surrogate with these settings; nothing else is fitted."""
        assert access.surrogate is not None, "AGEB computes its trigger with a surrogate"
        trigger = Erosion(access.surrogate, self)
        if access.test_surrogate is None:
            return Fitted(trigger)
        return Fitted(Erosion(access.test_surrogate, self), stored=trigger)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Poison a share of the training set."""
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(fitted.in_training, goal, self.poison_rate, self.labels))


@dataclass(frozen=True)
class Erosion:
    """The trigger: what the surrogate attends to, eroded."""

    surrogate: nn.Module
    settings: Ageb

    def __call__(self, images: Images) -> Images:
        """Steps 1 to 5 of the paper."""
        s = self.settings
        mask = self.mask(images)
        eroded = morph(images, element(s.shape, s.size), s.operation, s.iterations)
        signalled = blend(images, eroded, s.alpha) + s.signal / 255
        triggered = paste(images, signalled, mask).clamp(0, 1)
        if s.adjust:
            triggered = match_brightness(match_saturation(triggered, images), images)
        return triggered.clamp(0, 1)

    def gradient(self, images: Images) -> Float[Tensor, "b h w"]:
        """Step 1: the attention gradient of each image, on the pixel grid."""
        s = self.settings
        if s.route == "pixel":
            return pixel_gradient(self.surrogate, images)
        if attends(self.surrogate):
            attention, slope = attention_gradient(self.surrogate, images)
            at_score = gradient_at_score(attention, slope) if s.route == "score" else attention_slope(attention, slope)
            coarse = read_tokens(at_score, token_layout(self.surrogate))
        else:
            coarse = feature_gradient(self.surrogate, images)
        return tokens_to_pixels(coarse, (images.shape[-2], images.shape[-1]), s.upsample)

    def mask(self, images: Images) -> Bool[Tensor, "b h w"]:
        """Step 2: M = 1[G > tau]; the random ablation takes as many pixels, by noise that the image alone decides."""
        s, scores = self.settings, self.gradient(images)
        chosen = above_quantile(scores, s.tau) if s.threshold == "quantile" else above_value(scores, s.tau)
        return as_many(chosen, hashed_noise(images)) if s.select == "random" else chosen

    def views(self, images: Images) -> Mapping[str, Float[Tensor, "b h w"]]:
        """The gradient map over its maximum, and the mask."""
        gradient = self.gradient(images)
        top = gradient.amax((1, 2), keepdim=True).clamp(min=1e-30)
        return {"attention gradient": gradient / top, "mask": self.mask(images).float()}


def attention_gradient(surrogate: nn.Module, images: Images) -> tuple[Maps, Maps]:
    """A and dL/dA of the last attention layer, L the cross-entropy of each image's own top class.

    The graph starts at A, so that the gradient costs the part of one pass behind the last attention.
    """
    with torch.enable_grad(), observe(surrogate, (-1,), as_leaf=True) as seen:
        loss = own_class_loss(surrogate(images))
        attention = seen[-1]
        (slope,) = torch.autograd.grad(loss, attention)
    return attention.detach(), slope


def feature_gradient(surrogate: nn.Module, images: Images) -> Float[Tensor, "b gh gw"]:
    """In place of attention (ours): |dL/dF|, F the last feature map of at least 4 x 4, the mean over its channels."""
    layer = last_map(surrogate, images[:1], SIDE)
    with torch.enable_grad(), observe_map(surrogate, layer, as_leaf=True) as seen:
        loss = own_class_loss(surrogate(images))
        (slope,) = torch.autograd.grad(loss, seen[-1])
    return layer.to_map(slope).abs().mean(1)


def own_class_loss(logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Cross-entropy on the surrogate's own prediction, summed over images (assumed: not stated by the paper)."""
    return functional.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")


def attention_slope(attention: Maps, slope: Maps) -> Maps:
    """Equation of the paper: |G_ij| = |dL/dA_ij dA_ij/de_ij|, with dA_ij/de_ij = A_ij (1 - A_ij)."""
    return (slope * attention * (1 - attention)).abs()


def gradient_at_score(attention: Maps, slope: Maps) -> Maps:
    """The full gradient |dL/de_ij|: softmax ties the entries of a row, A_ij (dL/dA_ij - sum_k A_ik dL/dA_ik)."""
    return (attention * (slope - (attention * slope).sum(-1, keepdim=True))).abs()


def pixel_gradient(surrogate: nn.Module, images: Images) -> Float[Tensor, "b h w"]:
    """The literal pixel route: |d/dx sum_ij G_ij A_ij| with G = dL/dA held fixed, the greatest of the channels."""
    x = images.detach().requires_grad_()
    with torch.enable_grad(), observe(surrogate, (-1,), frozen=True) as seen:
        loss = own_class_loss(surrogate(x))
        (slope,) = torch.autograd.grad(loss, seen[-1], retain_graph=True)
        (at_pixel,) = torch.autograd.grad(seen[-1], x, slope)
    return at_pixel.abs().amax(1)
