"""The table of network families: what vitrap knows of timm's networks, to open, refuse, observe and list them.

A family is a module of timm's, and its key is that module's name. Networks of any other module can be opened as well,
as `OTHER`. This file imports no torch, so that the command line lists the families at once.
"""

import re
from dataclasses import dataclass
from typing import Any

ATTENTION = "timm.layers.attention:Attention", "timm.layers.attention:AttentionRope"
"""The attention of ViTs and DeiTs, without and with rotary position embeddings."""


@dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
        name: its common name.
        about: its networks, in a few words.
        network: the class of its transformer, as "module:class"; "" where its attention cannot be observed.
        attention: the classes of its plain attention: one softmax over all tokens for each head.
        patch: a pattern that finds the side of a patch in a timm name; "" where images are not cut into patches.
        patch_default: the side of a patch, in pixels, where the name does not tell it.
    """

    name: str
    about: str
    network: str = ""
    attention: tuple[str, ...] = ()
    patch: str = ""
    patch_default: int = 16


VIT = "timm.models.vision_transformer:VisionTransformer"
IN_NAME = r"_patch(\d+)"

FAMILIES = {
    "vision_transformer": Family(
        "vit", "ViT and its variants: class token or average pooling, registers", VIT, ATTENTION, IN_NAME
    ),
    "deit": Family("deit", "DeiT and DeiT III, with and without distillation token", VIT, ATTENTION, IN_NAME),
    "beit": Family("beit", "BEiT, BEiT v2", "timm.models.beit:Beit", ("timm.models.beit:Attention",), IN_NAME),
    "eva": Family("eva", "EVA, EVA-02", "timm.models.eva:Eva", (*ATTENTION, "timm.models.eva:EvaAttention"), IN_NAME),
    "swin_transformer": Family("swin", "Swin: attention in windows (window_size)", patch=IN_NAME, patch_default=4),
    "cait": Family("cait", "CaiT: talking heads, class attention", patch=IN_NAME),
    "xcit": Family("xcit", "XCiT: attention between channels", patch=r"_p(\d+)_"),
    "resnet": Family("resnet", "ResNet, ResNeXt, wide ResNet"),
    "convnext": Family("convnext", "ConvNeXt, ConvNeXt V2"),
}
OTHER = Family("NAME", "any other image classifier of timm's")

PLAIN = tuple(family for family in FAMILIES.values() if family.attention)
"""The families whose token attention can be observed."""


def family_of(module: str) -> Family:
    """The family of a timm module, given its full or its last name."""
    return FAMILIES.get(module.rpartition(".")[-1], OTHER)


def patch_side(family: Family, name: str, overrides: dict[str, Any]) -> Any:
    """The side of a network's patches, from overrides or name; None where it has no patches."""
    if not family.patch:
        return None
    if "patch_size" in overrides:
        return overrides["patch_size"]
    found = re.search(family.patch, name)
    return int(found[1]) if found else family.patch_default


def plain_names() -> str:
    """The names of the families with plain token attention, in words."""
    *most, last = [family.name for family in PLAIN]
    return f"{', '.join(most)} or {last}"


def listed() -> dict[str, str]:
    """A description of each family, by its name."""
    families = (*FAMILIES.values(), OTHER)
    return {f.name: f.about + (" (plain attention)" if f.attention else "") for f in families}
