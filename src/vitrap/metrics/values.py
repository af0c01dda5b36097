"""The values that measures return, as a record keeps them. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A number of images."""


@dataclass(frozen=True)
class Rate:
    """A share of `n` cases with its 95 % Wilson interval. Without cases it is 0 in [0, 1]."""

    value: Share
    low: Share
    high: Share
    n: Count


@dataclass(frozen=True)
class Centre:
    """Mean and median of a sample."""

    mean: float
    median: float


@dataclass(frozen=True)
class Auroc:
    """The area under the ROC curve with its 95 % interval. Without triggered or clean scores it is 0.5 in [0, 1]."""

    value: Share
    low: Share
    high: Share
    n_triggered: Count
    n_clean: Count


@dataclass(frozen=True)
class Stealth:
    """Distances between clean and triggered images, as mean and median over `n` images.

    Attributes:
        psnr_db: peak signal-to-noise ratio, capped at 100 dB.
        ssim: structural similarity, 11 x 11 Gaussian window, sigma 1.5, range 1 (torchmetrics' convention).
        linf: greatest change of a channel, in 1/255.
        l1: mean change of a channel, in 1/255.
        lpips: perceptual distance (AlexNet); None where its weights are not at hand or the images are too small.
        n: images compared.
    """

    psnr_db: Centre
    ssim: Centre
    linf: Centre
    l1: Centre
    lpips: Centre | None
    n: Count


@dataclass(frozen=True)
class Measures:
    """What is measured of a victim and its clean twin on the whole test set.

    Attributes:
        cda: clean data accuracy of the victim.
        asr: its attack success rate.
        ra: its robust accuracy: triggered images that it still classifies rightly.
        asr_clean_model: the clean twin's ASR, the base rate.
        cda_clean_model: the clean twin's CDA.
        stealth: how far triggered test images are from clean ones.
        stealth_stored: how far poisoned training images are, where they carry another trigger than test images.
        asr_clean_images: the victim's ASR without the trigger, on the same images; None in older records.
        majority: share of the test images in their most frequent class, the CDA of a model that puts everything in that
            one; None in older records.
    """

    cda: Rate
    asr: Rate
    ra: Rate
    asr_clean_model: Rate
    cda_clean_model: Rate
    stealth: Stealth
    stealth_stored: Stealth | None = field(default=None, metadata={"optional": True})
    asr_clean_images: Rate | None = field(default=None, metadata={"optional": True})
    majority: Share | None = field(default=None, metadata={"optional": True})


@dataclass(frozen=True)
class Rates:
    """CDA, ASR and RA of one model."""

    cda: Rate
    asr: Rate
    ra: Rate
