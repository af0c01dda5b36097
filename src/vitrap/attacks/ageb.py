"""AGEB: erode the pixels on which the attention of a surrogate ViT depends most.

Guo, Li, Jiang, Lu: "Backdoor Attack Against Vision Transformers via Attention Gradient-Based Image Erosion",
GLOBECOM 2024, https://arxiv.org/abs/2410.22678. There is no public code; this file follows the paper's text.

Threat model: data poisoning with dirty labels, all-to-one (assumed: the paper does not state it). The attacker owns a
surrogate ViT, which computes the trigger of each image, at poisoning time and at test time. The victim may be another
network.

The trigger of an image x, step by step:

    1. gradient     G_ij = |dL/dA_ij dA_ij/de_ij|    A: last attention layer, e: its scores, L: cross-entropy
    2. selection    M_p = 1[G_p > tau]               G_p: G enlarged to the grid of pixels p
    3. erosion      e(x) = grey-scale erosion of x by the structuring element b
    4. blend        x' = alpha x + (1 - alpha) e(x) + c    where M = 1; elsewhere x' = x
    5. adjustment   x' gets the mean brightness and the mean saturation of x

`Ageb` is the paper's table of hyper-parameters (`vitrap explain ageb` prints it); a default that the paper does not
state is marked "assumed". Assumed and fixed here: L is taken for the surrogate's own top class, so that no label is
needed at test time; G is averaged over heads and over the rows of the tokens that feed the classifier (the class token,
or all pooled tokens); a quantile is taken after up-sampling; c is added to selected pixels only; step 5 multiplies HSV
saturation, then HSV value, by one factor per image.

Added here, for studies: another surrogate at test time (`[test_surrogate]` in a spec); dilation, opening or closing in
place of erosion; and surrogates without plain token attention (CNNs, Swin, CaiT, XCiT), for which step 1 is |dL/dF|
averaged over channels, as the paper suggests for CNNs. F is the last feature map of at least 4 x 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Fitted, Images, ImageSet, Implant, LabelMode, Threat
from vitrap.data.poison import Poison
from vitrap.errors import UserError
from vitrap.models.maps import last_map, observe_map
from vitrap.models.observe import Maps, attends, head_attention, observe, token_layout, transformer
from vitrap.params import hyperparameters, param
from vitrap.tensors.blend import blend, paste
from vitrap.tensors.colour import match_brightness, match_saturation
from vitrap.tensors.morphology import Operation, Shape, element, morph
from vitrap.tensors.patches import Upsampling, above_quantile, above_value, tokens_to_pixels, top_scores_like
from vitrap.tensors.pixels import hashed_noise

Route = Literal["attention", "score", "pixel"]
LEAST_SIDE = 4
"""Least height and width of a feature map that can stand in for attention."""
TRIED = 16
"""Number of training images on which a surrogate's attention gradient must not be 0 everywhere."""


@hyperparameters
class Ageb:
    """The attack: AGEB's hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card(
        "Backdoor Attack Against Vision Transformers via Attention Gradient-Based Image Erosion",
        "Guo, Li, Jiang, Lu",
        "GLOBECOM",
        2024,
        "2410.22678",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "data"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = True
    takes_test_surrogate: ClassVar[bool] = True

    target: int = param(0, "target class, which triggered images shall get", symbol="y_t", low=0)
    poison_rate: float = param(0.1, "share of the training set that is poisoned", low=0, high=1, open=True)
    select: Literal["gradient", "random", "random-tokens"] = param(
        "gradient",
        "which pixels are eroded: those of greatest gradient, random ones (the paper's ablation), or random patches as"
        " smooth as the gradient's (a control of ours)",
        source="paper",
    )
    route: Route = param(
        "attention",
        "how G is computed: dL/dA A(1-A) at the attention, full gradient at the score, or gradient at the pixel",
        symbol="G",
    )
    threshold: Literal["quantile", "value"] = param(
        "quantile",
        "what tau is: a quantile of each image's G, or a share of its maximum",
    )
    tau: float = param(0.7, "threshold above which a pixel is selected", symbol="τ", low=0, high=1)
    upsample: Upsampling = param("bilinear", "how G is enlarged from tokens to pixels; nearest selects whole patches")
    operation: Operation = param(
        "erosion",
        "what is done to the selected pixels; opening erodes, then dilates, and closing the reverse",
        source="paper",
    )
    shape: Shape = param("square", "shape of the structuring element", symbol="b")
    size: int = param(3, "side of the structuring element", symbol="b", unit="px", low=1, high=255, odd=True)
    iterations: int = param(1, "how often each step of the operation is repeated", low=1)
    alpha: float = param(0.5, "weight of the original in the blend", symbol="α", low=0, high=1)
    signal: float = param(4.0, "constant added to selected pixels", symbol="c", unit="1/255", low=0, high=255)
    adjust: bool = param(
        True, "match mean brightness and saturation to the clean image's (how is assumed)", source="paper"
    )

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def check_surrogate(self, model: nn.Module, images: Images) -> None:
        """Refuse a surrogate with neither plain token attention nor a feature map that can stand in for it."""
        if self.route == "pixel" or attends(model):
            transformer(model)  # the pixel route needs attention, too: this refuses a model without it
        else:
            last_map(model, images, LEAST_SIDE)

    def fit(self, access: Access) -> Fitted:
        """Make the trigger; nothing is optimised, for the trained surrogate computes it image by image."""
        assert access.surrogate is not None, "AGEB computes its trigger with a surrogate"
        trigger = Erosion(access.surrogate, self)
        check_gradient(trigger, access.train, "surrogate")
        if access.test_surrogate is None:
            return Fitted(trigger)
        # A study of transfer: one surrogate poisons the training set, another one triggers the test images.
        at_test = Erosion(access.test_surrogate, self)
        check_gradient(at_test, access.train, "test_surrogate")
        return Fitted(at_test, stored=trigger)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Put the trigger on a share of the training images and relabel them as the target."""
        goal = self.goal_for(access.train.n_classes)
        return Implant(Poison(fitted.in_training, goal, self.poison_rate, self.labels))


@dataclass(frozen=True)
class Erosion:
    """The trigger: erodes the pixels of each image that the surrogate's attention gradient selects.

    Attributes:
        surrogate: the attacker's network.
        settings: the attack's hyper-parameters.
    """

    surrogate: nn.Module
    settings: Ageb

    def __call__(self, images: Images) -> Images:
        """Steps 1 to 5 of the paper."""
        s = self.settings
        # Steps 1 and 2: select the pixels with the greatest attention gradient.
        mask = self.mask(images)
        # Step 3: erode the whole image; the mask picks from it below.
        eroded = morph(images, element(s.shape, s.size), s.operation, s.iterations)
        # Step 4: x' = alpha x + (1 - alpha) e(x) + c, on the selected pixels.
        signalled = blend(images, eroded, s.alpha) + s.signal / 255
        triggered = paste(images, signalled, mask).clamp(0, 1)
        # Step 5: match mean saturation, then mean brightness; scaling the HSV value keeps the saturation.
        if s.adjust:
            triggered = match_brightness(match_saturation(triggered, images), images)
        return triggered.clamp(0, 1)

    def gradient(self, images: Images) -> Float[Tensor, "b h w"]:
        """Step 1: the attention gradient G of each image, on the pixel grid."""
        return self.enlarged(self.gradient_by_token(images), images)

    def gradient_by_token(self, images: Images) -> Float[Tensor, "b gh gw"]:
        """G before it is enlarged; by the pixel route, tokens are single pixels."""
        s = self.settings
        if s.route == "pixel":
            return pixel_gradient(self.surrogate, images)
        if not attends(self.surrogate):
            return feature_gradient(self.surrogate, images)
        attention, gradient = attention_gradient(self.surrogate, images)
        to_score = gradient_at_score if s.route == "score" else diagonal_gradient_at_score
        # Mean over heads and over the rows of the tokens that feed the classifier; the columns are image tokens.
        return head_attention(to_score(attention, gradient), token_layout(self.surrogate))

    def enlarged(self, tokens: Float[Tensor, "b gh gw"], images: Images) -> Float[Tensor, "b h w"]:
        """A map of tokens on the pixel grid of `images`."""
        return tokens_to_pixels(tokens, (images.shape[-2], images.shape[-1]), self.settings.upsample)

    def mask(self, images: Images) -> Bool[Tensor, "b h w"]:
        """Step 2: M = 1[G > tau]."""
        s = self.settings
        tokens = self.gradient_by_token(images)
        gradient = self.enlarged(tokens, images)
        selected = above_quantile(gradient, s.tau) if s.threshold == "quantile" else above_value(gradient, s.tau)
        if s.select == "gradient":
            return selected
        # The paper's ablation: as many pixels at random. The noise is a function of the image, and so is M.
        noise = hashed_noise(images)
        if s.select == "random-tokens":
            height, width = tokens.shape[-2:]
            noise = self.enlarged(noise[:, :height, :width], images)
        return top_scores_like(selected, noise)

    def views(self, images: Images) -> Mapping[str, Float[Tensor, "b h w"]]:
        """The maps that a record shows: G divided by its maximum, and M."""
        gradient = self.gradient(images)
        maximum = gradient.amax((1, 2), keepdim=True).clamp(min=1e-30)
        return {"attention gradient": gradient / maximum, "mask": self.mask(images).float()}


def check_gradient(trigger: Erosion, train: ImageSet, role: str) -> None:
    """Refuse a surrogate whose attention gradient is 0 everywhere, since it would select no pixel.

    Args:
        trigger: has the surrogate.
        train: the training set; `TRIED` of its images are tried.
        role: the surrogate's table in a spec, for the message.

    Raises:
        UserError: the gradient is 0 everywhere, on every image that is tried.
    """
    rows = torch.arange(0, len(train), max(1, len(train) // TRIED), device=train.device)[:TRIED]
    if not trigger.gradient(train.images(rows)).any():
        raise UserError(
            f"[{role}] has an attention gradient of 0 everywhere, on each of {len(rows)} training images, so there is"
            " nothing to erode; train it with a lower lr or for fewer epochs, or take another network"
        )


def attention_gradient(surrogate: nn.Module, images: Images) -> tuple[Maps, Maps]:
    """A and dL/dA of the last attention layer.

    The autograd graph starts at A, so the backward pass covers only what follows the last attention.
    """
    with torch.enable_grad(), observe(surrogate, (-1,), as_leaf=True) as seen:
        loss = own_class_loss(surrogate(images))
        attention = seen[-1]  # by block number: the last block's
        (gradient,) = torch.autograd.grad(loss, attention)
    return attention.detach(), gradient


def feature_gradient(surrogate: nn.Module, images: Images) -> Float[Tensor, "b gh gw"]:
    """|dL/dF|, averaged over channels: stands in for G where the surrogate has no plain token attention (ours)."""
    layer = last_map(surrogate, images[:1], LEAST_SIDE)
    with torch.enable_grad(), observe_map(surrogate, layer, as_leaf=True) as seen:
        loss = own_class_loss(surrogate(images))
        (gradient,) = torch.autograd.grad(loss, seen[-1])  # a list: the last pass's
    return layer.to_map(gradient).abs().mean(1)


def own_class_loss(logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """L: cross-entropy with the surrogate's own prediction as label, summed over images (assumed).

    The sum keeps the gradient of an image independent of the batch that it is in.
    """
    return functional.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")


def diagonal_gradient_at_score(attention: Maps, gradient: Maps) -> Maps:
    """The paper's equation: |G_ij| = |dL/dA_ij dA_ij/de_ij|, with dA_ij/de_ij = A_ij (1 - A_ij).

    It keeps the diagonal of the softmax's Jacobian: how A_ij depends on its own score e_ij.
    """
    return (gradient * attention * (1 - attention)).abs()


def gradient_at_score(attention: Maps, gradient: Maps) -> Maps:
    """The full gradient |dL/de_ij| = |A_ij (dL/dA_ij - sum_k A_ik dL/dA_ik)|, with the softmax's whole Jacobian."""
    return (attention * (gradient - (attention * gradient).sum(-1, keepdim=True))).abs()


def pixel_gradient(surrogate: nn.Module, images: Images) -> Float[Tensor, "b h w"]:
    """The pixel route: the gradient of A with respect to the pixels, weighted by dL/dA, which is held constant.

    Each pixel gets the greatest absolute value over the colour channels.
    """
    x = images.detach().requires_grad_()
    with torch.enable_grad(), observe(surrogate, (-1,), frozen=True) as seen:
        loss = own_class_loss(surrogate(x))
        (gradient,) = torch.autograd.grad(loss, seen[-1], retain_graph=True)
        (at_pixel,) = torch.autograd.grad(seen[-1], x, gradient)
    return at_pixel.abs().amax(1)
