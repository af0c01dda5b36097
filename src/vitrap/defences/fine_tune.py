"""Fine-tuning: train the whole model further on the few clean images.

Liu, Dolan-Gavitt, Garg: "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018,
https://arxiv.org/abs/1805.12185, which studies it beside pruning.

A repair that knows nothing of backdoors, and the baseline of all other repairs: without poisoned images in the training
set, the model may forget what only they taught it. The settings are those of BackdoorBench's `ft`
(https://github.com/SCLBD/BackdoorBench): SGD with momentum 0.9 at 0.01, 100 epochs, cosine decay to 0, weight decay
5e-4, batches of 256. The second arm, AdamW, is there because ViTs are not trained with SGD.

What differs from BackdoorBench:

    - it gives the defender 5 % of the training set; here the run decides (`data.holdout`)
    - it crops after padding by 4 px, and flips CIFAR-10; here both are off by default, as in the recipes for victims
    - its learning rate falls after each epoch; here after each step
    - it decays all weights; here only matrices
    - it trains in training mode; here the model stays in evaluation mode, so that dropout is off and the statistics of
      batch normalisation do not change
"""

from dataclasses import replace
from typing import ClassVar, Literal

from vitrap.contracts import Card, OutcomeKind, Repaired, Suspect
from vitrap.params import DefaultFrom, hyperparameters, param
from vitrap.train.recipe import Recipe
from vitrap.train.tuning import Tuning, recipe_of, streams_of, tune

SGD_RATE = 0.01
"""SGD's default learning rate: BackdoorBench's."""
ADAMW_RATE = 1e-4
"""AdamW's default learning rate, ours: a tenth of the recipes' for ViTs, chosen without looking at any attack."""


@hyperparameters
class FineTune:
    """The defence: the hyper-parameters of fine-tuning."""

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

    optimizer: Literal["sgd", "adamw"] = param("sgd", "the optimiser; sgd has momentum 0.9", source="field")
    lr: float = param(
        DefaultFrom("optimizer", {"sgd": SGD_RATE, "adamw": ADAMW_RATE}),
        "peak learning rate (adamw's is ours)", source="field", low=0, open=True,
    )  # fmt: skip
    epochs: int = param(100, "passes over the clean images", source="field", low=1)
    batch_size: int = param(256, "images per step, at most all there are", source="field", low=1)
    weight_decay: float = param(5e-4, "decay of weight matrices", source="field", low=0)
    clip: float = param(0.0, "greatest norm of the gradient; 0 for no limit", source="field", low=0)
    crop: int = param(0, "padding of the random crop; 0 for no crop", unit="px", low=0, high=256)
    flip: bool = param(False, "flip half of the images")

    def apply(self, suspect: Suspect) -> Repaired:
        """Train a copy of the model on the clean images.

        Raises:
            UserError: the training diverges.
        """
        # The images' order and their augmentation come from the defender's own random stream.
        streams = streams_of(suspect.generator, suspect.clean.device)
        tuned = tune(suspect, Tuning("fine_tune", recipe(self, len(suspect.clean)), streams))
        return Repaired(tuned.model, report={**tuned.last(), "lr": self.lr})


def recipe(settings: FineTune, images: int) -> Recipe:
    """The training recipe for a clean set of `images` images; no warm-up: the model is already trained."""
    return replace(recipe_of(settings, images), warmup=0.0)
