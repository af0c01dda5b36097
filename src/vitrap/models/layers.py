"""Outputs of the modules and stages of any network, collected by hooks that leave the network as it is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from vitrap.errors import unknown

Key = TypeVar("Key")


@contextmanager
def outputs_of(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """Collect the output of each of `modules` at each forward pass, in its own layout and precision.

    Outputs that are no tensors are left out.
    """
    seen: dict[Key, Tensor] = {}

    def keep(key: Key, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[key] = output

    with ExitStack() as restore:
        for key, module in modules.items():
            restore.callback(module.register_forward_hook(partial(keep, key)).remove)
        yield seen


def layer_outputs(model: nn.Module, names: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
    """Collect the outputs of the modules with these names, as `model.named_modules()` gives them: see `outputs_of`.

    Raises:
        UserError: there is no module of that name.
    """
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise unknown("layer", name, known)
    return outputs_of({name: known[name] for name in names})


def body_of(model: nn.Module) -> nn.Module:
    """The network inside `model`: the one that timm built, or else the first module that does not merely wrap another.

    A module wraps another where its only child has children of its own.
    """
    for module in model.modules():
        if hasattr(module, "feature_info"):
            return module
    while True:
        children = list(model.children())
        if len(children) != 1 or not list(children[0].children()):
            return model
        model = children[0]


def name_of(model: nn.Module) -> str:
    """What messages call a network: timm's name and its class, or the class alone."""
    kind = type(getattr(model, "body", model)).__name__
    name = getattr(getattr(model, "architecture", None), "name", "")
    return f"{name} ({kind})" if name else kind


def stage_names(model: nn.Module) -> dict[str, int]:
    """The names of the modules that end the stages of `model`, first to last, and their channels (0 for unknown).

    In networks of timm's they are those that `feature_info` names; in any other network, its direct children.
    """
    known = {module: name for name, module in model.named_modules()}
    body: Any = body_of(model)
    parts = {name: module for name, module in body.named_modules() if name}
    stages = {stage["module"]: stage["num_chs"] for stage in getattr(body, "feature_info", [])}
    if not stages:
        stages = {name: 0 for name, _ in body.named_children()}
    return {known[parts[name]]: channels for name, channels in stages.items() if name in parts}


@contextmanager
def intermediates_of(model: nn.Module) -> Iterator[list[Tensor] | None]:
    """Collect timm's own feature map of each stage, `b c gh gw`, in the last forward pass; None where it has none.

    Within the block, the network inside `model` runs timm's `forward_intermediates` and `forward_head`, which give the
    same logits as its `forward`: hooks would not know how a family lays out its maps.
    """
    body: Any = body_of(model)
    if not (hasattr(body, "forward_intermediates") and hasattr(body, "forward_head")):
        yield None
        return
    maps: list[Tensor] = []

    def forward(images: Tensor) -> Tensor:
        last, maps[:] = body.forward_intermediates(images)
        return body.forward_head(last)

    before = vars(body).get("forward")  # set by an enclosing block
    body.forward = forward
    try:
        yield maps
    finally:
        del body.forward
        if before is not None:
            body.forward = before
