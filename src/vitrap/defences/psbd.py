"""PSBD: switch dropout on at inference; an input whose class it hardly moves is suspicious.

Li, Chen, Liu, Wang: "PSBD: Prediction Shift Uncertainty Unlocks Backdoor Detection", CVPR 2025,
https://arxiv.org/abs/2406.05826; code: https://github.com/WL-619/PSBD.

With dropout at inference, the predictions of clean images shift to other classes; those of triggered images shift less:

    1. choose the dropout rate p by the shift ratio, the share of passes that predict another class. Of the rates at
       which clean images have a ratio of 0.8 or more (or, if there is none, of all rates), take the one at which the
       ratio of clean images minus that of the training set is greatest
    2. PSU(x) = P_c(x) - mean over k passes of P_c(x; p), with c the class predicted without dropout
    3. the score is - PSU(x)

PSU is prediction shift uncertainty. The paper's abstract calls it a variance; its code computes this difference.

What differs. The paper filters a training set, with the 25 % quantile of clean PSU as its threshold; here PSU screens
inputs at test time, and the metric sets thresholds. A defender at test time need not have the training set: without it,
p is the smallest rate at which the clean ratio reaches 0.8 or, where none does, the rate with the greatest clean ratio.
Both ratios are measured on at most `images` images. The code draws new masks each time; here they are drawn once and
shared by all images and rates, so that the score of an image depends on that image alone. But then all scores depend
on the same k random masks, whose luck does not average out, and the code's k = 3 is too few: the clean shift ratio of
small ViTs on GTSRB has a standard deviation of 0.1 over masks, and with 20 passes one of 0.02, about the error from 250
images (exploratory, as is the figure below). PSU cannot exceed the probability without dropout, so inputs of which the
model is unsure look triggered where the rate is high; psu = "ratio" divides by that probability, as an unpublished port
to ViTs does (PjotrVr/PSBD-ViT).

Re-derived for ViTs. The code puts dropout behind the residual addition of each ResNet block, so that both the next
block and its shortcut get the thinned values. The same place in a ViT is the output of each block: elements of all
tokens, the class token included, are dropped ("stream", the default). Two more places are offered. "residual" drops
elements of what attention and MLP add, where ViTs have dropout themselves, and leaves the shortcut whole. "token"
blanks whole image tokens in what each block's attention reads, and spares the class token. Dropping the updates of
whole tokens is not offered: the class token still reads all others, and the class of clean images of small ViTs hardly
ever shifted (in under 22 % of passes at all rates, where 80 % are wanted).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrap.contracts import Card, Images, ImageSet, OutcomeKind, Screen, Suspect
from vitrap.models.batched import logits_under
from vitrap.models.dropout import Masks, Noise, Where, dropout, dropout_masks, dropout_noise
from vitrap.params import hyperparameters, param

BATCH = 256
"""Images per batch where the rate is chosen; it bounds memory, not the result."""
Form = Literal["difference", "ratio"]
Outputs = Float[Tensor, "b classes"]
Dropped = Float[Tensor, "b passes classes"]


@hyperparameters
class Psbd:
    """The defence: PSBD's hyper-parameters."""

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
        "how the fall of the class's probability is measured: as a difference, or relative to that without dropout",
        source="code",
    )
    passes: int = param(20, "forward passes with dropout (the code makes 3)", symbol="k", low=1, high=1000)
    rate: float | None = param(
        None,
        "dropout rate; where left out, it is chosen by shift ratios",
        symbol="p",
        source="code",
        low=0,
        high=1,
        open=True,
    )
    rates: int = param(9, "rates to choose from: multiples of 1 / (rates + 1) below 1", source="code", low=1, high=1000)
    shift: float = param(0.8, "shift ratio of clean images that the rate shall reach", source="code", low=0, high=1)
    images: int = param(250, "most images of the clean set, and of the training set, to choose the rate by", low=1)

    def apply(self, suspect: Suspect) -> Screen:
        """Draw the dropout masks, and choose the rate unless it is given."""
        # The masks of all rates come from the same noise, so that the rates differ in nothing else.
        noise = dropout_noise(suspect.model, self.where, self.passes, suspect.generator).to(suspect.clean.device)
        # Step 1: the rate.
        rate, ratios = (self.rate, {}) if self.rate is not None else choose_rate(self, suspect, noise)
        # Steps 2 and 3 are the score, with the masks of that rate.
        masks = dropout_masks(suspect.model, self.where, noise, rate)
        return Screen(
            NegativePsu(suspect.model, self.where, self.psu, masks), f"blocks, {self.where}", {"rate": rate, **ratios}
        )


def choose_rate(settings: Psbd, suspect: Suspect, noise: Noise) -> tuple[float, dict[str, float]]:
    """Step 1: the rate, and the shift ratios at it, of clean images and of the training set where there is one."""
    rates = [i / (settings.rates + 1) for i in range(1, settings.rates + 1)]
    ratios: dict[str, list[float]] = {}
    for name, data in (("clean", suspect.clean), ("training", suspect.train)):
        if data is not None:
            some = sample(data, settings.images, suspect.generator)
            with suspect.computing():
                ratios[name] = shift_ratios(suspect.model, settings.where, noise, rates, some)
    best = best_rate_index(ratios["clean"], ratios.get("training"), settings.shift)
    return rates[best], {f"shift ratio, {name}": ratio[best] for name, ratio in ratios.items()}


@dataclass(frozen=True)
class NegativePsu:
    """The score: minus PSU. The less the probability of an input's class falls under dropout, the higher the score.

    Attributes:
        model: the suspect's model.
        where: what is dropped.
        psu: whether PSU is the difference of the probabilities, or that difference over the one without dropout.
        masks: one for each pass, the same for every image.
    """

    model: nn.Module
    where: Where
    psu: Form
    masks: Masks

    def __call__(self, images: Images) -> Float[Tensor, " b"]:
        """The score of each image, at least -1."""
        bare = without_dropout(self.model, images).softmax(-1)
        dropped = with_dropout(self.model, images, self.where, self.masks).softmax(-1)
        psu = prediction_shift_uncertainty(bare, dropped)
        return -psu / bare.amax(1) if self.psu == "ratio" else -psu


def prediction_shift_uncertainty(bare: Outputs, dropped: Dropped) -> Float[Tensor, " b"]:
    """Step 2: PSU = P_c(x) - 1/k sum_i P_c(x; p, i), with c the most probable class without dropout.

    >>> prediction_shift_uncertainty(torch.tensor([[0.25, 0.75]]), torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])).tolist()
    [0.5]
    """
    own = bare.argmax(1, keepdim=True)
    return (bare.gather(1, own) - dropped.mean(1).gather(1, own)).squeeze(1)


def shifts(bare: Outputs, dropped: Dropped) -> Bool[Tensor, "b passes"]:
    """Whether dropout changes the predicted class: 1[Y(x; p, i) != Y(x)]. The mean of these is the shift ratio.

    >>> shifts(torch.tensor([[0.25, 0.75]]), torch.tensor([[[0.5, 0.25], [0.0, 1.0]]])).tolist()
    [[True, False]]
    """
    return dropped.argmax(2) != bare.argmax(1, keepdim=True)


def best_rate_index(clean: Sequence[float], training: Sequence[float] | None, shift: float) -> int:
    """The position of the rate to use, given the shift ratios of clean images and of the training set at each rate.

    Of the rates at which the clean ratio is at least `shift` (or, if there is none, of all rates), it is the one at
    which the clean ratio minus the training ratio is greatest. Without a training set it is the first rate at which the
    clean ratio is at least `shift`, or else the one with the greatest clean ratio. The smaller rate wins a tie.

    >>> best_rate_index([0.5, 0.9, 0.95], [0.1, 0.8, 0.7], 0.8), best_rate_index([0.5, 0.9, 0.95], None, 0.8)
    (2, 1)
    """
    high = [i for i, ratio in enumerate(clean) if ratio >= shift]
    if training is not None:
        return max(high or range(len(clean)), key=lambda i: clean[i] - training[i])
    return high[0] if high else clean.index(max(clean))


@torch.no_grad()
def shift_ratios(model: nn.Module, where: Where, noise: Noise, rates: Sequence[float], data: ImageSet) -> list[float]:
    """The shift ratio of `data` at each rate."""
    found = []
    for rows in data.row_batches(BATCH):
        images = data.images(rows)
        bare = without_dropout(model, images)
        at_rate = []
        for rate in rates:
            masks = dropout_masks(model, where, noise, rate)
            at_rate.append(shifts(bare, with_dropout(model, images, where, masks)))
        found.append(torch.stack(at_rate, 1))
    return torch.cat(found).double().mean((0, 2)).tolist()


def without_dropout(model: nn.Module, images: Images) -> Outputs:
    """Logits of the model as it is."""
    return logits_under(model, images, lambda some: some, 1).squeeze(1)


def with_dropout(model: nn.Module, images: Images, where: Where, masks: Masks) -> Dropped:
    """Logits of each image under each mask."""
    passes = len(masks)
    with dropout(model, where, masks):
        return logits_under(model, images, lambda some: some.repeat_interleave(passes, 0), passes)


def sample(data: ImageSet, most: int, generator: torch.Generator) -> ImageSet:
    """At most `most` images, drawn without replacement."""
    rows = torch.randperm(len(data), generator=generator)[:most]
    return data.take(rows.to(data.device))
