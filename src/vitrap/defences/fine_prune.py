"""Fine-pruning: remove the neurons that sleep on clean images, then fine-tune what is left.

Liu, Dolan-Gavitt, Garg: "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018,
https://arxiv.org/abs/1805.12185; code (Caffe): kangliucn/Fine-pruning-defense.

A trigger wakes neurons that clean images leave asleep; and fine-tuning on clean images alone would leave those as they
are. So:

    1. the mean activation of each neuron of one late layer over the clean images (and over places, where it has many)
    2. neurons are pruned in the order of their mean activation, the least first, a few at a time, until the accuracy
       on the clean images has fallen too far; the last step is taken back
    3. the pruned network is fine-tuned on the clean images; pruned neurons stay pruned

Re-derived for ViTs: the paper prunes the last convolution, in front of ReLUs. Here a neuron is an input of a linear
layer, and it is pruned by setting the weights that read it to 0: an input of the head ("head", as BackdoorBench has it,
https://github.com/SCLBD/BackdoorBench), or a hidden neuron of the last block's MLP ("mlp"), which stands behind an
activation function as the paper's neurons do. Behind LayerNorm or GELU activations have both signs, and a neuron that
is always far below 0 does not sleep: so the mean is of absolute activations, which behind ReLU is the same;
measure = "signed" is BackdoorBench's. The settings of steps 2 and 3 are BackdoorBench's, too; the paper's own were not
found, and its code prunes a fixed 48 of 60 channels.

What others' ports do: BackdoorBench's runs on ViTs, at the input of the head. It measures the accuracy of step 2 on the
test set; it prunes one neuron fewer than it counts; and since it keeps no copy, it fine-tunes the network that has
already fallen too far.

What differs from it beside that:

    - the accuracy is that on the clean images, which is all that a defender has
    - step 3 is `fine_tune`'s: the learning rate falls after each step, only matrices decay, the model stays in
      evaluation mode, and crops and flips are off by default
    - of two heads (distilled networks), the first is pruned
"""

import copy
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrap.contracts import Batch, Card, OutcomeKind, Repaired, Suspect
from vitrap.errors import UserError
from vitrap.models.batched import BATCH
from vitrap.models.layers import name_of
from vitrap.models.observe import head_layer, transformer
from vitrap.params import DefaultFrom, hyperparameters, param
from vitrap.train.loop import Learner, Terms
from vitrap.train.tuning import Tuning, recipe_of, streams_of, tune

SGD_RATE = 0.01
"""SGD's default learning rate: BackdoorBench's."""
ADAMW_RATE = 1e-4
"""AdamW's default learning rate, ours: that of `fine_tune`."""


@hyperparameters
class FinePrune:
    """The defence: the hyper-parameters of fine-pruning."""

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

    layer: Literal["head", "mlp"] = param(
        "head", "which neurons are pruned: the inputs of the head, or the hidden neurons of the last MLP",
        source="field",
    )  # fmt: skip
    measure: Literal["absolute", "signed"] = param(
        "absolute", "what a mean activation is of; behind ReLU they are the same", source="assumed"
    )
    pace: float = param(
        0.01, "share of the neurons that is pruned at a time", source="field", low=0, high=1, open="low"
    )
    drop: float = param(
        0.1, "pruning ends where the accuracy has fallen by this share", source="field", low=0, high=1, open="low"
    )
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

    @property
    def needs_attention(self) -> bool:
        """Only a plain ViT is known to have a last MLP."""
        return self.layer == "mlp"

    def apply(self, suspect: Suspect) -> Repaired:
        """Prune a copy of the model, and fine-tune it.

        Raises:
            UserError: the model lacks the layer, or the training diverges.
        """
        model = copy.deepcopy(suspect.model)
        name, reader = reader_of(model, self.layer)
        # Step 1: which neurons sleep.
        order = mean_activations(suspect, model, reader, self.measure).argsort(stable=True)
        # Step 2: prune these, as long as the accuracy lasts.
        before = accuracy(suspect, model)
        pruned = prune(suspect, model, reader, order, self)
        after = accuracy(suspect, model)

        # Step 3: fine-tune the others.
        def step(learner: Learner, batch: Batch) -> Terms:
            return step_without(learner, batch, reader.get_parameter("weight"), pruned)

        # No warm-up: the model is already trained.
        recipe = replace(recipe_of(self, len(suspect.clean)), warmup=0.0)
        streams = streams_of(suspect.generator, suspect.clean.device)
        tuned = tune(suspect, Tuning("fine_prune", recipe, streams, step=step, model=model))
        report = {
            "pruned neurons": len(pruned),
            "neurons": len(order),
            "clean accuracy": before,
            "clean accuracy, pruned": after,
            **tuned.last(),
            "lr": self.lr,
        }
        return Repaired(tuned.model, f"input of {name}", report)


def reader_of(model: nn.Module, layer: str) -> tuple[str, nn.Linear]:
    """The name of the linear layer whose inputs are the neurons, and that layer.

    Raises:
        UserError: the model has no such layer.
    """
    if layer == "head":
        return head_layer(model)
    last: Any = transformer(model).blocks[-1]
    reader = getattr(getattr(last, "mlp", None), "fc2", None)
    if not isinstance(reader, nn.Linear):
        raise UserError(
            f"model {name_of(model)} has no MLP whose second layer is linear in its last block;"
            ' set fine_prune\'s layer = "head"'
        )
    return next(name for name, module in model.named_modules() if module is reader), reader


@torch.no_grad()
def mean_activations(suspect: Suspect, model: nn.Module, reader: nn.Linear, measure: str) -> Float[Tensor, " neurons"]:
    """Step 1: the mean of each input of `reader` over the clean images and over all places of an image."""
    sums: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        seen = args[0].float().abs() if measure == "absolute" else args[0].float()
        sums.append(seen.flatten(1, -2).mean(1).sum(0) if seen.ndim > 2 else seen.sum(0))

    hook = reader.register_forward_pre_hook(keep)
    try:
        accuracy(suspect, model)
    finally:
        hook.remove()
    return torch.stack(sums).sum(0) / len(suspect.clean)


@torch.no_grad()
def accuracy(suspect: Suspect, model: nn.Module) -> float:
    """The share of the clean images that `model` classifies correctly, computing as the suspect does."""
    clean = suspect.clean
    with suspect.compute(model, clean.device):
        predicted = [model(clean.images(rows)).argmax(1) for rows in clean.row_batches(BATCH)]
    return (torch.cat(predicted) == clean.labels).double().mean().item()


@torch.no_grad()
def prune(
    suspect: Suspect, model: nn.Module, reader: nn.Linear, order: Int64[Tensor, " neurons"], settings: FinePrune
) -> Int64[Tensor, " pruned"]:
    """Step 2: set the weights of `reader` for the first neurons of `order` to 0, as many as the accuracy allows.

    At least one neuron stays. Returns the pruned neurons.
    """
    whole = reader.weight.clone()
    before = accuracy(suspect, model)
    pace = max(1, round(settings.pace * len(order)))
    allowed = 0
    for count in range(pace, len(order), pace):
        reader.weight[:, order[allowed:count]] = 0
        if before - accuracy(suspect, model) >= settings.drop * before:
            reader.weight[:, order[allowed:count]] = whole[:, order[allowed:count]]
            break
        allowed = count
    return order[:allowed]


def step_without(learner: Learner, batch: Batch, weight: nn.Parameter, pruned: Int64[Tensor, " pruned"]) -> Terms:
    """Step 3: one step of the training in which the weights of pruned neurons, which are 0, get no gradient."""
    terms = learner.terms(batch)
    learner.backward(terms)
    assert weight.grad is not None
    weight.grad.index_fill_(1, pruned, 0.0)
    learner.step()
    return terms
