"""Turns a record's measures into lines of text, for the command line and the report."""

from collections.abc import Collection, Mapping
from typing import Any

from vitrap.experiment.defence_rows import FilterRow, JudgementRow, RepairRow, Row, ScreenRow, Verdict
from vitrap.experiment.record import BuiltNetwork, OwnNetwork
from vitrap.metrics.values import Auroc, Centre, Measures, Rate

MeasureLine = tuple[str, str, str, str]
"""A measure, its value for victim and clean twin, and the number of images."""
MERITS = ("AUROC", "DER")
"""Measures that are a defence's merit only where there is a backdoor."""


def percent(rate: Rate) -> str:
    """A rate with its interval.

    >>> percent(Rate(0.5, 0.25, 0.75, 10))
    '50.00 % [25.00, 75.00]'
    """
    return f"{100 * rate.value:.2f} % [{100 * rate.low:.2f}, {100 * rate.high:.2f}]"


def counts(numbers: Collection[int]) -> str:
    """Some counts in words: the number that they all are, or the least and the greatest.

    >>> counts([1200, 1200]), counts({3, 1, 2})
    ('1,200', '1 to 3')
    """
    return " to ".join(f"{n:,}" for n in dict.fromkeys((min(numbers), max(numbers))))


def centred(centre: Centre) -> str:
    """Mean and median of a measure.

    >>> centred(Centre(30.125, 31.0))
    '30.1 (median 31)'
    """
    return f"{centre.mean:.3g} (median {centre.median:.3g})"


def measures(victim: Measures) -> list[MeasureLine]:
    """The lines for the measures of a victim and its clean twin."""
    stealth = victim.stealth
    lines = [
        ("clean accuracy (CDA)", percent(victim.cda), percent(victim.cda_clean_model), str(victim.cda.n)),
        ("attack success (ASR)", percent(victim.asr), percent(victim.asr_clean_model), str(victim.asr.n)),
    ]
    if without := victim.asr_clean_images:
        lines.append(("  without the trigger", percent(without), "", str(without.n)))
    lines.append(("robust accuracy (RA)", percent(victim.ra), "", str(victim.ra.n)))
    for name, centre in (
        ("PSNR, dB", stealth.psnr_db),
        ("SSIM", stealth.ssim),
        ("mean change, 1/255", stealth.l1),
        ("greatest change, 1/255", stealth.linf),
        ("LPIPS", stealth.lpips),
    ):
        value = "no weights at hand" if centre is None else centred(centre)
        lines.append((name, value, "", str(stealth.n)))
    if stored := victim.stealth_stored:
        lines.append(("PSNR of stored poison, dB", centred(stored.psnr_db), "", str(stored.n)))
    return lines


def measured_on(spec: Mapping[str, Any]) -> str:
    """On which images a record is measured: "test", or "held-out" where settings are chosen."""
    return "held-out" if spec.get("data", {}).get("measured") == "choose" else "test"


def adapted(models: Mapping[str, BuiltNetwork | OwnNetwork | None]) -> list[str]:
    """A line for each network whose starting weights were adapted, from a record's `models`."""
    return [
        f"weights of the {name.replace('_', ' ')}: {network.weights}"
        for name, network in models.items()
        if isinstance(network, BuiltNetwork) and network.weights
    ]


def defence_measures(row: Row, backdoor: bool = True) -> list[MeasureLine]:
    """The lines for the measures of a row of defences; AUROC and DER are marked where the run has no backdoor."""
    lines = _lines(row)
    if backdoor:
        return lines
    return [
        (f"{name}, no backdoor" if name.startswith(MERITS) else name, victim, twin, n)
        for name, victim, twin, n in lines
    ]


def _lines(row: Row) -> list[MeasureLine]:
    """The lines without marks."""
    match row:
        case ScreenRow():
            return _screen(row)
        case RepairRow():
            return _repair(row)
        case FilterRow():
            return _filter(row)
        case JudgementRow():
            return _judgement(row)


def _area(area: Auroc) -> str:
    return f"{area.value:.3f} [{area.low:.3f}, {area.high:.3f}]"


def _screen(row: ScreenRow) -> list[MeasureLine]:
    def count(area: Auroc) -> str:
        return f"{area.n_triggered} / {area.n_clean}"

    lines = [
        ("AUROC", _area(row.auroc), _area(row.auroc_clean_model), count(row.auroc)),
        ("AUROC, triggered images that hit", _area(row.auroc_on_hits), "", count(row.auroc_on_hits)),
        ("held-out images, for thresholds", "", "", str(row.n_threshold)),
    ]
    for fpr, found in row.tpr_at_fpr.items():
        name = f"TPR at {100 * float(fpr):.3g} % FPR"
        on_test = row.fpr_on_test[fpr]
        twin = row.fpr_on_clean_model[fpr]
        if found is None or on_test is None or twin is None:
            lines.append((name, row.unresolved[fpr], "", ""))
            continue
        lines.append((name, percent(found), "", str(found.n)))
        tied = row.tied_at_fpr.get(fpr)
        if tied and tied.value:
            lines.append(("  more that tie with the threshold", percent(tied), "", str(tied.n)))
        lines.append(("  FPR then on clean test images", percent(on_test), percent(twin), str(on_test.n)))
    return lines


def _repair(row: RepairRow) -> list[MeasureLine]:
    before = row.before
    return [
        ("CDA before", percent(before.cda), percent(row.cda_clean_model_before), str(row.cda.n)),
        ("CDA after", percent(row.cda), percent(row.cda_clean_model), str(row.cda.n)),
        ("ASR before", percent(before.asr), "", str(row.asr.n)),
        ("ASR after", percent(row.asr), "", str(row.asr.n)),
        ("RA before", percent(before.ra), "", str(row.ra.n)),
        ("RA after", percent(row.ra), "", str(row.ra.n)),
        ("DER (0.5: no effect)", f"{row.der:.3f}", "", ""),
    ]


def _filter(row: FilterRow) -> list[MeasureLine]:
    area = row.auroc
    return [
        ("AUROC", _area(area), "", f"{area.n_triggered} / {area.n_clean}"),
        ("TPR: poisoned images flagged", percent(row.tpr), "", str(row.tpr.n)),
        ("FPR: clean images flagged", percent(row.fpr), percent(row.fpr_on_clean_model), str(row.fpr.n)),
        ("CDA, trained without them", percent(row.cda_retrained), "", str(row.cda_retrained.n)),
        ("ASR, trained without them", percent(row.asr_retrained), "", str(row.asr_retrained.n)),
        ("RA, trained without them", percent(row.ra_retrained), "", str(row.ra_retrained.n)),
    ]


def _judgement(row: JudgementRow) -> list[MeasureLine]:
    def judged(verdict: Verdict) -> str:
        return "backdoored" if verdict.backdoored else "clean"

    def suspected(verdict: Verdict) -> str:
        classes = verdict.suspected_classes or [verdict.suspected]
        return "none" if verdict.suspected is None else ", ".join(map(str, classes))

    victim = row.verdict
    twin = row.verdict_clean_model
    return [
        ("score", f"{victim.score:.4f}", f"{twin.score:.4f}", ""),
        (f"judged (above {row.threshold:g})", judged(victim), judged(twin), ""),
        ("suspected class", suspected(victim), suspected(twin), ""),
    ]
