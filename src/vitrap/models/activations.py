"""The activations of any network: stage outputs, features and logits, from one forward pass.

In networks of timm's, the stages are those that `forward_intermediates` returns, named after `feature_info`, and the
layer that gives the logits is the one that `get_classifier` returns. In any other network, the stages are its direct
children, and the layer is its last linear layer.
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
    """The activations of a network on a batch, in fp32.

    Attributes:
        stages: the output of each stage by its module's name, first to last: a feature map `b c gh gw` where it is one
            (without prefix tokens), else the stage's raw output.
        features: the input of the layer that gives the logits.
        logits: one for each class.
    """

    stages: Mapping[str, Tensor]
    features: Float[Tensor, "b dim"]
    logits: Float[Tensor, "b k"]


def activations(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Activations:
    """The activations of `model` on `images`; gradients flow where they are switched on.

    Raises:
        UserError: the network has no layer that gives logits.
    """
    parts = dict(model.named_modules())
    layout = layout_of(model)
    names = list(stage_names(model))
    features: list[Tensor] = []
    hook = logit_layer(model).register_forward_pre_hook(lambda module, args: features.append(args[0]))
    try:
        with intermediates_of(model) as timm_maps, outputs_of({name: parts[name] for name in names}) as raw:
            logits = model(images)
    finally:
        hook.remove()
    if timm_maps is not None:
        # timm lays its own maps out; some networks return other stages than `feature_info` names.
        if len(names) != len(timm_maps):
            names = [f"stage {i}" for i in range(len(timm_maps))]
        stages = dict(zip(names, timm_maps, strict=True))
    else:
        maps = {name: layout.as_map(output) for name, output in raw.items()}
        stages = {name: raw[name] if found is None else found for name, found in maps.items()}
    stages = {name: stage.float() for name, stage in stages.items()}
    return Activations(stages, features[-1].flatten(1).float(), logits.float())


def logit_layer(model: nn.Module) -> nn.Module:
    """The layer that gives the logits: timm's own, the first of two in a distilled network, or the last linear layer.

    For a defence that looks at stages, features and logits together: see `activations`.

    Raises:
        UserError: the network has no such layer.
    """
    body: Any = body_of(model)
    found = body.get_classifier() if hasattr(body, "get_classifier") else None
    found = found[0] if isinstance(found, tuple) else found
    return found if isinstance(found, nn.Linear | nn.Conv2d) else head_layer(model)[1]
