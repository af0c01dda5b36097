"""SAGE: the model's early attention teaches its late attention, on few clean images.

Gong, Chen, Yang, Wang, Gu, Huang, Shen: "Redeem Myself: Purifying Backdoors in Deep Learning Models using Self
Attention Distillation", IEEE S&P 2023, https://doi.org/10.1109/SP46215.2023.10179375.

A repair without a teacher model: cross-entropy on the clean images, plus the distance between the attention maps of
neighbouring stages of the model itself, at a learning rate that follows what the clean images say.

Of the paper we had the abstract and a caption: the rate tracks the accuracy on clean samples, and two conditions, C1
and C2, decide on it. What is marked "code" is read in https://github.com/ZJUICSR/AIcert (function/defense/sage), a
platform of Zhejiang University that does not say whether this part is the authors'. There a map is the sum over
channels of |activation|^2, scaled to length 1; the loss is the mean squared difference of neighbouring stages' maps,
times 300; a function that nothing calls halves the rate at every 25th epoch if C1 the loss fell in fewer than 3/4 of
the epochs, or C2 the rate was kept at the checkpoint before and the least loss has not fallen since. These are the
conditions of Auto-PGD (https://arxiv.org/abs/2003.01690).

Re-derived for ViTs: a ResNet's four stages become four stages of blocks, each seen at its last block. What a block
puts out for an image token stands for the channels at a pixel, and no map needs resizing ("tokens", the default: it is
the definition, carried over). "softmax" takes what the rows that the head reads give to each image token.

What differs: the rate follows accuracy, as in the abstract (`track="loss"`, the step's mean: the code's). Strict rises
of an accuracy near 1 are rare, so that C1 nearly always holds. The clean images are those trained on; the code looks
at the test set, and keeps the epoch of least ASR, which no defender knows. The early map teaches and passes no
gradient; in the code it does. The code's SGD is Nesterov's and decays all weights; here dropout stays off. Per squared
distance of two maps the weight is 300 / tokens: 19 for 16 tokens, 1.5 for 196; the code's, on CIFAR-10, 0.3 to 4.7.
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
from vitrap.models.observe import block_outputs, observe, read_tokens, token_layout, transformer
from vitrap.params import hyperparameters, param
from vitrap.train.loop import Epoch, Streams
from vitrap.train.tuning import Tuning, recipe_of, tune

Map = Float[Tensor, "b image_tokens"]
SGD_RATE = 0.05
"""Of the code, for CIFAR-10 (0.08 for CIFAR-100, 0.001 for MNIST)."""
ADAMW_RATE = 1e-4
"""Ours: a tenth of what vitrap's recipes train a ViT with. No attack was looked at to choose it."""


@hyperparameters
class Sage:
    """The table of hyper-parameters, as far as it is known."""

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
        "tokens", "maps of block outputs, or of what the head's rows attend to"
    )
    power: float = param(2.0, "of the absolute outputs (tokens only)", symbol="p", source="code", low=1)
    stages: int = param(4, "blocks whose maps are compared, or all if there are fewer", source="code", low=2)
    weight: float = param(300.0, "weight of the distillation", symbol="β", source="code", low=0)
    optimizer: Literal["sgd", "adamw"] = param(
        "sgd", "what makes steps of gradients; sgd has momentum 0.9", source="code"
    )
    lr: float = param(
        None, f"learning rate at first (sgd: {SGD_RATE:g}; adamw, ours: {ADAMW_RATE:g})",
        source="code", low=0, open=True,
    )  # fmt: skip
    epochs: int = param(100, "passes over the clean images", source="code", low=1)
    batch_size: int = param(64, "images a step, at most all there are", source="code", low=1)
    weight_decay: float = param(1e-4, "decay of weight matrices", source="code", low=0)
    clip: float = param(0.0, "greatest norm of the gradient; 0 for no limit", source="code", low=0)
    track: Literal["accuracy", "loss"] = param(
        "accuracy", "what the learning rate follows (the code: the loss)", source="paper"
    )
    every: int = param(25, "epochs between checkpoints of the learning rate", source="code", low=1)
    rises: float = param(0.75, "least share of epochs that must be better", symbol="C1", source="code", low=0, high=1)
    factor: float = param(0.5, "what the learning rate is multiplied by", source="code", low=0, high=1, open="low")

    def __post_init__(self) -> None:
        """Fill in the optimiser's own rate and refuse values out of range."""
        if self.lr is None:
            object.__setattr__(self, "lr", SGD_RATE if self.optimizer == "sgd" else ADAMW_RATE)

    def apply(self, suspect: Suspect) -> Repaired:
        """Step down both losses; after each epoch look at the clean images, and lower the rate by what they say.

        Raises:
            UserError: the model has no two blocks of plain token attention, or the training diverges.
        """
        blocks = even(len(transformer(suspect.model).blocks), self.stages)
        objective = Objective(partial(losses, blocks=blocks, settings=self), {"distillation": self.weight})
        follow = Follow(self, suspect, [looked_at(suspect, suspect.model) if self.track == "accuracy" else -math.inf])
        # The order of the images comes from the defender's own stream; nothing else is drawn.
        drawn = suspect.generator
        streams = Streams(order=drawn, augmentation=drawn, projection=drawn, preparation=drawn)
        tuned = tune(suspect, Tuning("sage", recipe_of(self, len(suspect.clean)), streams, objective, control=follow))
        report = {**follow.losses, "clean accuracy": looked_at(suspect, tuned.model), "last lr": follow.lr}
        return Repaired(tuned.model, "blocks " + ", ".join(str(block + 1) for block in blocks), report)


@dataclass
class Follow:
    """The learning rate, as it follows what the clean images say.

    Attributes:
        settings: of the defence.
        suspect: with the clean images.
        history: what is tracked, higher for better, before the first epoch and after each.
        lowered: whether the last checkpoint lowered the rate.
        losses: the last epoch's.
        lr: the rate by now.
    """

    settings: Sage
    suspect: Suspect
    history: list[float]
    lowered: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)
    lr: float = 0.0

    def __call__(self, model: nn.Module, epoch: Epoch, lr: float) -> float:
        """Note what is tracked, and at each checkpoint lower the rate or keep it."""
        s, self.losses, self.lr = self.settings, mean_losses(epoch), lr
        if s.track == "accuracy":
            self.history.append(looked_at(self.suspect, model))
        else:
            self.history.append(-(self.losses["cross_entropy"] + s.weight * self.losses["distillation"]))
        if (len(self.history) - 1) % s.every == 0:
            self.lowered = shall_lower(self.history, s.every, s.rises, self.lowered)
            self.lr *= s.factor if self.lowered else 1
        return self.lr


def even(depth: int, count: int) -> tuple[int, ...]:
    """The last block of each of `count` stages of about equal depth; refused where there is one block alone.

    >>> even(12, 4)
    (2, 5, 8, 11)
    """
    if depth < 2:
        raise UserError(f"sage compares the attention of blocks, and the model has {depth}; it needs at least 2")
    count = min(count, depth)
    return tuple((stage + 1) * depth // count - 1 for stage in range(count))


def losses(
    model: nn.Module, batch: Batch, criterion: Criterion, *, blocks: Sequence[int], settings: Sage
) -> Mapping[str, Float[Tensor, ""]]:
    """Cross-entropy, and the distillation between the maps of `blocks`."""
    layout = token_layout(model)
    look = block_outputs if settings.attention == "tokens" else observe
    with look(model, blocks) as seen:
        logits = model(batch.images).float()
    if settings.attention == "tokens":
        maps = [token_map(seen[block][:, layout.prefix :].float(), settings.power) for block in blocks]
    else:
        maps = [read_tokens(seen[block].float(), layout).flatten(1) for block in blocks]
    return {"cross_entropy": criterion(logits, batch.labels), "distillation": distillation(maps)}


def token_map(outputs: Float[Tensor, "b image_tokens dim"], power: float) -> Map:
    """Attention representation: the sum over channels of |output|^p at each token.

    >>> token_map(torch.tensor([[[3.0, -4.0], [0.0, 1.0]]]), 2).tolist()
    [[25.0, 1.0]]
    """
    return outputs.abs().pow(power).sum(-1)


def distillation(maps: Sequence[Map]) -> Float[Tensor, ""]:
    """Loss: mean squared difference of neighbours' maps, each of length 1, summed; the earlier passes no gradient.

    >>> distillation([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 3.0]])]).item()
    1.0
    """
    unit = [functional.normalize(one, dim=1) for one in maps]
    return torch.stack([functional.mse_loss(late, early.detach()) for early, late in pairwise(unit)]).sum()


def shall_lower(history: Sequence[float], every: int, rises: float, lowered: bool) -> bool:
    """Learning rate update: C1, too few of the epochs since the last checkpoint were better than the one before; or C2.

    Args:
        history: what is tracked, higher for better, before the first epoch and after each.
        every: epochs between checkpoints; this is one.
        rises: least share of them that must be better.
        lowered: whether the last checkpoint lowered the rate. Where it did not, C2: the best has not risen since.

    >>> shall_lower([0.5, 0.6, 0.5, 0.7, 0.8], 4, 0.75, False)
    False
    """
    better = sum(after > before for before, after in pairwise(history[-every - 1 :]))
    stalled = not lowered and max(history) <= max(history[:-every])
    return better < rises * every or stalled


def mean_losses(epoch: Epoch) -> dict[str, float]:
    """Each loss, a mean over images: added up one batch after the other in fp32, as in all records so far."""
    found = {}
    for name, terms in epoch.terms.items():
        total = terms.new_zeros(())
        for term, count in zip(terms, epoch.counts[name], strict=True):
            total = total + term * count
        found[name] = total.item() / sum(epoch.counts[name])
    return found


def looked_at(suspect: Suspect, model: nn.Module) -> float:
    """The clean accuracy of a copy of the suspect's model, as the suspect computes."""
    with suspect.compute(model, suspect.clean.device):
        return accuracy(model, suspect.clean)


@torch.no_grad()
def accuracy(model: nn.Module, clean: ImageSet) -> float:
    """Share of the clean images that the model classifies as it should."""
    right = [(model(clean.images(rows)).argmax(1) == clean.labels[rows]).sum() for rows in clean.rows(512)]
    return torch.stack(right).sum().item() / len(clean)
