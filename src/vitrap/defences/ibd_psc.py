"""IBD-PSC: amplify the model's last normalisations; an input whose class stays as probable is suspicious.

Hou, Feng, Hua, Luo, Zhang, Li: "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling Consistency",
ICML 2024, https://arxiv.org/abs/2405.09786; code: BackdoorBox, https://github.com/THUYimingLi/BackdoorBox
(core/defenses/IBD_PSC.py).

A screen at test time that changes the model. F_i is the model whose last i of L normalisation layers have their gain
gamma and bias beta multiplied by omega:

    1. k is the least i in 1, ..., L at which the error of F_i on clean images is above xi (Algorithm 1)
    2. PSC(x) = mean over i = k, ..., k + n - 1 of F_i(x)'s probability of the class that the model itself predicts
    3. the score is PSC(x)

PSC is parameter-oriented scaling consistency. Inflated features break the narrow decisions of clean images before the
wide margin that a trigger gives to its target. An image costs at most 1 + n forward passes, 6 by default.

Re-derived for ViTs. The paper amplifies BatchNorm, of which a ViT has none; here it is LayerNorm, whose output is
multiplied as a whole, since omega (gamma z + beta) = omega gamma z + omega beta. But a LayerNorm stands at the entry of
a branch, and what it gives is added to an unchanged stream, or enters a softmax. So omega = 1.5 often leaves clean
images their class in all layers, and nothing is told apart. Therefore omega is calibrated: of 1.5, 2, 3, 5 and 8 it is
the first at which step 1 finds a k. If there is none, omega is 8 and k is L. This ladder is that of an unpublished port
to ViTs (PjotrVr/PSBD-ViT), which reports AUROC 0.92 with it and 0.72 without; omega = 1.5 gives the paper's form.
The ladder is made for deep networks: in the planted case of our tests, with 5 LayerNorms in 2 blocks, it breaks the
trigger along with the clean images (AUROC 0.77), and omega = 1.5 does not (0.93; exploratory, 200 test images).

What differs: where fewer than n layers are left, the mean is over those. The code amplifies one layer more in each
model than the paper's eq. 4 says, never tries all L layers, and fails where no error is above xi; here the paper holds.

What others' ports do: backdoor-toolbox looks for BatchNorm alone, too, so that on a ViT there is nothing to amplify.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrap.contracts import Card, Images, ImageSet, OutcomeKind, Screen, Suspect
from vitrap.errors import UserError
from vitrap.models.batched import logits_under
from vitrap.models.observe import transformer
from vitrap.params import hyperparameters, param

LADDER = (1.5, 2.0, 3.0, 5.0, 8.0)
"""The factors that are tried where omega is left out; the first is the paper's."""


@hyperparameters
class IbdPsc:
    """The defence: IBD-PSC's hyper-parameters."""

    card: ClassVar[Card] = Card(
        "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling Consistency",
        "Hou, Feng, Hua, Luo, Zhang, Li",
        "ICML",
        2024,
        "2405.09786",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "screen"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = True

    omega: float | None = param(
        None,
        "what gains and biases are multiplied by (the paper: 1.5); left out, it is calibrated on clean images",
        symbol="ω",
        source="field",
        low=1,
        high=100,
        open="low",
    )
    models: int = param(5, "amplified models that a score is the mean of", symbol="n", source="paper", low=1)
    error: float = param(
        0.6, "error on clean images that the first amplified model exceeds", symbol="ξ", source="paper", low=0, high=1
    )
    images: int = param(100, "most clean images to measure that error on", source="paper", low=1)

    def apply(self, suspect: Suspect) -> Screen:
        """Choose the amplified models.

        Raises:
            UserError: the model has no plain token attention, or no LayerNorm with a gain.
        """
        layers = last_norms_first(suspect.model)
        rows = torch.randperm(len(suspect.clean), generator=suspect.generator)[: self.images]
        clean = suspect.clean.take(rows.to(suspect.clean.device))
        # Step 1: the factor, and how many layers it first needs.
        with suspect.computing():
            omega, k, error = choose(self, suspect.model, layers, clean)
        # Steps 2 and 3 are the score.
        counts = range(k, min(k + self.models, len(layers) + 1))
        report = {"omega": omega, "k": k, "LayerNorms": len(layers), "clean error": error}
        return Screen(Psc(suspect.model, layers, omega, counts), f"the last {counts[-1]} LayerNorms", report)


@dataclass(frozen=True)
class Psc:
    """The score: the mean probability that the amplified models give to the class which the model predicts.

    Attributes:
        model: the suspect's model.
        layers: its LayerNorms, from the head on.
        omega: what their gains and biases are multiplied by.
        counts: for each amplified model, how many layers are amplified.
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    omega: float
    counts: Sequence[int]

    def __call__(self, images: Images) -> Float[Tensor, " b"]:
        """The score of each image, in [0, 1]."""
        predicted = logits_of(self.model, images).argmax(1)
        amplified = []
        for count in self.counts:
            with amplify(self.layers[:count], self.omega):
                amplified.append(logits_of(self.model, images))
        return consistency(torch.stack(amplified, 1), predicted)


def last_norms_first(model: nn.Module) -> Sequence[nn.LayerNorm]:
    """The LayerNorms of the ViT inside `model` that have a gain, in reverse order of execution.

    Raises:
        UserError: the model has no plain token attention, or no such layer.
    """
    found = [m for m in transformer(model).modules() if isinstance(m, nn.LayerNorm) and m.elementwise_affine]
    if not found:
        raise UserError(
            "ibd_psc amplifies LayerNorms, and the model has none with a gain; choose another network or defence"
        )
    return found[::-1]


def choose(
    settings: IbdPsc, model: nn.Module, layers: Sequence[nn.Module], clean: ImageSet
) -> tuple[float, int, float]:
    """Step 1: omega, k, and the error on clean images there; the last omega and all layers if no error is above xi."""
    error = 0.0
    ladder = LADDER if settings.omega is None else (settings.omega,)
    for omega in ladder:
        for k in range(1, len(layers) + 1):
            with amplify(layers[:k], omega):
                error = error_on(model, clean)
            if error > settings.error:
                return omega, k, error
    return ladder[-1], len(layers), error


@contextmanager
def amplify(layers: Sequence[nn.Module], omega: float) -> Iterator[None]:
    """Within the block, the gains and biases of `layers` count `omega` times: so do their outputs (eq. 2)."""

    def multiply(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return omega * output

    with ExitStack() as restore:
        for layer in layers:
            restore.callback(layer.register_forward_hook(multiply).remove)
        yield


def error_on(model: nn.Module, clean: ImageSet) -> float:
    """The share of the clean images that the model classifies wrongly (eq. 3)."""
    wrong = [logits_of(model, clean.images(rows)).argmax(1) != clean.labels[rows] for rows in clean.row_batches(512)]
    return torch.cat(wrong).double().mean().item()


def consistency(logits: Float[Tensor, "b models k"], predicted: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Step 2: the mean over models of the softmax at the predicted class (eq. 4).

    >>> consistency(torch.tensor([[[0.0, 0.0], [0.0, 100.0]]]), torch.tensor([1])).tolist()
    [0.75]
    """
    probable = logits.softmax(2).mean(1)
    return probable.gather(1, predicted[:, None]).squeeze(1)


def logits_of(model: nn.Module, images: Images) -> Float[Tensor, "b k"]:
    """Logits of the model as it is within the block."""
    return logits_under(model, images, lambda some: some, 1).squeeze(1)
