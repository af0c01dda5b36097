"""The feature maps of any network: the last stage with a map of at least some size, and the gradient at it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.models.layers import body_of, intermediates_of, layer_outputs, name_of, stage_names


@dataclass(frozen=True)
class Layout:
    """How a network lays out the outputs of its stages.

    Attributes:
        grid: rows and columns of image tokens; None where the network does not tell.
        prefix: number of prefix tokens; a stage may have fewer.
        last: whether channels are the last dimension of maps.
    """

    grid: tuple[int, int] | None
    prefix: int
    last: bool

    def as_map(self, raw: Tensor, channels: int = 0) -> Float[Tensor, "b c gh gw"] | None:
        """Bring a stage's output, or a gradient at it, to `b c gh gw`; None where it is no map.

        Args:
            raw: `b c h w`, `b h w c`, or `b tokens c` with prefix tokens first.
            channels: number of channels, 0 for unknown.
        """
        if raw.ndim == 4:
            channels_last = self.last or (channels not in (0, raw.shape[1]) and raw.shape[-1] == channels)
            return raw.permute(0, 3, 1, 2) if channels_last else raw
        if raw.ndim != 3:
            return None
        # Tokens are a map where, without some prefix tokens, they fill the network's grid, or else a square.
        n = raw.shape[1]
        known = [(prefix, self.grid) for prefix in range(self.prefix + 1) if self.grid is not None]
        square = [(prefix, (isqrt(n - prefix),) * 2) for prefix in sorted({self.prefix, 0}) if n > prefix]
        for prefix, (rows, columns) in known + square:  # some networks add prefix tokens only after the last stage
            if rows * columns == n - prefix:
                return raw[:, prefix:].mT.unflatten(-1, (rows, columns))
        return None


def layout_of(model: nn.Module) -> Layout:
    """How `model` lays out the outputs of its stages."""
    body: Any = body_of(model)
    grid = getattr(getattr(body, "patch_embed", None), "grid_size", None)
    sides = tuple(grid) if isinstance(grid, tuple | list) and len(grid) == 2 else None
    return Layout(sides, int(getattr(body, "num_prefix_tokens", 0) or 0), getattr(body, "output_fmt", "") == "NHWC")


@dataclass(frozen=True)
class MapLayer:
    """A stage whose output is a map.

    Attributes:
        name: name of the module that ends the stage.
        module: that module.
        layout: how the network lays out the module's output.
        channels: channels of the output, 0 for unknown.
    """

    name: str
    module: nn.Module
    layout: Layout
    channels: int

    def to_map(self, raw: Tensor) -> Float[Tensor, "b c gh gw"]:
        """Bring the module's output, or a gradient at it, to `b c gh gw`, without prefix tokens."""
        found = self.layout.as_map(raw, self.channels)
        assert found is not None, f"{self.name} puts out no map"
        return found


@torch.no_grad()
def last_map(model: nn.Module, image: Float[Tensor, "b c h w"], side: int = 4) -> MapLayer:
    """The last stage of `model` whose output is a feature map of at least `side` x `side`.

    Where timm itself gives the maps of its network, a stage counts only if its output is one of them.

    Args:
        model: a ready model.
        image: one image or more, as the model will see them.
        side: the least number of rows and of columns.

    Raises:
        UserError: no stage has such a map.
    """
    layout = layout_of(model)
    names = stage_names(model)
    modules = dict(model.named_modules())
    with layer_outputs(model, list(names)) as outputs, intermediates_of(model) as timm_maps:
        model(image)
    for name, channels in reversed(names.items()):
        found = layout.as_map(outputs[name], channels) if name in outputs else None
        if found is None or min(found.shape[2:]) < side:
            continue
        # Tokens that fill a grid need not stand in the order of the image: timm's own maps tell.
        if timm_maps is None or any(found.shape == own.shape and torch.equal(found, own) for own in timm_maps):
            return MapLayer(name, modules[name], layout, channels)
    raise UserError(
        f"model {name_of(model)} has no stage with a map of at least {side} x {side} at {image.shape[-1]} px; raise"
        " data.size, or take another network"
    )


@contextmanager
def observe_map(model: nn.Module, layer: MapLayer, *, as_leaf: bool = False) -> Iterator[list[Tensor]]:
    """Collect the output of `layer` at each forward pass; the last pass's is the last.

    Args:
        model: a ready model.
        layer: a stage, from `last_map`.
        as_leaf: whether to cut the graph there: the output becomes a leaf that requires a gradient, and neither the
            layers before it nor any weight records one.

    Yields:
        The outputs, in the graph of their pass; `layer.to_map` makes maps of them and of gradients at them.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_() if as_leaf else output)
        return seen[-1].clone()  # the next layer may write into its input

    with ExitStack() as restore:
        restore.callback(layer.module.register_forward_hook(keep).remove)
        for weight in [w for w in model.parameters() if w.requires_grad and as_leaf]:
            restore.callback(weight.requires_grad_, True)
            weight.requires_grad_(False)
        yield seen
