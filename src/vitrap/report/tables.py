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
    if "stealth_stored" in victim:
        centre, n = victim["stealth_stored"]["psnr_db"], victim["stealth_stored"]["n"]
        rows.append(("PSNR of stored poison, dB", f"{centre['mean']:.3g} (median {centre['median']:.3g})", "", str(n)))
    return rows


def measured_on(spec: Mapping[str, Any]) -> str:
    """Which images a record's figures are of: those of the test set, or some that were held out to choose settings."""
    return "held-out" if spec.get("data", {}).get("measured") == "choose" else "test"


def adapted(models: Mapping[str, Any]) -> list[str]:
    """A line for each network whose starting weights were adapted, from a record's `models`."""
    found = {name: (how or {}).get("weights") for name, how in models.items()}
    return [f"weights of the {name.replace('_', ' ')}: {said}" for name, said in found.items() if said]


def defence_measures(row: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (measure, victim, clean twin, number of images) from one of a record's `defences`."""
    return {"screen": _screen, "repair": _repair, "filter": _filter, "judgement": _judgement}[row["kind"]](row)


def _screen(row: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    def area(key: str) -> str:
        return f"{row[key]['value']:.3f} [{row[key]['low']:.3f}, {row[key]['high']:.3f}]"

    def count(key: str) -> str:
        return f"{row[key]['n_triggered']} / {row[key]['n_clean']}"

    rows = [
        ("AUROC", area("auroc"), area("auroc_clean_model"), count("auroc")),
        ("AUROC, triggered images that hit", area("auroc_on_hits"), "", count("auroc_on_hits")),
    ]
    for fpr, found in row["tpr_at_fpr"].items():
        rows.append((f"TPR at {100 * float(fpr):.0f} % FPR", percent(found), "", str(found["n"])))
        tied = row.get("tied_at_fpr", {}).get(fpr)
        if tied and tied["value"]:
            rows.append(("  more that tie with the threshold", percent(tied), "", str(tied["n"])))
        on_test, twin = row["fpr_on_test"][fpr], row["fpr_on_clean_model"][fpr]
        rows.append(("  FPR then on clean test images", percent(on_test), percent(twin), str(on_test["n"])))
    return rows


def _repair(row: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    before, n = row["before"], str(row["cda"]["n"])
    return [
        ("CDA before", percent(before["cda"]), percent(row["cda_clean_model_before"]), n),
        ("CDA after", percent(row["cda"]), percent(row["cda_clean_model"]), n),
        ("ASR before", percent(before["asr"]), "", str(row["asr"]["n"])),
        ("ASR after", percent(row["asr"]), "", str(row["asr"]["n"])),
        ("RA before", percent(before["ra"]), "", str(row["ra"]["n"])),
        ("RA after", percent(row["ra"]), "", str(row["ra"]["n"])),
        ("DER (0.5: no effect)", f"{row['der']:.3f}", "", ""),
    ]


def _filter(row: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    area = row["auroc"]
    counts = f"{area['n_triggered']} / {area['n_clean']}"
    return [
        ("AUROC", f"{area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]", "", counts),
        ("TPR: poisoned images flagged", percent(row["tpr"]), "", str(row["tpr"]["n"])),
        ("FPR: clean images flagged", percent(row["fpr"]), percent(row["fpr_on_clean_model"]), str(row["fpr"]["n"])),
        ("CDA, trained without them", percent(row["cda_retrained"]), "", str(row["cda_retrained"]["n"])),
        ("ASR, trained without them", percent(row["asr_retrained"]), "", str(row["asr_retrained"]["n"])),
        ("RA, trained without them", percent(row["ra_retrained"]), "", str(row["ra_retrained"]["n"])),
    ]


def _judgement(row: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    def verdict(key: str) -> str:
        return "backdoored" if row[key] else "clean"

    def suspected(key: str) -> str:
        classes = row.get(key.replace("suspected", "suspected_classes")) or [row[key]]
        return "none" if row[key] is None else ", ".join(map(str, classes))

    return [
        ("score", f"{row['score']:.4f}", f"{row['score_clean_model']:.4f}", ""),
        (f"judged (above {row['threshold']:g})", verdict("backdoored"), verdict("backdoored_clean_model"), ""),
        ("suspected class", suspected("suspected"), suspected("suspected_clean_model"), ""),
    ]
