"""Records as lines of text."""

from collections.abc import Mapping
from typing import Any


def percent(rate: Mapping[str, float]) -> str:
    """A rate with its interval.

    >>> percent({"value": 0.5, "low": 0.25, "high": 0.75, "n": 10})
    '50.00 % [25.00, 75.00]'
    """
    return f"{100 * rate['value']:.2f} % [{100 * rate['low']:.2f}, {100 * rate['high']:.2f}]"


def measures(victim: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (measure, victim, clean twin, number of images) from a record's `victim`."""
    stealth = victim["stealth"]
    rows = [
        ("clean accuracy (CDA)", percent(victim["cda"]), percent(victim["cda_clean_model"]), str(victim["cda"]["n"])),
        ("attack success (ASR)", percent(victim["asr"]), percent(victim["asr_clean_model"]), str(victim["asr"]["n"])),
        ("robust accuracy (RA)", percent(victim["ra"]), "", str(victim["ra"]["n"])),
    ]
    for key, name in (
        ("psnr_db", "PSNR, dB"),
        ("ssim", "SSIM"),
        ("l1", "mean change, 1/255"),
        ("linf", "greatest change, 1/255"),
        ("lpips", "LPIPS"),
    ):
        centre = stealth[key]
        value = "no weights at hand" if centre is None else f"{centre['mean']:.3g} (median {centre['median']:.3g})"
        rows.append((name, value, "", str(stealth["n"])))
    return rows


def verdict(victim: Mapping[str, Any], target_cda_loss: float = 0.02) -> str:
    """One line that says whether the attack took hold, and if not, which failure it looks like.

    The signatures are those of AGEB's paper: a low ASR says that the trigger was not learned, a low CDA that
    clean images suffer, a low PSNR that people would see the trigger.
    """
    effect = victim["asr"]["value"] - victim["asr_clean_model"]["value"]
    loss = victim["cda_clean_model"]["value"] - victim["cda"]["value"]
    faults = []
    if effect < 0.7:
        faults.append(f"the trigger is not embedded well (ASR only {100 * effect:.1f} points above the clean twin's)")
    if loss > target_cda_loss:
        faults.append(f"clean images suffer (CDA {100 * loss:.1f} points under the clean twin's)")
    if victim["stealth"]["psnr_db"]["mean"] < 20:
        faults.append(f"the trigger shows (PSNR {victim['stealth']['psnr_db']['mean']:.1f} dB)")
    return "; ".join(faults) or "the backdoor is in: triggered images go to the target, clean ones as before"
