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

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrap.contracts import Card, Images, OutcomeKind, Repaired, Suspect
from vitrap.errors import UserError
from vitrap.params import check, param
from vitrap.train.loop import Streams, train
from vitrap.train.recipe import Recipe

SGD_RATE = 0.01
"""Of BackdoorBench's `ft`."""
ADAMW_RATE = 1e-4
"""Ours: a tenth of what vitrap's recipes train a ViT with. No attack was looked at to choose it."""


@dataclass(frozen=True)
class FineTune:
    """The settings of BackdoorBench, and a second optimiser."""

    card: ClassVar[Card] = Card(
        "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
        "Liu, Dolan-Gavitt, Garg",
        "RAID",
        2018,
        "1805.12185",
    )
    kind: ClassVar[OutcomeKind] = "repair"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    optimizer: Literal["sgd", "adamw"] = param(
        "sgd", "what makes steps of gradients; sgd has momentum 0.9", stands="field", choices=("sgd", "adamw")
    )
    lr: float = param(
        None, f"peak learning rate (sgd: {SGD_RATE:g}; adamw, ours: {ADAMW_RATE:g})", stands="field", low=0, open=True
    )
    epochs: int = param(100, "passes over the clean images", stands="field", low=1)
    batch_size: int = param(256, "images a step, at most all there are", stands="field", low=1)
    weight_decay: float = param(5e-4, "decay of weight matrices", stands="field", low=0)
    clip: float = param(0.0, "greatest norm of the gradient; 0 for no limit", stands="field", low=0)
    crop: int = param(0, "random crop after padding by so many pixels; 0 for none", unit="px", low=0)
    flip: bool = param(False, "flip half of the images")

    def __post_init__(self) -> None:
        """Fill in the optimiser's own rate and refuse values out of range."""
        if self.lr is None:
            object.__setattr__(self, "lr", SGD_RATE if self.optimizer == "sgd" else ADAMW_RATE)
        check(self)

    @torch.enable_grad()
    def apply(self, suspect: Suspect) -> Repaired:
        """Train a copy on the clean images.

        Raises:
            UserError: the training diverges.
        """
        model = copy.deepcopy(suspect.model).requires_grad_(True)
        streams = streams_of(suspect.generator, suspect.clean.device)
        try:
            curves = train(Steady(model), suspect.clean, self.recipe(suspect), streams)
        except UserError as error:
            raise UserError(f"fine_tune diverged; lower its lr = {self.lr:g}") from error
        model.zero_grad(set_to_none=True)
        last = {name: curve[-1] for name, curve in curves.items()}
        return Repaired(model.eval().requires_grad_(False), report={**last, "lr": self.lr})

    def recipe(self, suspect: Suspect) -> Recipe:
        """How the copy is trained; in bf16 where the caller computes so."""
        bf16 = torch.is_autocast_enabled(suspect.clean.device.type)
        return Recipe(
            epochs=self.epochs,
            batch_size=min(self.batch_size, len(suspect.clean)),
            optimizer=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup=0.0,
            clip=self.clip,
            crop=self.crop,
            flip=self.flip,
            precision="bf16" if bf16 else "fp32",
        )


class Steady(nn.Module):
    """A model that stays in evaluation mode while it is trained, so that nothing draws from torch's random state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def train(self, mode: bool = True) -> "Steady":
        """Change nothing."""
        return self

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        """The model's logits; weights that a caller's autocast still holds from the last step are dropped."""
        torch.clear_autocast_cache()
        return self.model(images)


def streams_of(generator: torch.Generator, device: torch.device) -> Streams:
    """The streams of a training, each with a seed drawn from the defender's own."""
    order, augmentation, projection = torch.randint(2**62, (3,), generator=generator).tolist()
    return Streams(
        torch.Generator().manual_seed(order),
        torch.Generator(device).manual_seed(augmentation),
        torch.Generator().manual_seed(projection),
    )
