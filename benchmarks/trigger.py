"""AGEB's trigger over one pass of the same surrogate through the same images.

The attention route stops its gradient at the last attention, so it should cost little more than a forward pass; the
pixel route should cost little more than a forward and a backward pass to the pixels. The passes are timm's own, with
fused attention.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.compare import Figure, Scale, in_turns
from benchmarks.subjects import images, surrogate
from vitrap.attacks.ageb import Ageb, Erosion

BATCH = 256
FORWARD, BOTH = 1.3, 1.2
SHARE = 5
"""A fifth of the scale's images is enough here."""


def figures(scale: Scale) -> Iterator[Figure]:
    """The attention route over a forward pass, the pixel route over forward and backward."""
    model = surrogate(scale)
    batches = images(max(1, scale.images // SHARE), scale.device).split(BATCH)
    note = f"{sum(map(len, batches))} images, " + ", ".join(f"{k} {v}" for k, v in scale.network)
    cases: list[tuple[str, Ageb, Callable[[nn.Module, Tensor], Tensor], float]] = [
        ("attention route over a forward pass", Ageb(), forward, FORWARD),
        ("pixel route over forward and backward", Ageb(route="pixel"), forward_backward, BOTH),
    ]
    for name, attack, passes, wanted in cases:
        trigger = Erosion(model, attack)

        def ours(trigger: Erosion = trigger) -> list[Tensor]:
            with torch.no_grad():
                return [trigger(x) for x in batches]

        def plain(passes: Callable[[nn.Module, Tensor], Tensor] = passes) -> list[Tensor]:
            return [passes(model, x) for x in batches]

        times = in_turns(ours, plain, scale)
        yield Figure("trigger", name, *times, at_most=wanted, note=note)


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    """Logits."""
    return model(x)


def forward_backward(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient at the pixels of the loss on the model's own prediction."""
    x = x.detach().requires_grad_()
    logits = model(x)
    loss = functional.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
    return torch.autograd.grad(loss, x)[0]
