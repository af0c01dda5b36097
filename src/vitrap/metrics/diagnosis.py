"""The failure signatures of an attack, read from the measures of a run.

AGEB's paper names three: a low ASR (the trigger is not embedded), a low CDA (clean images suffer), and a visible
trigger. docs/studies/failures.md has the records from which the limits below were chosen.
"""

from collections.abc import Sequence

from vitrap.metrics.values import Measures

EFFECT = 0.5
"""The trigger counts as embedded where the ASR is at least so far above the clean twin's."""
LOSS = 0.02
"""Clean images count as unharmed where the CDA is at most so far below the clean twin's."""
PSNR = 20.0
"""The trigger counts as invisible where the mean PSNR, in dB, is at least so high."""


def diagnose(victim: Measures) -> tuple[str, ...]:
    """The faults of an attack, one line each with the figure in brackets; none where the backdoor is in."""
    effect = victim.asr.value - victim.asr_clean_model.value
    loss = victim.cda_clean_model.value - victim.cda.value
    psnr = victim.stealth.psnr_db.mean
    faults = []
    if effect < EFFECT:
        faults.append(f"the trigger is not embedded (ASR only {100 * effect:.1f} points above the clean twin's)")
    if loss > LOSS:
        faults.append(f"clean images suffer (CDA {100 * loss:.1f} points under the clean twin's)")
    if psnr < PSNR:
        faults.append(f"the trigger shows (PSNR {psnr:.1f} dB)")
    return tuple(faults)


def in_a_line(diagnosis: Sequence[str]) -> str:
    """A diagnosis in one line."""
    return "; ".join(diagnosis) or "the backdoor is in: triggered images go to the target, clean ones as before"


def in_short(diagnosis: Sequence[str]) -> tuple[str, ...]:
    """The faults of a diagnosis without their figures.

    >>> in_short(["clean images suffer (CDA 3.0 points under the clean twin's)"])
    ('clean images suffer',)
    """
    return tuple(fault.partition(" (")[0] for fault in diagnosis)
