"""What the parts of any network put out, by name or by stage, and without changing the network."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from vitrap.errors import unknown

Key = TypeVar("Key")


@contextmanager
def outputs_of(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """Collect what each of `modules` puts out, at each forward pass, as it is: in its own layout and precision.

    Outputs that are no tensors are passed over.
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
    """As `outputs_of`, of the modules that `names` name, as `model.named_modules()` has them.

    Raises:
        UserError: there is no such module.
    """
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise unknown("layer", name, known)
    return outputs_of({name: known[name] for name in names})


def body_of(model: nn.Module) -> nn.Module:
    """The network inside `model`: what timm built, where it did, else the first part of it that is no mere wrapper."""
    built = next((module for module in model.modules() if hasattr(module, "feature_info")), None)
    if built is not None:
        return built
    while len(parts := [child for child in model.children() if list(child.children())]) == len(list(model.children())):
        if len(parts) != 1:
            break
        model = parts[0]
    return model


def name_of(model: nn.Module) -> str:
    """What to call a network in a message: timm's name and its class, or the class alone."""
    kind = type(getattr(model, "body", model)).__name__
    name = getattr(getattr(model, "architecture", None), "name", "")
    return f"{name} ({kind})" if name else kind


def stage_names(model: nn.Module) -> dict[str, int]:
    """The modules that end the stages of `model`, first to last, and their channels, 0 where these are not known.

    They are those that timm names in its networks' `feature_info`; of any other network, those that it has directly.
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
    """Collect timm's own maps of each stage, `b c gh gw`, of the last forward pass; None where timm has none.

    The network inside `model` goes through timm's `forward_intermediates` and `forward_head` meanwhile, which give the
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

    before = vars(body).get("forward")  # of one around this one
    body.forward = forward
    try:
        yield maps
    finally:
        del body.forward
        if before is not None:
            body.forward = before
