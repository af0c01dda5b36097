"""PSBD: switch dropout on at inference; an input whose class it hardly moves is suspicious.

Li, Chen, Liu, Wang: "PSBD: Prediction Shift Uncertainty Unlocks Backdoor Detection", CVPR 2025,
https://arxiv.org/abs/2406.05826; code: https://github.com/WL-619/PSBD.

With dropout at inference, predictions of clean images shift to other classes, those of triggered ones less. Prediction
shift uncertainty (PSU) is the probability of the class predicted without dropout, minus the mean probability of that
class over k passes with dropout; the score is minus PSU. (The abstract calls PSU a variance; the code has this
difference.) The dropout rate is chosen by the shift ratio, the share of passes whose class is another one: among the
rates at which that of clean images is at least 0.8, the one at which it exceeds that of the training set most; where
none is as high, the same among all.

What differs. The paper filters a training set, with the 25 % quantile of clean PSU as its threshold; here PSU screens
inputs at test time, and the metric sets thresholds. At test time there need not be a training set; without one the rate
is the smallest at which the clean ratio reaches 0.8, or where none does, the one at which it is greatest. Both ratios
come from at most `images` images. Masks are drawn once and shared by all images and rates, where the code draws anew
for each: so a score depends on the image alone, but all scores share the luck of k masks. The code's k = 3 is too few
for that: the clean shift ratio of small ViTs on GTSRB has a standard deviation of 0.1 from one mask to the next, which
20 passes bring down to 0.02, about the error from 250 images (exploratory, as the figure below).
PSU cannot exceed the probability that it starts from, so inputs of which the model is unsure look triggered where the
rate is high; psu = "ratio" divides by that probability, as an unpublished port to ViTs does (PjotrVr/PSBD-ViT).

Re-derived for ViTs. The code puts dropout behind each ResNet block's residual addition, so that the next block and its
shortcut both read what is left. The same place in a ViT is each block's output ("stream", the default): elements of
all tokens, the class token's among them. Two more: "residual" drops elements of what attention and MLP add, where ViTs
have dropout themselves, and leaves the shortcut whole; "token" makes whole image tokens blank to each block's
attention, and spares the class token. Dropping whole tokens' updates is not offered: the class token still reads all
the others, and clean images of small ViTs hardly shifted (under 22 % of passes at all rates, where 80 % are asked).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrap.contracts import Card, Images, ImageSet, OutcomeKind, Screen, Suspect
from vitrap.models.batched import logits_under
from vitrap.models.dropout import Masks, Where, dropout, dropout_masks, dropout_noise
from vitrap.params import hyperparameters, param

BATCH = 256
"""Images at a time where the rate is chosen."""
Form = Literal["difference", "ratio"]
Outputs = Float[Tensor, "b classes"]
Dropped = Float[Tensor, "b passes classes"]


@hyperparameters
class Psbd:
    """Prediction shift uncertainty under dropout."""

    card: ClassVar[Card] = Card(
        "PSBD: Prediction Shift Uncertainty Unlocks Backdoor Detection",
        "Li, Chen, Liu, Wang",
        "CVPR",
        2025,
        "2406.05826",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "screen"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = True

    where: Where = param(
        "stream",
        "what is dropped: elements of each block's output, of what is added to it, or whole tokens before attention",
    )
    psu: Form = param(
        "difference",
        "the fall of the class's probability: as a difference, or as a share of the probability without dropout",
        source="code",
    )
    passes: int = param(20, "forward passes with dropout (the code makes 3)", symbol="k", low=1)
    rate: float | None = param(
        None, "dropout rate; left out: chosen by shift ratios", symbol="p", source="code", low=0, high=1, open=True
    )
    rates: int = param(9, "rates to choose from: multiples of 1 / (rates + 1) below 1", source="code", low=1)
    shift: float = param(0.8, "shift ratio of clean images that the rate shall reach", source="code", low=0, high=1)
    images: int = param(250, "images of the clean and of the training set to choose the rate by", low=1)

    def apply(self, suspect: Suspect) -> Screen:
        """Draw the noise, choose the rate unless it is given, and keep the masks of that rate."""
        # The masks of all rates come from the same noise.
        noise = dropout_noise(suspect.model, self.where, self.passes, suspect.generator).to(suspect.clean.device)
        report = {"rate": self.rate} if self.rate is not None else choose_rate(self, suspect, noise)
        masks = dropout_masks(suspect.model, self.where, noise, report["rate"])
        return Screen(Stability(suspect.model, self.where, self.psu, masks), f"blocks, {self.where}", report)


def choose_rate(settings: Psbd, suspect: Suspect, noise: Masks) -> dict[str, float]:
    """The rate, and the shift ratios at it of clean images and, where there is one, of the training set."""
    rates = [i / (settings.rates + 1) for i in range(1, settings.rates + 1)]
    ratios: dict[str, list[float]] = {}
    for name, data in (("clean", suspect.clean), ("training", suspect.train)):
        if data is not None:
            some = sample(data, settings.images, suspect.generator)
            with suspect.computing():
                ratios[name] = shift_ratios(suspect.model, settings.where, noise, rates, some)
    best = chosen(ratios["clean"], ratios.get("training"), settings.shift)
    return {"rate": rates[best], **{f"shift ratio, {name}": ratio[best] for name, ratio in ratios.items()}}


@dataclass(frozen=True)
class Stability:
    """The score: how little the probability of an input's class falls under dropout."""

    model: nn.Module
    where: Where
    psu: Form
    masks: Masks

    def __call__(self, images: Images) -> Float[Tensor, " b"]:
        """Minus PSU, at least -1."""
        bare = without_dropout(self.model, images).softmax(-1)
        dropped = with_dropout(self.model, images, self.where, self.masks).softmax(-1)
        psu = prediction_shift_uncertainty(bare, dropped)
        return -psu / bare.amax(1) if self.psu == "ratio" else -psu


def prediction_shift_uncertainty(bare: Outputs, dropped: Dropped) -> Float[Tensor, " b"]:
    """PSU: P_c(x) - 1/k sum_i P_c(x; p, i), with c the class of greatest probability without dropout.

    >>> prediction_shift_uncertainty(torch.tensor([[0.25, 0.75]]), torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])).tolist()
    [0.5]
    """
    own = bare.argmax(1, keepdim=True)
    return (bare.gather(1, own) - dropped.mean(1).gather(1, own)).squeeze(1)


def shifts(bare: Outputs, dropped: Dropped) -> Bool[Tensor, "b passes"]:
    """Whether the predicted class is another one under dropout: 1[Y(x; p, i) != Y(x)]; their mean is the shift ratio.

    >>> shifts(torch.tensor([[0.25, 0.75]]), torch.tensor([[[0.5, 0.25], [0.0, 1.0]]])).tolist()
    [[True, False]]
    """
    return dropped.argmax(2) != bare.argmax(1, keepdim=True)


def chosen(clean: Sequence[float], training: Sequence[float] | None, shift: float) -> int:
    """Which rate: of those at which the clean shift ratio is at least `shift`, that of the greatest lead over training.

    Where it is nowhere as high, all rates compete. Without a training set, the smallest of those rates, or the one with
    the greatest clean ratio. The smaller rate wins a tie.

    >>> chosen([0.5, 0.9, 0.95], [0.1, 0.8, 0.7], 0.8), chosen([0.5, 0.9, 0.95], None, 0.8)
    (2, 1)
    """
    high = [i for i, ratio in enumerate(clean) if ratio >= shift]
    if training is None:
        return high[0] if high else max(range(len(clean)), key=lambda i: clean[i])
    return max(high or range(len(clean)), key=lambda i: clean[i] - training[i])


@torch.no_grad()
def shift_ratios(model: nn.Module, where: Where, noise: Masks, rates: Sequence[float], data: ImageSet) -> list[float]:
    """The shift ratio of `data` at each rate."""
    found = []
    for rows in data.rows(BATCH):
        images = data.images(rows)
        bare = without_dropout(model, images)
        at_rate = [
            shifts(bare, with_dropout(model, images, where, dropout_masks(model, where, noise, rate))) for rate in rates
        ]
        found.append(torch.stack(at_rate, 1))
    return torch.cat(found).double().mean((0, 2)).tolist()


def without_dropout(model: nn.Module, images: Images) -> Outputs:
    """Outputs of the model as it is."""
    return logits_under(model, images, lambda some: some, 1).squeeze(1)


def with_dropout(model: nn.Module, images: Images, where: Where, masks: Masks) -> Dropped:
    """Outputs under each mask."""
    passes = len(masks)
    with dropout(model, where, masks):
        return logits_under(model, images, lambda some: some.repeat_interleave(passes, 0), passes)


def sample(data: ImageSet, most: int, generator: torch.Generator) -> ImageSet:
    """At most so many images, drawn without replacement."""
    rows = torch.randperm(len(data), generator=generator)[:most]
    return data.take(rows.to(data.device))
