"""The failure signatures of an attack, read from the measures of a run.

AGEB's paper names three: a low ASR (the trigger is not embedded), a low CDA (clean images suffer), and a visible
trigger. docs/studies/failures.md has the records from which the limits below were chosen. A low ASR is one that is not
far above chance, the clean twin's, and what the victim says of the same images without the trigger. Where victim or
twin are at chance, as when they put everything in one class, or the trigger changes no pixel, no ASR means anything.
"""

from collections.abc import Iterator, Sequence

from vitrap.metrics.values import Measures, Rate

EFFECT = 0.5
"""The trigger counts as embedded where the ASR is at least so far above the clean twin's and that without a trigger."""
LOSS = 0.02
"""Clean images count as unharmed where the CDA is at most so far below the clean twin's."""
PSNR = 20.0
"""The trigger counts as invisible where the mean PSNR, in dB, is at least so high."""


def diagnose(measures: Measures, n_classes: int) -> tuple[str, ...]:
    """The faults of an attack, one line each with the figure in brackets; none where the backdoor is in.

    Args:
        measures: those of the victim and its clean twin.
        n_classes: the number of classes.
    """
    loss = measures.cda_clean_model.value - measures.cda.value
    psnr = measures.stealth.psnr_db.mean
    faults = list(backdoor_faults(measures, n_classes))
    if loss > LOSS:
        faults.append(f"clean images suffer (CDA {100 * loss:.1f} points under the clean twin's)")
    if psnr < PSNR:
        faults.append(f"the trigger shows (PSNR {psnr:.1f} dB)")
    return tuple(faults)


def backdoor_faults(measures: Measures, n_classes: int) -> tuple[str, ...]:
    """The faults of `diagnose` by which there is no backdoor. With any, no measure of a defence is to its credit."""
    faults = []
    guess = 1 / max(1, n_classes)
    one_class = max(guess, measures.majority or 0.0)
    models = {"the victim": measures.cda, "the clean twin": measures.cda_clean_model}
    for model, cda in models.items():
        if cda.low <= one_class:
            by_chance = f"{100 * one_class:.1f} % with everything in one class"
            faults.append(f"{model} is at chance (CDA {_interval(cda)}, {by_chance})")
    change = measures.stealth.linf
    if change.median == 0:
        unchanged = "all" if change.mean == 0 else "at least half of"
        faults.append(f"the trigger changes no pixel (of {unchanged} the images)")
    if failed := tuple(_failed(measures, guess)):
        faults.append(f"the trigger is not embedded (ASR {', '.join(failed)})")
    return tuple(faults)


def _failed(measures: Measures, guess: float) -> Iterator[str]:
    """The comparisons that the ASR fails: with the twin, with clean images, and with guessing one class of all."""
    asr = measures.asr
    bases = {"the clean twin's": measures.asr_clean_model, "that without the trigger": measures.asr_clean_images}
    for whose, base in bases.items():
        if base and asr.value - base.value < EFFECT:
            yield f"only {100 * (asr.value - base.value):.1f} points above {whose}"
        elif base and asr.low <= base.high:
            yield f"{_interval(asr)} not surely above {whose}, {_interval(base)}"
    if asr.low <= guess:
        yield f"{_interval(asr)} not surely above chance, {100 * guess:.1f} %"


def _interval(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def in_a_line(diagnosis: Sequence[str]) -> str:
    """A diagnosis in one line."""
    return "; ".join(diagnosis) or "the backdoor is in: triggered images go to the target, clean ones as before"


def in_short(diagnosis: Sequence[str]) -> tuple[str, ...]:
    """The faults of a diagnosis without their figures.

    >>> in_short(["clean images suffer (CDA 3.0 points under the clean twin's)"])
    ('clean images suffer',)
    """
    return tuple(fault.partition(" (")[0] for fault in diagnosis)
