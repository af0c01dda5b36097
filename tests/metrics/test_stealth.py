"""Stealth against scikit-image, torchmetrics and by hand.

SSIM: scikit-image leaves out a border of 5 px, torchmetrics and we mirror the image there. Given an image that carries
its mirrored border, scikit-image yields ours to the fifth digit; given the bare image, it differs in the second or
third digit at 32 px, less the larger the image.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vitrap.metrics.stealth import lpips, psnr, ssim, stealth
from vitrap.tensors.pixels import round8, to_bytes


@pytest.fixture(autouse=True)
def _no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))


def pair(side: int, strength: float = 0.1, n: int = 3) -> tuple[Tensor, Tensor]:
    """Images of low and high frequencies and the same with noise, in 8 bits."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    clean = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    clean = clean + 0.1 * torch.randn(n, 3, side, side, generator=generator)
    noisy = clean + strength * torch.randn(n, 3, side, side, generator=generator)
    return round8(clean.clamp(0, 1)), round8(noisy.clamp(0, 1))


def by_scikit_image(clean: Tensor, triggered: Tensor, border: int = 0) -> list[float]:
    """SSIM as scikit-image has it, of images with a mirrored `border`."""

    def bordered(x: Tensor) -> np.ndarray:
        return np.pad(x.double().numpy(), [(0, 0), (border, border), (border, border)], mode="reflect")

    return [
        structural_similarity(
            bordered(c),
            bordered(t),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=0,
        )
        for c, t in zip(clean, triggered, strict=True)
    ]


@pytest.mark.parametrize("strength", [0.01, 0.05, 0.3])
def test_psnr_is_scikit_images(strength: float) -> None:
    clean, noisy = pair(24, strength)
    wanted = [peak_signal_noise_ratio(c.numpy(), t.numpy(), data_range=1) for c, t in zip(clean, noisy, strict=True)]
    assert psnr(clean, noisy).tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("side", [6, 7, 8, 10, 11, 16, 33])
@pytest.mark.parametrize("strength", [0.02, 0.1, 0.3])
def test_ssim_is_scikit_images_with_mirrored_borders(side: int, strength: float) -> None:
    clean, noisy = pair(side, strength)
    assert ssim(clean, noisy).tolist() == pytest.approx(by_scikit_image(clean, noisy, border=5), abs=1e-4)


@pytest.mark.parametrize(("side", "tolerance"), [(32, 0.01), (64, 0.005), (128, 0.003)])
def test_ssim_is_scikit_images_up_to_its_border(side: int, tolerance: float) -> None:
    clean, noisy = pair(side, 0.03)
    assert ssim(clean, noisy).tolist() == pytest.approx(by_scikit_image(clean, noisy), abs=tolerance)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 16])
def test_ssim_ranges_to_1_at_every_size(side: int) -> None:
    clean, noisy = pair(side, 0.3)
    assert ssim(clean, clean).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert (ssim(clean, noisy) < 1 - 1e-4).all()
    torch.testing.assert_close(ssim(clean, noisy), ssim(noisy, clean), atol=1e-5, rtol=0)


def test_an_untouched_image_is_100_db_away() -> None:
    clean, _ = pair(16)
    found = stealth(to_bytes(clean), to_bytes(clean))
    assert (found.psnr_db.mean, found.psnr_db.median) == (100.0, 100.0)
    assert (found.ssim.mean, found.linf.mean, found.l1.mean) == (pytest.approx(1.0), 0.0, 0.0)


def test_distances_are_in_8_bit_steps() -> None:
    clean = torch.full((3, 3, 8, 8), 100 / 255)
    triggered = clean.clone()
    triggered[0, :, 0, 0] += 64 / 255  # one of 64 pixels
    triggered[1] -= 10 / 255
    triggered[2, 0, :4] += 20 / 255  # half a channel of three
    found = stealth(to_bytes(clean), to_bytes(triggered))
    assert (found.linf.mean, found.linf.median) == pytest.approx(((64 + 10 + 20) / 3, 20), abs=1e-3)
    assert (found.l1.mean, found.l1.median) == pytest.approx(((1 + 10 + 20 / 6) / 3, 20 / 6), abs=1e-3)
    by_hand = [-10 * np.log10(mse / 255**2) for mse in (64**2 / 64, 10**2, 20**2 / 6)]
    assert (found.psnr_db.mean, found.psnr_db.median) == pytest.approx((np.mean(by_hand), np.median(by_hand)), abs=1e-3)


def test_the_batch_size_is_no_matter() -> None:
    clean, noisy = map(to_bytes, pair(16, n=7))
    whole, by_three = stealth(clean, noisy), stealth(clean, noisy, batch_size=3)
    for name in ("psnr_db", "ssim", "linf", "l1"):
        one, other = getattr(whole, name), getattr(by_three, name)
        assert (one.mean, one.median) == pytest.approx((other.mean, other.median), abs=1e-5)


def test_large_images_are_compared_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr("vitrap.metrics.stealth.psnr", lambda c, t: sizes.append(len(c)) or psnr(c, t))
    for side, n in ((16, 7), (300, 13)):
        stealth(*map(to_bytes, pair(side, n=n)))
    assert sizes == [7, 4, 4, 4, 1]


def test_without_weights_there_is_no_lpips() -> None:
    clean, noisy = pair(16)
    assert lpips(clean, noisy) is None
    assert stealth(to_bytes(clean), to_bytes(noisy)).lpips is None


def test_lpips_never_runs_what_a_file_holds(tmp_path: Path) -> None:
    """A file in AlexNet's place that would run code when unpickled is refused, and nothing runs."""
    (tmp_path / "checkpoints").mkdir()
    marker = tmp_path / "ran"
    torch.save(Harmful(str(marker)), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Exception, match=r"[Ww]eights.only|hash"):
        lpips(images, images)
    assert not marker.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


class Harmful:
    """What runs code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 8), (5, 5), (3, 4), (32, 20), (97, 64)])
def test_ssim_is_torchmetrics(height: int, width: int) -> None:
    clean, noisy = (images[..., :height, :width] for images in pair(max(height, width, 6), 0.1))
    sigma = min(1.5, (min(height, width) - 0.6) / 3.5)
    wanted = structural_similarity_index_measure(noisy, clean, sigma=sigma, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(clean, noisy), wanted, atol=2e-6, rtol=0)
