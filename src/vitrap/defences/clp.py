"""CLP: switch off the channels that are by far the most sensitive of their layer; no image is looked at.

Zheng, Tang, Li, Liu: "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022,
https://arxiv.org/abs/2208.03111; code: rkteddy/channel-Lipschitzness-based-pruning.

A trigger is a small change of the image and a large change of the logits, so some channel on its way must be sensitive.
A repair that needs the weights alone:

    1. UCLC, an upper bound of a channel's Lipschitz constant within its layer: the spectral norm of its weights, input
       channels x places, times what normalisation multiplies it by
    2. in each layer, channels are pruned whose bound is above mean + u * standard deviation of the layer's bounds:
       their weights and their bias are set to 0

Re-derived for ViTs. A channel is an output of a linear layer, and as it has one place, its spectral norm is the length
of its row of weights. BatchNorm stands behind a convolution and multiplies a channel by gamma / sigma, as in the paper.
LayerNorm stands before a linear layer: its gamma multiplies the columns of the row, and its 1 / sigma, which changes
from token to token and so cannot be known without data, is the same for all channels of the layer; the rule of step 2
compares channels of one layer, and there it cancels out. Which layer normalisation feeds which layer is seen in one
forward pass of a grey image.

Left alone are the rows of queries, keys and values, since attention by scalar products has no finite Lipschitz constant
(Kim, Papamakarios, Mnih, https://arxiv.org/abs/2006.04710), and those of the head, which are classes. A hidden neuron
of an MLP whose row is 0 gives 0, as a pruned channel does behind ReLU; a row of an output projection is what that
branch adds to one channel of the residual stream.

What others' ports do: BackdoorBench's (https://github.com/SCLBD/BackdoorBench, defense/clp.py at f02e353) looks at
BatchNorm alone, and a ViT has none: it changes 0 of the 152 tensors of a ViT-B/16, at every u. Its figures for CLP on
ViTs are those of the model as it was.

What to expect: a backdoor that a small ViT learns from BadNets' white patch (the tests' planted case) hangs on no
outlying channel: from u = 3 to 0.5, the ASR stays 1 while clean accuracy falls to 0.14. What it finds is a backdoor in
one or a few channels.

What differs from the code:

    - it prunes a convolution only where BatchNorm is the next module; here one without is pruned, too, by its own rows
    - sigma has BatchNorm's epsilon in it, as in the forward pass
    - LayerScale, which multiplies channels behind some output projections, is not counted
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrap.contracts import Card, OutcomeKind, Repaired, Suspect
from vitrap.errors import UserError
from vitrap.models.activations import logit_layer
from vitrap.models.layers import name_of
from vitrap.params import hyperparameters, param

LAYERS = (nn.Linear, nn.Conv2d)
"""Layers that have channels."""
UNBOUNDED = ("qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj")
"""What timm calls the layers of queries, keys and values."""
SECOND_HEAD = "head_dist"
"""What timm calls the head of a distillation token."""


@hyperparameters
class Clp:
    """The defence: CLP's only hyper-parameter."""

    card: ClassVar[Card] = Card(
        "Data-free Backdoor Removal based on Channel Lipschitzness", "Zheng, Tang, Li, Liu", "ECCV", 2022, "2208.03111"
    )
    version: ClassVar[int] = 1
    kind: ClassVar[OutcomeKind] = "repair"
    needs_train: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    u: float = param(
        3.0, "standard deviations above the mean of its layer from which a channel is pruned", source="code", low=0
    )

    def apply(self, suspect: Suspect) -> Repaired:
        """Prune the outlying channels of a copy.

        Raises:
            UserError: the model has no layer of channels beside its head.
        """
        model = copy.deepcopy(suspect.model).requires_grad_(False)
        layers = normalised_layers(suspect, model)
        pruned: dict[str, int] = {}
        for layer in layers:
            # Step 1: an upper bound of each channel's Lipschitz constant.
            bounds = channel_bounds(layer)
            # Step 2: switch off those that are far above the others.
            outlying = outliers(bounds, self.u)
            switch_off(layer, outlying)
            pruned[layer.name] = int(outlying.sum())
        report = {
            "pruned channels": sum(pruned.values()),
            "channels": sum(len(layer.module.weight) for layer in layers),
            "layers": len(layers),
        }
        return Repaired(model, ", ".join(name for name, count in pruned.items() if count), report)


@dataclass(frozen=True)
class NormalisedLayer:
    """A layer of channels, with the normalisation that reaches it.

    Attributes:
        name: the layer's name in the model.
        module: the layer.
        before: the LayerNorm whose output it reads; None where there is none.
        after: the BatchNorm that reads its output; None where there is none.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    before: nn.LayerNorm | None
    after: nn.BatchNorm2d | None


def normalised_layers(suspect: Suspect, model: nn.Module) -> list[NormalisedLayer]:
    """All layers whose channels have a bound, in the model's order.

    Raises:
        UserError: there is none.
    """
    makers = read_from(suspect, model)
    readers = {maker: reader for reader, maker in makers.items() if isinstance(reader, nn.BatchNorm2d)}
    head = logit_layer(model)
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[-1]
        if isinstance(module, LAYERS) and module is not head and last not in (*UNBOUNDED, SECOND_HEAD):
            before = makers.get(module)
            found.append(
                NormalisedLayer(name, module, before if isinstance(before, nn.LayerNorm) else None, readers.get(module))
            )
    if not found:
        raise UserError(
            f"clp prunes channels of linear and convolutional layers, and model {name_of(model)} has none beside its"
            " head; choose another network or another defence"
        )
    return found


@torch.no_grad()
def read_from(suspect: Suspect, model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For each layer and normalisation that reads the very output of another one, that other one."""
    made: dict[int, tuple[Tensor, nn.Module]] = {}  # the outputs are kept, so that no two have the same id
    found: dict[nn.Module, nn.Module] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args and id(args[0]) in made:
            found[module] = made[id(args[0])][1]
        made[id(output)] = (output, module)

    kinds = (*LAYERS, nn.LayerNorm, nn.BatchNorm2d)
    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, kinds)]
    clean = suspect.clean
    try:
        with suspect.compute(model, clean.device):
            model(torch.full((1, clean.channels, clean.size, clean.size), 0.5, device=clean.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def channel_bounds(layer: NormalisedLayer) -> Float[Tensor, " channels"]:
    """Step 1: UCLC of each channel: the spectral norm of its weights, with normalisation multiplied in.

    >>> layer = nn.Linear(2, 2)
    >>> layer.weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> channel_bounds(NormalisedLayer("", layer, None, None)).tolist()
    [5.0, 1.0]
    """
    weight = layer.module.weight.detach()
    matrices = weight.reshape(*weight.shape[:2], -1)  # one for each channel: input channels x places
    if layer.before is not None and layer.before.elementwise_affine:
        matrices = matrices * layer.before.weight.detach()[:, None]
    # With one place, the spectral norm is the length, which costs less.
    one_place = matrices.shape[-1] == 1
    bounds = matrices.flatten(1).norm(dim=1) if one_place else torch.linalg.matrix_norm(matrices, ord=2)
    if layer.after is None:
        return bounds
    assert layer.after.running_var is not None
    return bounds * (layer.after.weight.detach() / (layer.after.running_var + layer.after.eps).sqrt()).abs()


def outliers(bounds: Float[Tensor, " channels"], u: float) -> Bool[Tensor, " channels"]:
    """Step 2: which channels are above mean + u * standard deviation.

    >>> outliers(torch.tensor([1.0, 1.0, 1.0, 5.0]), 1.0).tolist()
    [False, False, False, True]
    """
    if len(bounds) < 2:
        return torch.zeros_like(bounds, dtype=torch.bool)
    return bounds > bounds.mean() + u * bounds.std()


def switch_off(layer: NormalisedLayer, channels: Bool[Tensor, " channels"]) -> None:
    """Step 2: set some channels of a layer to 0, at the BatchNorm behind it where there is one."""
    module = layer.module if layer.after is None else layer.after
    module.weight.data[channels] = 0
    if module.bias is not None:
        module.bias.data[channels] = 0
