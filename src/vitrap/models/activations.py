"""What any network makes of images: outputs by stage, features and logits, in one forward pass.

Of timm's networks, stages are what `forward_intermediates` gives, by the names in `feature_info`, and the layer that
gives the logits is `get_classifier`'s. Of any other network, stages are the parts that it has directly, and the layer
is its last linear one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vitrap.models.layers import body_of, intermediates_of, outputs_of, stage_names
from vitrap.models.maps import layout_of
from vitrap.models.observe import head_layer


@dataclass(frozen=True)
class Activations:
    """What a network makes of images, in fp32.

    Attributes:
        stages: each stage's output by its module's name, first to last: a map `b c gh gw` where it is one (prefix
            tokens are left out), else as the stage puts it out.
        features: what the layer that gives the logits reads.
        logits: one a class.
    """

    stages: Mapping[str, Tensor]
    features: Float[Tensor, "b dim"]
    logits: Float[Tensor, "b k"]


def activations(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Activations:
    """One forward pass of `model`, and what is seen in it; gradients flow where they are switched on.

    Raises:
        UserError: the network has no layer that gives logits.
    """
    parts = dict(model.named_modules())
    layout = layout_of(model)
    channels, read = stage_names(model), []
    hook = classifier(model).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        with intermediates_of(model) as timms, outputs_of({name: parts[name] for name in channels}) as seen:
            logits = model(images)
    finally:
        hook.remove()
    if timms is not None:
        names = list(channels) if len(channels) == len(timms) else [f"stage {i}" for i in range(len(timms))]
        stages = dict(zip(names, timms, strict=True))
    else:
        maps = {name: layout.as_map(raw) for name, raw in seen.items()}
        stages = {name: seen[name] if found is None else found for name, found in maps.items()}
    return Activations(
        {name: stage.float() for name, stage in stages.items()}, read[-1].flatten(1).float(), logits.float()
    )


def classifier(model: nn.Module) -> nn.Module:
    """The layer that gives the logits: a timm network's own (of a distilled one's two, the first), or the last linear.

    Raises:
        UserError: there is none.
    """
    body: Any = body_of(model)
    found = body.get_classifier() if hasattr(body, "get_classifier") else None
    found = found[0] if isinstance(found, tuple) else found
    return found if isinstance(found, nn.Linear | nn.Conv2d) else head_layer(model)[1]
