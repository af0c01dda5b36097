"""MM-BD: a class that some image can be pushed into by an unusually large margin is a backdoor's target.

Wang, Xiang, Miller, Kesidis: "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types
Using a Maximum Margin Statistic", IEEE S&P 2024, https://arxiv.org/abs/2205.06900; code wanghangpsu/MM-BD.

For each class, gradient ascent over images in [0, 1], from noise, maximises the margin: the class's logit minus the
greatest other. The largest of these maxima is held against a gamma distribution fitted to all others; the model counts
as backdoored where the p-value of the largest of so many draws is below 0.05. No clean image is looked at: the clean
set only tells the size of the images.

The defaults are those of the code (univ_bd.py). What differs: a step ends with a projection onto [0, 1], as in the
paper; in the code a pixel that has left the range gets no gradient any more and never returns. The p-value is
1 - H(r)^(K - 1), as public summaries of the paper give it (its text was not found); the code has the power K. The
gamma distribution starts at 0, since margins are positive; the code also fits where it starts, though such a fit can
have no greatest likelihood. A class that no image reaches (its margin stays 0 or less) has no place in the distribution
and is left out. The starts of many classes climb as one batch, and each class stops by the code's own rule, which
changes no result. Nothing is particular to CNNs, so nothing is re-derived.

What to expect: the level is not the rate of false alarms, because the null is fitted without the largest. Statistics
drawn from one gamma distribution fall below 0.05 in 11 % of cases with 43 classes, in 27 % with 10 (2000 draws each).
The same summaries have the paper name unequal classes, and few of them, as causes of false alarms. The rule to stop
was made for smooth climbs: on a small ViT the sum swings by 0.2 % a step, so that a class stops by chance or not at
all. In bf16 rounding would make such a chance common; so the rule holds only where logits are finer than `tolerance`.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.func import functional_call

from vitrap.contracts import Card, Judged, OutcomeKind, Suspect
from vitrap.errors import UserError
from vitrap.params import hyperparameters, param

MOST = 512 * 32**2
"""Pixels of the images that climb together, one class at least: 512 images at 32 px. It bounds memory alone."""


@hyperparameters
class MmBd:
    """The table of hyper-parameters."""

    card: ClassVar[Card] = Card(
        "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types Using a Maximum "
        "Margin Statistic",
        "Wang, Xiang, Miller, Kesidis",
        "IEEE S&P",
        2024,
        "2205.06900",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "judgement"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    starts: int = param(30, "random images that each class starts from", source="code", low=1)
    steps: int = param(300, "most steps of gradient ascent", source="code", low=1)
    lr: float = param(0.01, "step over the gradient of the margin", source="code", low=0, open=True)
    momentum: float = param(
        0.0,
        "momentum of the steps; the code names 0.2, but forgets it with a new optimiser at each step",
        source="code",
        low=0,
        high=1,
    )
    tolerance: float = param(
        1e-5,
        "a class stops when the sum of its margins changes by a smaller share in one step",
        source="code",
        low=0,
    )
    level: float = param(
        0.05, "p-value below which the model counts as backdoored", symbol="θ", source="code", low=0, high=1, open=True
    )

    def apply(self, suspect: Suspect) -> Judged:
        """Estimate each class's statistic, then ask how unlikely the largest is."""
        if suspect.n_classes < 3:
            raise UserError(f"mm_bd holds one class against two others or more, and n_classes = {suspect.n_classes}")
        groups = class_groups(suspect.n_classes, self.starts * suspect.clean.size**2)
        # A class's statistic is the largest margin that any of its starts comes to.
        with suspect.computing():
            climbed = [climb(self, suspect, some) for some in groups]
        statistics = torch.cat(climbed).amax(1).double().cpu()
        # All other classes' statistics make the null distribution that the largest is held against.
        largest = int(statistics.argmax())
        others = null_statistics(statistics, largest)
        p = p_value(statistics[largest], others).item()
        report = {
            "p-value": p,
            "largest margin": statistics[largest].item(),
            "second largest margin": statistics.topk(2).values[1].item(),
            "median margin": statistics.median().item(),
            "classes in the null": len(others),
        }
        return Judged(1 - p, 1 - self.level, (largest,), statistics.float(), report=report)


def climb(settings: MmBd, suspect: Suspect, classes: Int64[Tensor, " k"]) -> Float[Tensor, "k starts"]:
    """Margins that the starts of some classes end with."""
    clean = suspect.clean
    shape = (settings.starts, clean.pixels.shape[1], clean.size, clean.size)
    noise = torch.stack([torch.rand(shape, generator=suspect.generator) for _ in classes])
    return ascend(suspect.model, noise.to(clean.device), classes.to(clean.device), settings)


def class_groups(n_classes: int, pixels: int) -> tuple[Int64[Tensor, " k"], ...]:
    """Classes that climb together, if the starts of each have so many pixels."""
    return torch.arange(n_classes).split(max(1, MOST // pixels))


def ascend(
    model: nn.Module, images: Float[Tensor, "k starts c h w"], classes: Int64[Tensor, " k"], settings: MmBd
) -> Float[Tensor, "k starts"]:
    """Projected gradient ascent on the margin; a class leaves when the sum over its starts no longer changes.

    It never leaves where logits are rounded more coarsely than the tolerance, as in bf16: equal sums are chance there.
    """
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    found = images.new_empty(images.shape[:2])
    going = torch.arange(len(classes), device=classes.device)
    velocity = torch.zeros_like(images)
    last = images.new_full(classes.shape, torch.inf)
    for _ in range(settings.steps):
        margins, slopes, rounding = margins_and_slopes(model, weights, images, classes[going])
        found[going] = margins
        total = margins.sum(1)
        tolerance = settings.tolerance if settings.tolerance >= rounding else 0.0
        moving = ~((total - last).abs() < tolerance * last.abs())  # true at the first step, by infinity
        if not moving.any():
            break
        velocity = settings.momentum * velocity + slopes
        images = (images + settings.lr * velocity).clamp_(0, 1)
        going, images, velocity, last = (kept[moving] for kept in (going, images, velocity, total))
    return found


def margins_and_slopes(
    model: nn.Module,
    weights: dict[str, Tensor],
    images: Float[Tensor, "k starts c h w"],
    classes: Int64[Tensor, " k"],
) -> tuple[Float[Tensor, "k starts"], Float[Tensor, "k starts c h w"], float]:
    """The margin of each image, in fp32, its gradient, and how finely the model's logits are rounded.

    `weights`, which ask for no gradient, stand in for the model's.
    """
    with torch.enable_grad():
        x = images.flatten(0, 1).detach().requires_grad_()
        logits = functional_call(model, weights, (x,))
        margins = margin(logits.float(), classes.repeat_interleave(images.shape[1]))
        (slopes,) = torch.autograd.grad(margins.sum(), x)
    return margins.detach().view(images.shape[:2]), slopes.view_as(images), torch.finfo(logits.dtype).eps


def margin(logits: Float[Tensor, "b k"], classes: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The objective: the logit of the class minus the greatest other.

    >>> margin(torch.tensor([[1.0, 4.0, 2.5]]), torch.tensor([1])).item()
    1.5
    """
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, classes[:, None], True)
    return logits.gather(1, classes[:, None])[:, 0] - logits.masked_fill(own, -torch.inf).amax(1)


def null_statistics(statistics: Float64[Tensor, " k"], largest: int) -> Float64[Tensor, " n"]:
    """The statistics of all classes but the one with the largest, as far as they are positive.

    >>> null_statistics(torch.tensor([1.0, -2.0, 5.0, 2.0], dtype=torch.float64), 2).tolist()
    [1.0, 2.0]
    """
    others = torch.cat([statistics[:largest], statistics[largest + 1 :]])
    return others[others > 0]


def p_value(largest: Float64[Tensor, ""], others: Float64[Tensor, " n"]) -> Float64[Tensor, ""]:
    """That the largest of n draws from the others' gamma distribution H is no smaller: 1 - H(r)^n.

    It is 1 where there are fewer than two others, to which no distribution can be fitted.
    """
    if len(others) < 2:
        return torch.ones_like(largest)
    shape, scale = fit_gamma(others)
    beyond = torch.special.gammaincc(shape, largest / scale)
    return -torch.expm1(len(others) * torch.log1p(-beyond))


def fit_gamma(values: Float64[Tensor, " n"]) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """Shape and scale of greatest likelihood: log(shape) - digamma(shape) is log(mean) - mean(log), by Newton's steps.

    The steps are in 1 / shape, where the equation is nearly linear. Equal values, whose shape would be infinite, get a
    very large one.
    """
    mean = values.mean()
    spread = (mean.log() - values.log().mean()).clamp(min=1e-10)
    shape = (3 - spread + ((spread - 3) ** 2 + 24 * spread).sqrt()) / (12 * spread)
    for _ in range(10):
        error = shape.log() - torch.special.digamma(shape) - spread
        shape = 1 / (1 / shape + error / (shape**2 * (1 / shape - torch.special.polygamma(1, shape))))
    return shape, mean / shape
