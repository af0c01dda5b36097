"""Stealth: how much a trigger changes an image, measured on the final 8-bit pixels at working size."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from vitrap.contracts import Images
from vitrap.metrics.interval import centre
from vitrap.metrics.values import Stealth
from vitrap.tensors.pixels import to_unit

PSNR_CAP = 100.0
"""PSNR, in dB, of an image that the trigger does not change, and the greatest that any image gets."""
C1 = 0.01**2
"""Keeps SSIM's luminance quotient finite, for pixels in [0, 1]."""
C2 = 0.03**2
"""Keeps SSIM's structure quotient finite, for pixels in [0, 1]."""
PIXELS_AT_ONCE = 64 * 32 * 32
"""Pixels per batch of image pairs; the measures take up to about 750 bytes for each."""


def psnr(clean: Images, triggered: Images) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each image in dB."""
    error = (clean - triggered).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=PSNR_CAP)


def ssim(clean: Images, triggered: Images) -> Float[Tensor, " b"]:
    """Structural similarity of each image, with a Gaussian window of sigma 1.5 (11 px) and mirrored borders.

    Wang, Bovik, Sheikh, Simoncelli: "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004),
    eq. 13. For sides under 6 px, which mirroring cannot extend far enough, the window shrinks until it fits.
    """
    sigma = min(1.5, (min(clean.shape[-2:]) - 0.6) / 3.5)
    down, across = (_blur(side, sigma).to(clean.device) for side in clean.shape[-2:])

    def local(x: Images) -> Images:
        """The weighted mean around each pixel."""
        return down @ x @ across.mT

    mean = local(clean)
    other = local(triggered)
    variance = (local(clean.square()) - mean.square()).clamp(min=0)
    other_variance = (local(triggered.square()) - other.square()).clamp(min=0)
    covariance = local(clean * triggered) - mean * other
    luminance = (2 * mean * other + C1) / (mean.square() + other.square() + C1)
    structure = (2 * covariance + C2) / (variance + other_variance + C2)
    return (luminance * structure).flatten(1).mean(1)


def _blur(side: int, sigma: float) -> Float[Tensor, "side side"]:
    """The Gaussian window along one side, as a matrix: row i has the weights around pixel i, with mirrored borders.

    A matrix product is several times as fast as a convolution with such a small kernel.
    """
    reach = int(3.5 * sigma + 0.5)
    window = (-(torch.arange(-reach, reach + 1) / sigma).square() / 2).softmax(0)
    mirrored = functional.pad(torch.eye(side)[None], (reach, reach), mode="reflect")[0]
    return (mirrored.unfold(1, 2 * reach + 1, 1) @ window).mT


def lpips_at_hand() -> bool:
    """Whether AlexNet's weights are where torchvision stores them."""
    return any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-owt-*.pth"))


def lpips(clean: Images, triggered: Images) -> Float[Tensor, " b"] | None:
    """Perceptual distance of each image; None where it cannot be measured.

    It needs AlexNet's weights where torchvision stores them: nothing is downloaded, and random weights would give a
    number without meaning. It also needs images of at least 32 pixels a side, for AlexNet's pooling.
    """
    if min(clean.shape[-2:]) < 32 or not lpips_at_hand():
        return None
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    with _weights_only():
        distances = learned_perceptual_image_patch_similarity(
            triggered, clean, net_type="alex", reduction="none", normalize=True
        )
    assert isinstance(distances, Tensor)
    return distances.reshape(len(clean))


@contextmanager
def _weights_only() -> Iterator[None]:
    """Within the block, torch unpickles nothing but tensors; torchvision's own loading would run any code in a file."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def stealth(
    clean: UInt8[Tensor, "n c h w"], triggered: UInt8[Tensor, "n c h w"], batch_size: int | None = None
) -> Stealth:
    """All measures over a set of at least one pair of images.

    Args:
        clean: the images as they are stored.
        triggered: the same images with the trigger.
        batch_size: pairs per batch, None for `PIXELS_AT_ONCE` pixels; it bounds memory, not the result.
    """
    by_image: dict[str, Tensor] = {}
    size = batch_size or max(4, PIXELS_AT_ONCE // (clean.shape[-2] * clean.shape[-1]))
    for rows in torch.arange(len(clean), device=clean.device).split(size):
        for name, values in _distances(to_unit(clean[rows]), to_unit(triggered[rows])).items():
            # Written into one tensor: a list of small ones would fragment the heap.
            by_image.setdefault(name, values.new_empty(len(clean)))[rows] = values
    centres = {name: centre(values) for name, values in by_image.items()}
    return Stealth(**{"lpips": None, **centres}, n=len(clean))


def _distances(clean: Images, triggered: Images) -> dict[str, Float[Tensor, " b"]]:
    """Each measure of each image, without LPIPS where it cannot be measured."""
    change = (clean - triggered).abs().flatten(1) * 255
    perceptual = lpips(clean, triggered)
    return {
        "psnr_db": psnr(clean, triggered),
        "ssim": ssim(clean, triggered),
        "linf": change.amax(1),
        "l1": change.mean(1),
        **({} if perceptual is None else {"lpips": perceptual}),
    }
