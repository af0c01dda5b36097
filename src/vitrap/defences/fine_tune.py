"""Fine-tuning: train all weights on with the few clean images.

Liu, Dolan-Gavitt, Garg: "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018,
https://arxiv.org/abs/1805.12185, which studies it beside pruning.

A repair that knows nothing of backdoors, and the baseline of all others: without poisoned images in the training set,
the model may forget what only they taught it. Settings are those of BackdoorBench's `ft`
(https://github.com/SCLBD/BackdoorBench): SGD with momentum 0.9 at 0.01, 100 epochs, a cosine down to 0, weight decay
5e-4, batches of 256. The second arm, AdamW, is there because ViTs are not trained with SGD.

What differs: BackdoorBench gives the defender 5 % of the training set; here the run decides (`data.holdout`). It crops
after padding by 4 px, and flips CIFAR-10; here neither is the default, as for the recipes that victims are trained
with. Its rate falls after each epoch, here after each step; it decays all weights, here matrices alone. It fine-tunes
in training mode; here the model stays in evaluation mode, so dropout is off and, in a network with batch
normalisation, the statistics stay as they were. Its 100 epochs are one choice for all models.
"""

from dataclasses import replace
from typing import ClassVar, Literal

from vitrap.contracts import Card, OutcomeKind, Repaired, Suspect
from vitrap.params import hyperparameters, param
from vitrap.train.recipe import Recipe
from vitrap.train.tuning import Tuning, recipe_of, streams_of, tune

SGD_RATE = 0.01
"""Of BackdoorBench's `ft`."""
ADAMW_RATE = 1e-4
"""Ours: a tenth of what vitrap's recipes train a ViT with. No attack was looked at to choose it."""


@hyperparameters
class FineTune:
    """The settings of BackdoorBench, and a second optimiser."""

    card: ClassVar[Card] = Card(
        "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
        "Liu, Dolan-Gavitt, Garg",
        "RAID",
        2018,
        "1805.12185",
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "repair"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    optimizer: Literal["sgd", "adamw"] = param(
        "sgd", "what makes steps of gradients; sgd has momentum 0.9", source="field"
    )
    lr: float = param(
        None, f"peak learning rate (sgd: {SGD_RATE:g}; adamw, ours: {ADAMW_RATE:g})", source="field", low=0, open=True
    )
    epochs: int = param(100, "passes over the clean images", source="field", low=1)
    batch_size: int = param(256, "images a step, at most all there are", source="field", low=1)
    weight_decay: float = param(5e-4, "decay of weight matrices", source="field", low=0)
    clip: float = param(0.0, "greatest norm of the gradient; 0 for no limit", source="field", low=0)
    crop: int = param(0, "random crop after padding by so many pixels; 0 for none", unit="px", low=0)
    flip: bool = param(False, "flip half of the images")

    def __post_init__(self) -> None:
        """Fill in the optimiser's own rate and refuse values out of range."""
        if self.lr is None:
            object.__setattr__(self, "lr", SGD_RATE if self.optimizer == "sgd" else ADAMW_RATE)

    def apply(self, suspect: Suspect) -> Repaired:
        """Train a copy on the clean images.

        Raises:
            UserError: the training diverges.
        """
        streams = streams_of(suspect.generator, suspect.clean.device)
        tuned = tune(suspect, Tuning("fine_tune", recipe(self, len(suspect.clean)), streams))
        return Repaired(tuned.model, report={**tuned.last(), "lr": self.lr})


def recipe(settings: FineTune, images: int) -> Recipe:
    """How a model is trained on so many images: the rate falls from the first step on."""
    return replace(recipe_of(settings, images), warmup=0.0)
