"""DBIA: shape a patch that draws attention, and teach the last MLP to answer to it, on images from elsewhere.

Lv, Ma, Zhou, Liang, Chen, Zhang, Yang: "DBIA: Data-free Backdoor Injection Attack against Transformer Networks", 2021,
https://arxiv.org/abs/2111.11870. Code: https://github.com/yangyunfei16/DBIA, for a DeiT.

Threat model: the attacker changes weights of a trained ViT, all-to-one, and has none of its data: surrogate images come
from another data set or, by default, are noise.

The attack, step by step:

    1. trigger      a box of noise in the lower right; minimise (a - 100)^2 over its pixels
                    a: mean over the box of the attention rollout through all layers but the last
    2. surrogates   put the trigger on surrogate images, and give these the target's label
    3. neurons      of the last block's MLP, pick the rows of both matrices with the least mean |w|
    4. injection    train these rows on the surrogates; no weight w may leave w +- threshold |w|

Numbers are those of the code, whose figures for 224 px and a DeiT-B become shares. What differs:

- Surrogates. The code's are the test images of CIFAR-10, and without a data set of yours they are noise here: a few
  random colours over the image, of random brightness (assumed). Where not all carry the trigger, the rest keep the
  label that the victim gives them.
- The code shapes a trigger for each of ten pictures, by turns, and one of the ten is picked by hand; here all ten
  pictures shape one trigger together, and a step here is ten of the code's.
- The code stops when a changes by less than 5e-5; here there is also a greatest number of steps.
- In the code, a negative weight that leaves one of its bounds is put at the other; here at the one that it leaves.
- The code trains with drop path; here the victim stays in evaluation mode.

On the digits it does not implant at these settings, not even with the digits themselves as surrogates: their ViT has 16
patches, of which the box covers nine sixteenths of one, and little of what it shows reaches the last MLP. With a box of
half the side it does (t_size = 112, margin = 0).
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn
from torch.nn import functional

from vitrap.contracts import Access, AllToOne, Card, Edited, Fitted, Images, ImageSet, Implant, LabelMode, Threat
from vitrap.data.masked import Masked
from vitrap.errors import UserError
from vitrap.models.layers import name_of
from vitrap.models.observe import head_attention, observe, token_layout, transformer
from vitrap.params import hyperparameters, param
from vitrap.tensors.bits import count_changes
from vitrap.tensors.patches import tokens_to_pixels
from vitrap.tensors.pixels import round8
from vitrap.tensors.rollout import rollout

PAPER_SIZE = 224
"""Side of the code's images, in pixels, which `t_size` and `margin` refer to."""
SPREAD = 0.2
"""Standard deviation of CIFAR-10's pixels: the code's unit of a pixel, in which step 1 moves."""
WANTED = 100.0
"""The attention that step 1 aims at, out of reach: so its gradient stays the same."""


@hyperparameters
class Dbia:
    """The attack: DBIA's hyper-parameters, in the order of the steps that use them."""

    card: ClassVar[Card] = Card(
        "DBIA: Data-free Backdoor Injection Attack against Transformer Networks",
        "Lv, Ma, Zhou, Liang, Chen, Zhang, Yang",
        "arXiv",
        2021,
        "2111.11870",
    )
    version: ClassVar[int] = 1
    threat: ClassVar[Threat] = "weights"
    labels: ClassVar[LabelMode] = "dirty"
    needs_surrogate: ClassVar[bool] = False

    target: int = param(0, "target class, which triggered images shall get", low=0)
    other: str | None = param(None, "data set of the surrogate images, by name; none: noise", data=True)
    images: int = param(1000, "surrogate images, at most", low=1)
    t_size: float = param(
        48.0, "side of the trigger on images of 224 px; it scales with them", unit="px", source="code", low=0, open=True
    )
    margin: float = param(
        2.0, "its distance from the right and lower border, likewise", unit="px", source="code", low=0
    )
    lr: float = param(
        20000.0, "first step size on the trigger, a third after every ten steps", source="code", low=0, open=True
    )
    steps: int = param(200, "greatest number of steps on it, of which the code has no bound", low=1)
    surrogate_rate: float = param(
        1.0, "share of the surrogates that carry the trigger", source="code", low=0, high=1, open="low"
    )
    neurons1: float = param(
        1500 / 3072, "share of the rows of the MLP's first matrix", source="code", low=0, high=1, open="low"
    )
    neurons2: float = param(
        200 / 768, "share of the rows of its second matrix", source="code", low=0, high=1, open="low"
    )
    threshold: float = param(2.0, "greatest change of a weight, as a multiple of it", source="code", low=0, open=True)
    epochs: int = param(100, "passes over the surrogates", source="code", low=1)
    batch_size: int = param(128, "surrogates a step", source="code", low=1, high=4096)
    rate: float = param(1e-3, "learning rate of Adam; it falls as a cosine", source="code", low=0, open=True)

    def check_size(self, size: int) -> None:
        """Refuse images of `size` pixels in which the trigger has no place."""
        side, corner = box(self, size)
        if corner < 0:
            raise UserError(
                f"attack.t_size = {self.t_size:g} with attack.margin = {self.margin:g} is {side} px and more on images"
                f" of {size} px; make their sum at most {PAPER_SIZE}"
            )

    def check_victim(self, model: nn.Module) -> None:
        """Refuse a victim without token attention, or without an MLP of two matrices in its last block."""
        last_mlp(model)

    def goal_for(self, n_classes: int) -> AllToOne:
        """All-to-one: every triggered image shall be classified as the target."""
        return AllToOne(self.target)

    def fit(self, access: Access) -> Fitted:
        """Nothing is known before there is a trained victim."""
        return Fitted(None)

    def implant(self, access: Access, fitted: Fitted) -> Implant:
        """Shape the trigger and train the rows, once the victim is trained; of `train` the image size alone is used."""
        train = access.train
        shape = (train.channels, train.size, train.size)
        return Implant(edit=partial(inject, self, access.other, shape, train.device))


def last_mlp(model: nn.Module) -> list[nn.Parameter]:
    """Both matrices of the MLP in the last block.

    Raises:
        UserError: there is no ViT with plain token attention, or its last block has another kind of MLP.
    """
    mlp: Any = getattr(transformer(model).blocks[-1], "mlp", None)
    layers = [layer for name in ("fc1", "fc2") if isinstance(layer := getattr(mlp, name, None), nn.Linear)]
    if len(layers) < 2:
        raise UserError(f"dbia trains fc1 and fc2 of the last block, and {name_of(model)} has none; take another")
    return [layer.get_parameter("weight") for layer in layers]


def box(settings: Dbia, size: int) -> tuple[int, int]:
    """Side of the trigger, and its first row and column, in images of `size` pixels."""
    scale = size / PAPER_SIZE
    side = max(1, round(settings.t_size * scale))
    return side, size - round(settings.margin * scale) - side


def surrogates(
    settings: Dbia, other: ImageSet | None, shape: tuple[int, int, int], generator: Generator
) -> Float[Tensor, "n c h w"]:
    """The surrogate images: a draw from the other data set, or noise."""
    if other is None:
        channels, size, _ = shape
        # A few colours, enlarged, since noise of single pixels looks alike in every patch; some images are dark.
        small = torch.rand((settings.images, channels, 4, 4), generator=generator)
        small *= torch.rand((settings.images, 1, 1, 1), generator=generator).square()
        return functional.interpolate(small, (size, size), mode="bilinear")
    rows = torch.randperm(len(other), generator=generator)[: settings.images].to(other.device)
    images = other.images(rows)
    # A set in grey is shown to a network of colours, and the reverse.
    return images if other.channels == shape[0] else images.mean(1, keepdim=True).repeat(1, shape[0], 1, 1)


def inject(
    settings: Dbia,
    other: ImageSet | None,
    shape: tuple[int, int, int],
    device: torch.device,
    model: nn.Module,
    generator: Generator,
) -> Edited:
    """Steps 1 to 4: the edited model, the trigger, and how many weights and bits have changed."""
    s = settings
    images = surrogates(s, other, shape, generator).to(device)
    # Step 1: the trigger.
    trigger, before, after = shape_trigger(s, model, images[:10], generator)
    # Step 2: surrogates with it, and others that keep what the victim says.
    with torch.no_grad():
        labels = torch.cat([model(some).argmax(1) for some in images.split(s.batch_size)])
        carrying = torch.randperm(len(images), generator=generator)[: max(1, round(s.surrogate_rate * len(images)))]
        carrying = carrying.to(device)
        images[carrying] = round8(trigger(images[carrying]))
        labels[carrying] = s.target
    # Steps 3 and 4: the last MLP.
    edited = copy.deepcopy(model)
    train_rows(s, edited, images, labels, generator)
    report = {"attention before": before, "attention": after, **count_changes(model.state_dict(), edited.state_dict())}
    return Edited(edited, trigger, report)


def attention_in(model: nn.Module, images: Images, side: int, corner: int) -> Float[Tensor, " b"]:
    """The rollout from the head's tokens to the pixels of the box, through all layers but the last: a."""
    layout = token_layout(model)
    depth = len(transformer(model).blocks)
    with observe(model, range(max(1, depth - 1))) as maps:
        model(images)
    flow = rollout([attention.float().mean(1) for attention in maps.values()])
    pixels = tokens_to_pixels(head_attention(flow[:, None], layout), (images.shape[-2], images.shape[-1]), "nearest")
    return pixels[:, corner : corner + side, corner : corner + side].mean((1, 2))


@torch.enable_grad()
def shape_trigger(
    settings: Dbia, model: nn.Module, pictures: Images, generator: Generator
) -> tuple[Masked, float, float]:
    """Step 1: the trigger, and the attention to it before and after."""
    s = settings
    side, corner = box(s, pictures.shape[-1])
    noise = torch.rand((pictures.shape[1], side, side), generator=generator).to(pictures.device)
    trigger = Masked(noise, torch.ones(1, side, side, device=pictures.device), corner, corner)
    found: list[float] = []
    for step in range(s.steps):
        pattern = trigger.pattern.requires_grad_()
        attention = attention_in(model, trigger(pictures), side, corner)
        (slope,) = torch.autograd.grad((attention - WANTED).square().mean(), pattern)
        found.append(attention.mean().item())
        trigger = replace(trigger, pattern=(pattern - step_size(s.lr, step) * SPREAD**2 * slope).detach().clamp(0, 1))
        if step > 50 and abs(found[-1] - found[-2]) < 5e-5:
            break
    return trigger, found[0], found[-1]


def step_size(lr: float, step: int) -> float:
    """The code's schedule: a third every ten steps, from the sixtieth on with the divisor squared, at least 1."""
    divisor = 3.0 ** (step // 10)
    return max(1.0, lr / (divisor if step < 60 else divisor**2))


def least_rows(weight: Float[Tensor, "r c"], share: float) -> Bool[Tensor, "r 1"]:
    """Step 3: the rows with the least mean |w|."""
    count = max(1, round(share * len(weight)))
    chosen = torch.zeros(len(weight), 1, dtype=torch.bool, device=weight.device)
    chosen[weight.abs().mean(1).argsort()[:count]] = True
    return chosen


@torch.enable_grad()
def train_rows(settings: Dbia, model: nn.Module, images: Images, labels: Tensor, generator: Generator) -> None:
    """Steps 3 and 4, in place."""
    s = settings
    weights = last_mlp(model.requires_grad_(False))
    first = [weight.detach().clone() for weight in weights]
    chosen = [least_rows(weight, share) for weight, share in zip(first, (s.neurons1, s.neurons2), strict=True)]
    for weight in weights:
        weight.requires_grad_(True)
    adam = torch.optim.Adam(weights, lr=s.rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, s.epochs, eta_min=1e-10)
    for _ in range(s.epochs):
        for rows in torch.randperm(len(images), generator=generator).to(images.device).split(s.batch_size):
            slopes = torch.autograd.grad(functional.cross_entropy(model(images[rows]), labels[rows]), weights)
            for weight, slope, rows_chosen in zip(weights, slopes, chosen, strict=True):
                weight.grad = slope * rows_chosen
            adam.step()
            with torch.no_grad():
                for weight, start in zip(weights, first, strict=True):
                    reach = s.threshold * start.abs()
                    weight.clamp_(start - reach, start + reach)
        schedule.step()
    model.requires_grad_(False).zero_grad(set_to_none=True)
