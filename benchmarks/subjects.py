"""What is measured on: smooth random images of 32 x 32 and a small ViT with fresh weights, the same in every part."""

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.compare import Scale
from vitrap.contracts import ImageSet
from vitrap.experiment.plan import Network
from vitrap.models.classifier import Architecture, Classifier

SIZE = 32
CLASSES = 10
NAME = "vit_tiny_patch16_224"


def image_set(n: int, device: str) -> ImageSet:
    """So many images with random labels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 8, 8, generator=generator)
    pixels = (functional.interpolate(coarse, SIZE, mode="bilinear") * 255).round().to(torch.uint8)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return ImageSet(pixels, labels, torch.arange(n), CLASSES, SIZE).to(device)


def images(n: int, device: str) -> Tensor:
    """The same images in [0, 1]."""
    return image_set(n, device).pixels.float() / 255


def network(scale: Scale) -> Classifier:
    """The ViT, as it is before training."""
    model = Network(Architecture(NAME, SIZE, CLASSES, dict(scale.network))).build(0, scale.device)
    assert isinstance(model, Classifier)
    return model


def surrogate(scale: Scale) -> Classifier:
    """The ViT as a run hands it to an attack: ready and frozen."""
    return network(scale).eval().requires_grad_(False)
