"""Seven kinds of network, tiny, at 32 px."""

from typing import Any

import torch

from vitrap.models.classifier import Architecture, Classifier, open_model

SMALL_VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SEVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 12, 16, 20]}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    "cait": ("cait_xxs24_224", {**SMALL_VIT, "depth_token_only": 1}),
    "xcit": ("xcit_nano_12_p8_224", {"embed_dim": 16, "depth": 2, "num_heads": 2, "cls_attn_layers": 1}),
    "deit": ("deit_tiny_patch16_224", SMALL_VIT),
    "vit, registers": ("vit_tiny_patch16_224", {**SMALL_VIT, "reg_tokens": 3}),
}
WITHOUT_ATTENTION = ("resnet", "convnext", "swin", "cait", "xcit")


def opened(kind: str, *, size: int = 32, n_classes: int = 5, seed: int = 0, **start: Any) -> Classifier:
    """One of the seven, its weights a little off their start, so that nothing is zero by chance."""
    name, overrides = SEVEN[kind]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = open_model(Architecture(name, size, n_classes, overrides), **start)
        for weight in model.parameters() if not start else ():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model
