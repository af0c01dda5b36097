"""MM-BD: a class that some image can be pushed into by an unusually large margin is a backdoor's target.

Wang, Xiang, Miller, Kesidis: "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types
Using a Maximum Margin Statistic", IEEE S&P 2024, https://arxiv.org/abs/2205.06900; code: wanghangpsu/MM-BD.

A judgement of the whole model that looks at no clean image; the clean set only tells the size of the images:

    1. for each class, gradient ascent over images in [0, 1], from noise, maximises the margin: the logit of the class
       minus the greatest other logit. The statistic of a class is the largest margin that any start reaches
    2. r is the largest statistic; a gamma distribution H is fitted to those of all other classes
    3. p = 1 - H(r)^(K - 1), for K classes: the chance that the largest of K - 1 draws from H is r or more
    4. the model counts as backdoored where p is below 0.05

The defaults are those of the code (univ_bd.py). What differs:

    - each step ends with a projection onto [0, 1], as in the paper; in the code a pixel that has left the range gets no
      gradient any more and never returns
    - the exponent is K - 1, as in public summaries of the paper (its text was not found); the code has K
    - the gamma distribution starts at 0, since margins are positive; the code fits its start as well, though the
      likelihood of such a fit may have no maximum
    - a class whose margin stays 0 or less, which no image reaches, is left out of the distribution
    - the starts of many classes climb as one batch; each class still stops by the code's own rule, so no result changes

Nothing is particular to CNNs, so nothing is re-derived for ViTs.

What to expect: 0.05 is not the rate of false alarms, because the null distribution is fitted without the largest
statistic. If all statistics are drawn from one gamma distribution, p is below 0.05 in 11 % of cases with 43 classes,
and in 27 % with 10 (2000 draws each). According to the same summaries, the paper names unequal classes, and few
classes, as causes of false alarms. The stopping rule was made for smooth climbs: on a small ViT the sum of margins
swings by 0.2 % a step, so a class stops by chance or not at all. In bf16, rounding would make such chance stops common;
so the rule holds only where logits are rounded more finely than `tolerance`.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.func import functional_call

from vitrap.contracts import Card, Judged, OutcomeKind, Suspect
from vitrap.errors import UserError
from vitrap.params import hyperparameters, param

PIXELS_AT_ONCE = 512 * 32**2
"""Pixels of the images that climb as one batch: 512 images at 32 px, or one class. It bounds memory, not the result."""


@hyperparameters
class MmBd:
    """The defence: MM-BD's hyper-parameters."""

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

    starts: int = param(30, "random images that each class starts from", source="code", low=1, high=1000)
    steps: int = param(300, "most steps of gradient ascent", source="code", low=1)
    lr: float = param(0.01, "size of a step along the gradient of the margin", source="code", low=0, open=True)
    momentum: float = param(
        0.0,
        "momentum of the steps; the code sets 0.2, but makes a new optimiser at each step, which forgets it",
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
        """Maximise the margin of each class, and test whether the largest margin is an outlier."""
        if suspect.n_classes < 3:
            raise UserError(
                f"mm_bd compares one class with at least 2 others, and n_classes = {suspect.n_classes};"
                " choose another defence"
            )
        # Step 1: the statistic of a class is the largest margin that any of its starts reaches.
        groups = class_groups(suspect.n_classes, self.starts * suspect.clean.size**2)
        with suspect.computing():
            margins = torch.cat([climb(self, suspect, classes) for classes in groups])
        statistics = margins.amax(1).double().cpu()
        if not statistics.isfinite().all():
            raise UserError("mm_bd climbed to images whose logits are NaN or infinite; lower its lr, or steps")
        # Steps 2 and 3: how unlikely is the largest statistic, if it is drawn from the distribution of the others?
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
        # Step 4: score and threshold are 1 - p and 1 - level, since a higher score is more suspicious.
        return Judged(1 - p, 1 - self.level, (largest,), statistics.float(), report=report)


def climb(settings: MmBd, suspect: Suspect, classes: Int64[Tensor, " k"]) -> Float[Tensor, "k starts"]:
    """The final margins of all starts of some classes."""
    clean = suspect.clean
    shape = (settings.starts, clean.channels, clean.size, clean.size)
    # Noise is drawn class by class, so that a class starts from the same images however classes are grouped.
    noise = torch.stack([torch.rand(shape, generator=suspect.generator) for _ in classes])
    return ascend(suspect.model, noise.to(clean.device), classes.to(clean.device), settings)


def class_groups(n_classes: int, pixels: int) -> tuple[Int64[Tensor, " k"], ...]:
    """The classes that climb as one batch, where the starts of each class have `pixels` pixels together."""
    return torch.arange(n_classes).split(max(1, PIXELS_AT_ONCE // pixels))


def ascend(
    model: nn.Module, images: Float[Tensor, "k starts c h w"], classes: Int64[Tensor, " k"], settings: MmBd
) -> Float[Tensor, "k starts"]:
    """Projected gradient ascent on the margin, until the sum over the starts of a class no longer changes.

    A class never stops early where logits are rounded more coarsely than the tolerance, as in bf16, where two sums may
    be equal by chance.
    """
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    final = images.new_empty(images.shape[:2])
    # The classes that still climb: their rows in `final`, the velocity of their images, and their last sum of margins,
    # which is infinite at first, so that every class takes the first step.
    active = torch.arange(len(classes), device=classes.device)
    velocity = torch.zeros_like(images)
    last = images.new_full(classes.shape, torch.inf)
    for _ in range(settings.steps):
        margins, gradients, rounding = margins_and_gradients(model, weights, images, classes[active])
        final[active] = margins
        # A class stops when its sum of margins changed by a smaller share than the tolerance. `~(... < ...)` and not
        # `>=`: a sum that is NaN goes on climbing, and is refused in the end.
        total = margins.sum(1)
        tolerance = settings.tolerance if settings.tolerance >= rounding else 0.0
        climbing = ~((total - last).abs() < tolerance * last.abs())
        if not climbing.any():
            break
        # The others take a step, projected back onto valid pixels.
        velocity = settings.momentum * velocity + gradients
        images = (images + settings.lr * velocity).clamp_(0, 1)
        active = active[climbing]
        images = images[climbing]
        velocity = velocity[climbing]
        last = total[climbing]
    return final


def margins_and_gradients(
    model: nn.Module,
    weights: dict[str, Tensor],
    images: Float[Tensor, "k starts c h w"],
    classes: Int64[Tensor, " k"],
) -> tuple[Float[Tensor, "k starts"], Float[Tensor, "k starts c h w"], float]:
    """The margin of each image in fp32, its gradient, and the relative rounding of the model's logits.

    Args:
        model: a function of images in [0, 1].
        weights: stand in for the model's own weights, so that none of them asks for a gradient.
        images: the present images of each class's starts.
        classes: the class of each row of images.
    """
    with torch.enable_grad():
        x = images.flatten(0, 1).detach().requires_grad_()
        logits = functional_call(model, weights, (x,))
        margins = margin(logits.float(), classes.repeat_interleave(images.shape[1]))
        (gradients,) = torch.autograd.grad(margins.sum(), x)
    rounding = torch.finfo(logits.dtype).eps
    return margins.detach().view(images.shape[:2]), gradients.view_as(images), rounding


def margin(logits: Float[Tensor, "b k"], classes: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The objective of step 1: the logit of the class minus the greatest other logit.

    >>> margin(torch.tensor([[1.0, 4.0, 2.5]]), torch.tensor([1])).item()
    1.5
    """
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, classes[:, None], True)
    return logits.gather(1, classes[:, None])[:, 0] - logits.masked_fill(own, -torch.inf).amax(1)


def null_statistics(statistics: Float64[Tensor, " k"], largest: int) -> Float64[Tensor, " n"]:
    """The positive statistics of all classes but the one with the largest.

    >>> null_statistics(torch.tensor([1.0, -2.0, 5.0, 2.0], dtype=torch.float64), 2).tolist()
    [1.0, 2.0]
    """
    others = torch.cat([statistics[:largest], statistics[largest + 1 :]])
    return others[others > 0]


def p_value(largest: Float64[Tensor, ""], others: Float64[Tensor, " n"]) -> Float64[Tensor, ""]:
    """Step 3: 1 - H(r)^n, with r the largest statistic and H the gamma distribution of the n others.

    It is 1 where there are fewer than two others, to which no distribution can be fitted.
    """
    if len(others) < 2:
        return torch.ones_like(largest)
    shape, scale = fit_gamma(others)
    beyond = torch.special.gammaincc(shape, largest / scale)  # 1 - H(r), which a p-value near 0 needs precisely
    return -torch.expm1(len(others) * torch.log1p(-beyond))


def fit_gamma(values: Float64[Tensor, " n"]) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """Step 2: shape and scale of the gamma distribution with the greatest likelihood.

    The shape solves log(shape) - digamma(shape) = log(mean) - mean(log), by Newton's method in 1 / shape, where the
    equation is nearly linear. Equal values, whose shape would be infinite, get a very large one.
    """
    mean = values.mean()
    spread = (mean.log() - values.log().mean()).clamp(min=1e-10)
    # A closed-form approximation is the start; ten steps are enough for double precision.
    shape = (3 - spread + ((spread - 3) ** 2 + 24 * spread).sqrt()) / (12 * spread)
    for _ in range(10):
        error = shape.log() - torch.special.digamma(shape) - spread
        shape = 1 / (1 / shape + error / (shape**2 * (1 / shape - torch.special.polygamma(1, shape))))
    return shape, mean / shape
