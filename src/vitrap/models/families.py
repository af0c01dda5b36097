"""The table of network families: what vitrap knows of timm's, for opening, refusing, observing and listing.

A family is a module of timm's, under that module's name. A family that does not stand here is opened all the same, as
`OTHER` has it. This file imports no torch, so that the command line can list the families at once.
"""

import re
from dataclasses import dataclass
from typing import Any

ATTENTION = "timm.layers.attention:Attention", "timm.layers.attention:AttentionRope"
"""The attention of ViTs and DeiTs, without and with rotary position embeddings."""


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Attributes:
        name: what people call it.
        about: which networks it has, in a few words.
        network: the class with token attention, as "module:class"; "" where attention is not seen.
        attention: the classes of its blocks' attention that is plain: one softmax over all tokens for each head.
        patch: a pattern that finds the side of a patch in a timm name; "" where images are not cut into patches.
        patch_default: the side of a patch where the name does not say it, in pixels.
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
        "vit", "ViT and its kin: class token or average pooling, registers", VIT, ATTENTION, IN_NAME
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
"""Families whose token attention can be looked at."""


def family_of(module: str) -> Family:
    """The family of a timm module, by its full or its last name."""
    return FAMILIES.get(module.rpartition(".")[-1], OTHER)


def patch_side(family: Family, name: str, overrides: dict[str, Any]) -> Any:
    """The side of the patches of a network, as far as overrides and name say it; None where it has none."""
    if not family.patch:
        return None
    found = re.search(family.patch, name)
    return overrides.get("patch_size", int(found[1]) if found else family.patch_default)


def plain_names() -> str:
    """The names of families with plain token attention, in words."""
    *most, last = [family.name for family in PLAIN]
    return f"{', '.join(most)} or {last}"


def listed() -> dict[str, str]:
    """The name of each family, and which networks it has."""
    return {f.name: f.about + (" (plain attention)" if f.attention else "") for f in (*FAMILIES.values(), OTHER)}
