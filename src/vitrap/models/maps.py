"""The feature maps of any network: which stage has the last one of some size, and the gradient there."""

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
    """How a network lays out what its stages put out.

    Attributes:
        grid: rows and columns of image tokens, where the network says so.
        prefix: the most tokens that may stand before those of the image.
        last: whether channels come last in maps.
    """

    grid: tuple[int, int] | None
    prefix: int
    last: bool

    def as_map(self, raw: Tensor, channels: int = 0) -> Float[Tensor, "b c gh gw"] | None:
        """An output, or a gradient at it, as a map; None where it is none.

        Args:
            raw: b c h w, b h w c, or b tokens c, prefix tokens first.
            channels: how many there are, 0 for unknown.
        """
        if raw.ndim == 4:
            behind = self.last or (channels not in (0, raw.shape[1]) and raw.shape[-1] == channels)
            return raw.permute(0, 3, 1, 2) if behind else raw
        if raw.ndim != 3:
            return None
        n = raw.shape[1]
        known = [(prefix, self.grid) for prefix in range(self.prefix + 1) if self.grid is not None]
        square = [(prefix, (isqrt(n - prefix),) * 2) for prefix in sorted({self.prefix, 0}) if n > prefix]
        for prefix, (rows, columns) in known + square:  # some networks add prefix tokens only behind the last stage
            if rows * columns == n - prefix:
                return raw[:, prefix:].mT.unflatten(-1, (rows, columns))
        return None


def layout_of(model: nn.Module) -> Layout:
    """How `model` lays out what its stages put out."""
    body: Any = body_of(model)
    grid = getattr(getattr(body, "patch_embed", None), "grid_size", None)
    sides = tuple(grid) if isinstance(grid, tuple | list) and len(grid) == 2 else None
    return Layout(sides, int(getattr(body, "num_prefix_tokens", 0) or 0), getattr(body, "output_fmt", "") == "NHWC")


@dataclass(frozen=True)
class MapLayer:
    """A stage whose output is a map.

    Attributes:
        name: of its module.
        module: the module.
        layout: how it lays out its output.
        channels: of its output, 0 where they are not known.
    """

    name: str
    module: nn.Module
    layout: Layout
    channels: int

    def to_map(self, raw: Tensor) -> Float[Tensor, "b c gh gw"]:
        """The module's output, or a gradient at it, as a map; prefix tokens are left out."""
        found = self.layout.as_map(raw, self.channels)
        assert found is not None, f"{self.name} puts out no map"
        return found


@torch.no_grad()
def last_map(model: nn.Module, image: Float[Tensor, "b c h w"], side: int = 4) -> MapLayer:
    """The last stage of `model` whose output is a map of at least `side` x `side`.

    Where timm says itself what its network's maps are, a stage counts only if its output is one of them.

    Args:
        model: a ready model.
        image: one image or more, as the model will see them.
        side: the least rows and columns.

    Raises:
        UserError: no stage puts out such a map.
    """
    layout = layout_of(model)
    names = stage_names(model)
    modules = dict(model.named_modules())
    with layer_outputs(model, list(names)) as seen, intermediates_of(model) as timms:
        model(image)
    for name, channels in reversed(names.items()):
        found = layout.as_map(seen[name], channels) if name in seen else None
        if found is None or min(found.shape[2:]) < side:
            continue
        if timms is None or any(found.shape == own.shape and torch.equal(found, own) for own in timms):
            return MapLayer(name, modules[name], layout, channels)
    raise UserError(
        f"model {name_of(model)} has no stage with a map of at least {side} x {side} at {image.shape[-1]} px; raise"
        " data.size, or take another network"
    )


@contextmanager
def observe_map(model: nn.Module, layer: MapLayer, *, as_leaf: bool = False) -> Iterator[list[Tensor]]:
    """Collect what `layer` puts out, as it is: the last forward pass's stands last.

    Args:
        model: a ready model.
        layer: from `last_map`.
        as_leaf: cut the graph there: the output becomes a leaf that requires a gradient, and nothing before it or
            beside it (the weights, which it freezes) records one.

    Yields:
        outputs of the layer, in the graph of the pass; `layer.to_map` makes maps of them and of gradients at them.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_() if as_leaf else output)
        return seen[-1].clone()  # what follows may write into it

    with ExitStack() as restore:
        restore.callback(layer.module.register_forward_hook(keep).remove)
        for weight in [w for w in model.parameters() if w.requires_grad and as_leaf]:
            restore.callback(weight.requires_grad_, True)
            weight.requires_grad_(False)
        yield seen
