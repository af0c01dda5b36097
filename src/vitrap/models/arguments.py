"""The arguments of a timm network that a spec may override, and refusing the others before anything is built."""

import inspect
import sys
from typing import Any

import timm
from timm.models import build_model_with_cfg
from torch import nn

from vitrap.errors import UserError, unknown
from vitrap.models.families import family_of, patch_side

DECIDED = {"self", "cfg", "num_classes", "in_chans", "device", "dtype"}
"""Arguments that the data or the network's name decide."""
FACTORY = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
FACTORY |= {"features_only", "out_indices", "feature_cls", "pruned"}
"""Arguments of timm's factory itself: sources of weights, and other kinds of model."""
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def timm_module(name: str) -> str:
    """The timm module that a model's name belongs to.

    Raises:
        UserError: timm has no model of that name.
    """
    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models())
    return timm.model_entrypoint(name).__module__


def overridable(name: str) -> set[str]:
    """The arguments that a spec may override, of the classes that `name` may stand for."""
    members = vars(sys.modules[timm_module(name)]).values()
    classes = [c for c in members if inspect.isclass(c) and issubclass(c, nn.Module) and hasattr(c, "reset_classifier")]
    arguments: set[str] = set()
    for network in classes:
        parameters = inspect.signature(network.__init__).parameters.values()
        arguments |= {parameter.name for parameter in parameters if parameter.kind in NAMED}
    return arguments - DECIDED - FACTORY


def refuse_overrides(name: str, size: int, overrides: dict[str, Any]) -> None:
    """Refuse overrides that are no arguments of the network itself, and an image size that does not fit.

    Raises:
        UserError: the name, an override, or the patch size is wrong.
    """
    known = overridable(name)
    for key, value in overrides.items():
        if key not in known:
            raise unknown("key", f"model.{key}", [f"model.{k}" for k in known])
        if key == "img_size" and value != size:
            raise UserError(f"model.img_size = {value!r} is not the images' size {size}; set data.size")
    patch = patch_side(family_of(timm_module(name)), name, overrides)
    if patch is not None:
        _refuse_patch(patch, size)


def refuse_body(name: str, size: int, body: nn.Module) -> None:
    """Refuse a built network that is no classifier, or whose patches leave a border of the images out.

    Raises:
        UserError: the network is one of these.
    """
    if not hasattr(body, "reset_classifier"):
        kind = type(body).__name__
        raise UserError(f"model {name!r} is no classifier ({kind} has no head for classes); choose another model.name")
    project = getattr(getattr(body, "patch_embed", None), "proj", None)
    if isinstance(project, nn.Conv2d) and project.stride == project.kernel_size:
        for side in project.kernel_size:
            _refuse_patch(side, size)


def _refuse_patch(patch: Any, size: int) -> None:
    if not isinstance(patch, int) or isinstance(patch, bool) or patch < 1 or size % patch:
        raise UserError(
            f"patch_size = {patch!r} does not divide the image size {size}; choose a divisor"
            " as model.patch_size, or another data.size"
        )
