"""The failure signatures of an attack, found in a run's own figures.

AGEB's paper names three: a low ASR, since the trigger is not embedded; a low CDA, since clean images suffer; and a
trigger that shows. docs/studies/failures.md has the records that say where each of them begins.
"""

from collections.abc import Sequence

from vitrap.metrics.values import Measures

EFFECT = 0.5
"""Least ASR above the clean twin's of a trigger that is embedded."""
LOSS = 0.02
"""Greatest CDA below the clean twin's of a victim whose clean images do not suffer."""
PSNR = 20.0
"""Least PSNR, dB, of a trigger that does not show."""


def diagnose(victim: Measures) -> tuple[str, ...]:
    """What is wrong with an attack, a line each with its figure in brackets; nothing where the backdoor is in."""
    effect = victim.asr.value - victim.asr_clean_model.value
    loss = victim.cda_clean_model.value - victim.cda.value
    psnr = victim.stealth.psnr_db.mean
    found = []
    if effect < EFFECT:
        found.append(f"the trigger is not embedded (ASR only {100 * effect:.1f} points above the clean twin's)")
    if loss > LOSS:
        found.append(f"clean images suffer (CDA {100 * loss:.1f} points under the clean twin's)")
    if psnr < PSNR:
        found.append(f"the trigger shows (PSNR {psnr:.1f} dB)")
    return tuple(found)


def in_a_line(diagnosis: Sequence[str]) -> str:
    """What `diagnose` found, in one line."""
    return "; ".join(diagnosis) or "the backdoor is in: triggered images go to the target, clean ones as before"


def in_short(diagnosis: Sequence[str]) -> tuple[str, ...]:
    """What `diagnose` found, without the figures.

    >>> in_short(["clean images suffer (CDA 3.0 points under the clean twin's)"])
    ('clean images suffer',)
    """
    return tuple(fault.partition(" (")[0] for fault in diagnosis)
