"""SAGE: the model's early attention teaches its late attention, on few clean images.

Gong, Chen, Yang, Wang, Gu, Huang, Shen: "Redeem Myself: Purifying Backdoors in Deep Learning Models using Self
Attention Distillation", IEEE S&P 2023, https://doi.org/10.1109/SP46215.2023.10179375.

A repair without a teacher model. A copy of the model is trained on the clean images:

    1. attention map of a stage: sum over channels of |activation|^p at each place, scaled to length 1
    2. loss = cross-entropy + beta * sum over neighbouring stages of the mean squared difference of their maps; the
       earlier map is the teacher
    3. a checkpoint every 25 epochs halves the learning rate if C1 or C2 holds. C1: accuracy on the clean images rose in
       fewer than 3/4 of the epochs since the last checkpoint. C2: the last checkpoint kept the rate, and the best
       accuracy is no higher than it was then

Of the paper we had the abstract and a caption: the learning rate follows the accuracy on clean samples, by two
conditions, C1 and C2. What is marked "code" is read in https://github.com/ZJUICSR/AIcert (function/defense/sage), a
platform of Zhejiang University that does not say whether this part is the authors'. There p is 2 and beta is 300. C1
and C2 stand there in a function that nothing calls, and look at the loss; they are the conditions of Auto-PGD
(https://arxiv.org/abs/2003.01690).

Re-derived for ViTs: the four stages of a ResNet become four stages of blocks, each observed at its last block. The
block's output for an image token stands for the channels at a pixel, so no map needs resizing ("tokens", the default).
With attention = "softmax", the map is the attention that the tokens read by the head pay to each image token.

What differs:

    - the learning rate follows accuracy, as in the abstract; track = "loss" follows the mean loss of the epoch, as the
      code does. An accuracy near 1 seldom rises strictly, so that C1 nearly always holds
    - the clean images are those that are trained on; the code looks at the test set, and keeps the epoch with the least
      ASR, which no defender knows
    - the earlier map passes no gradient; in the code it does
    - the code's SGD is Nesterov's and decays all weights; here it decays only matrices, and dropout stays off
    - the mean squared difference is over tokens, so that beta = 300 weighs the squared distance of two maps by
      300 / tokens: 19 for 16 tokens, 1.5 for 196; the code's maps make that 0.3 to 4.7 on CIFAR-10
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vitrap.contracts import Batch, Card, Criterion, ImageSet, Objective, OutcomeKind, Repaired, Suspect
from vitrap.errors import UserError
from vitrap.models.observe import block_outputs, head_attention, observe, token_layout, transformer
from vitrap.params import DefaultFrom, hyperparameters, param
from vitrap.train.loop import Epoch, Streams
from vitrap.train.tuning import Tuning, recipe_of, tune

Map = Float[Tensor, "b image_tokens"]
SGD_RATE = 0.05
"""SGD's default learning rate: the code's for CIFAR-10 (it has 0.08 for CIFAR-100 and 0.001 for MNIST)."""
ADAMW_RATE = 1e-4
"""AdamW's default learning rate, ours: a tenth of the recipes' for ViTs, chosen without looking at any attack."""


@hyperparameters
class Sage:
    """The defence: SAGE's hyper-parameters, as far as they are known."""

    card: ClassVar[Card] = Card(
        "Redeem Myself: Purifying Backdoors in Deep Learning Models using Self Attention Distillation",
        "Gong, Chen, Yang, Wang, Gu, Huang, Shen",
        "IEEE S&P",
        2023,
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "repair"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = True

    attention: Literal["tokens", "softmax"] = param(
        "tokens", "what a map is made of: block outputs, or the attention of the tokens that the head reads"
    )
    power: float = param(2.0, "power of the absolute outputs (tokens only)", symbol="p", source="code", low=1)
    stages: int = param(4, "stages whose maps are compared; all blocks where there are fewer", source="code", low=2)
    weight: float = param(300.0, "weight of the distillation loss", symbol="β", source="code", low=0)
    optimizer: Literal["sgd", "adamw"] = param("sgd", "the optimiser; sgd has momentum 0.9", source="code")
    lr: float = param(
        DefaultFrom("optimizer", {"sgd": SGD_RATE, "adamw": ADAMW_RATE}),
        "learning rate at the start (adamw's is ours)", source="code", low=0, open=True,
    )  # fmt: skip
    epochs: int = param(100, "passes over the clean images", source="code", low=1)
    batch_size: int = param(64, "images per step, at most all there are", source="code", low=1)
    weight_decay: float = param(1e-4, "decay of weight matrices", source="code", low=0)
    clip: float = param(0.0, "greatest norm of the gradient; 0 for no limit", source="code", low=0)
    track: Literal["accuracy", "loss"] = param(
        "accuracy", "what the learning rate follows (the code: the loss)", source="paper"
    )
    every: int = param(25, "epochs between checkpoints of the learning rate", source="code", low=1)
    rises: float = param(
        0.75, "least share of epochs in which what is tracked must improve", symbol="C1", source="code", low=0, high=1
    )
    factor: float = param(
        0.5, "what the learning rate is multiplied by when it is lowered", source="code", low=0, high=1, open="low"
    )

    def apply(self, suspect: Suspect) -> Repaired:
        """Train a copy on cross-entropy and distillation, and adapt the learning rate after each epoch.

        Raises:
            UserError: the model has no two blocks of plain token attention, or the training diverges.
        """
        # Steps 1 and 2: the loss, over the last block of each stage.
        blocks = stage_ends(len(transformer(suspect.model).blocks), self.stages)
        objective = Objective(partial(losses, blocks=blocks, settings=self), {"distillation": self.weight})
        # Step 3: the learning rate; the history of accuracies starts with the accuracy before the repair.
        start = clean_accuracy(suspect, suspect.model) if self.track == "accuracy" else -math.inf
        control = RateControl(self, suspect, [start])
        # Only the order of the images is random; it is drawn from the defender's own stream. Fine-tuning also augments,
        # on the device, and so needs `streams_of`.
        drawn = suspect.generator
        streams = Streams(order=drawn, augmentation=drawn, projection=drawn, preparation=drawn)
        tuned = tune(suspect, Tuning("sage", recipe_of(self, len(suspect.clean)), streams, objective, control=control))
        report = {**control.losses, "clean accuracy": clean_accuracy(suspect, tuned.model), "last lr": control.lr}
        return Repaired(tuned.model, "blocks " + ", ".join(str(block + 1) for block in blocks), report)


@dataclass
class RateControl:
    """Step 3: the learning rate of each epoch, by accuracy or loss on the clean images.

    Attributes:
        settings: the defence.
        suspect: has the clean images.
        history: accuracy, or minus the loss, before the first epoch and after each.
        lowered: whether the last checkpoint lowered the rate.
        losses: mean losses of the last epoch.
        lr: the rate for the next epoch.
    """

    settings: Sage
    suspect: Suspect
    history: list[float]
    lowered: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)
    lr: float = 0.0

    def __call__(self, model: nn.Module, epoch: Epoch, lr: float) -> float:
        """Extend the history by an epoch; at a checkpoint, lower the rate or keep it."""
        s = self.settings
        self.losses = mean_losses(epoch)
        self.lr = lr
        if s.track == "accuracy":
            self.history.append(clean_accuracy(self.suspect, model))
        else:
            self.history.append(-(self.losses["cross_entropy"] + s.weight * self.losses["distillation"]))
        epochs = len(self.history) - 1
        if epochs % s.every == 0:
            self.lowered = should_lower(self.history, s.every, s.rises, self.lowered)
            self.lr *= s.factor if self.lowered else 1
        return self.lr


def stage_ends(depth: int, count: int) -> tuple[int, ...]:
    """The last block of each of `count` stages of about equal depth.

    >>> stage_ends(12, 4)
    (2, 5, 8, 11)

    Raises:
        UserError: there are fewer than two blocks.
    """
    if depth < 2:
        raise UserError(
            f"sage compares at least 2 blocks, and the model has {depth}; choose a deeper network or another defence"
        )
    count = min(count, depth)
    return tuple((stage + 1) * depth // count - 1 for stage in range(count))


def losses(
    model: nn.Module, batch: Batch, criterion: Criterion, *, blocks: Sequence[int], settings: Sage
) -> Mapping[str, Float[Tensor, ""]]:
    """Steps 1 and 2: cross-entropy, and the distillation between the maps of `blocks`."""
    layout = token_layout(model)
    observed = block_outputs if settings.attention == "tokens" else observe
    with observed(model, blocks) as seen:
        logits = model(batch.images).float()
    if settings.attention == "tokens":
        maps = [token_map(seen[block][:, layout.prefix :].float(), settings.power) for block in blocks]
    else:
        maps = [head_attention(seen[block].float(), layout).flatten(1) for block in blocks]
    return {"cross_entropy": criterion(logits, batch.labels), "distillation": distillation(maps)}


def token_map(outputs: Float[Tensor, "b image_tokens dim"], power: float) -> Map:
    """Step 1, before scaling: the sum over channels of |output|^p at each image token.

    >>> token_map(torch.tensor([[[3.0, -4.0], [0.0, 1.0]]]), 2).tolist()
    [[25.0, 1.0]]
    """
    return outputs.abs().pow(power).sum(-1)


def distillation(maps: Sequence[Map]) -> Float[Tensor, ""]:
    """Step 2: the mean squared difference of neighbouring maps, each scaled to length 1; summed over the pairs.

    The earlier map of a pair is the teacher: it passes no gradient.

    >>> distillation([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 3.0]])]).item()
    1.0
    """
    unit = [functional.normalize(one, dim=1) for one in maps]
    return torch.stack([functional.mse_loss(late, early.detach()) for early, late in pairwise(unit)]).sum()


def should_lower(history: Sequence[float], every: int, rises: float, lowered: bool) -> bool:
    """Step 3: whether C1 or C2 holds at a checkpoint.

    Args:
        history: what is tracked, higher for better, before the first epoch and after each.
        every: epochs between checkpoints; the last entry of the history is one.
        rises: C1 holds if fewer than this share of the epochs since the last checkpoint improved on the one before.
        lowered: whether the last checkpoint lowered the rate. If it kept the rate, C2 holds if the best value is no
            higher than it was then.

    >>> should_lower([0.5, 0.6, 0.5, 0.7, 0.8], 4, 0.75, False)
    False
    """
    improved = sum(after > before for before, after in pairwise(history[-every - 1 :]))
    stalled = not lowered and max(history) <= max(history[:-every])
    return improved < rises * every or stalled


def mean_losses(epoch: Epoch) -> dict[str, float]:
    """The mean over images of each loss of an epoch.

    Summed in fp32 in this order, so that old records are reproduced; another order would round differently.
    """
    found = {}
    for name, terms in epoch.terms.items():
        total = terms.new_zeros(())
        for term, count in zip(terms, epoch.counts[name], strict=True):
            total = total + term * count
        found[name] = total.item() / sum(epoch.counts[name])
    return found


def clean_accuracy(suspect: Suspect, model: nn.Module) -> float:
    """The accuracy of `model` on the suspect's clean images, computed as the suspect's model computes."""
    with suspect.compute(model, suspect.clean.device):
        return accuracy(model, suspect.clean)


@torch.no_grad()
def accuracy(model: nn.Module, clean: ImageSet) -> float:
    """The share of the clean images that the model classifies correctly."""
    right = [(model(clean.images(rows)).argmax(1) == clean.labels[rows]).sum() for rows in clean.row_batches(512)]
    return torch.stack(right).sum().item() / len(clean)
