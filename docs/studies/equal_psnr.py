"""How much of AGEB's settings is visible alike: `python docs/studies/equal_psnr.py RUNS`, a few minutes on one core.

RUNS holds what `vitrap sweep specs/studies/ageb_steps.toml --out RUNS` made of its first case. With the surrogate of
seed 0, on the hold-out that settings are chosen on: the blend weight α, or where nothing is eroded the signal c, at
which the mean PSNR is the one asked for. Writes results/choice/equal_psnr.json; specs/studies/ageb_steps.toml and
specs/studies/ageb_element.toml have these values.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import vitrap
from vitrap.attacks.ageb import Ageb, Erosion
from vitrap.contracts import ImageSet
from vitrap.experiment.measure import stealth_of
from vitrap.experiment.predict import every_row, triggered
from vitrap.experiment.run import run_folder
from vitrap.sweeps.grid import load_sweep

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "results" / "choice" / "equal_psnr.json"
SWEEP = ROOT / "specs" / "studies" / "ageb_steps.toml"
HALVINGS = 12
STEPS: Mapping[str, Mapping[str, Any]] = {
    "no signal": {"signal": 0.0},
    "no adjustment": {"adjust": False},
    "pixels at random": {"select": "random"},
    "random patches": {"select": "random-tokens"},
    "signal alone": {"alpha": 1.0, "adjust": False},
}
ELEMENTS: Mapping[str, Mapping[str, Any]] = {
    **{
        f"{shape} of {size} px": {"shape": shape, "size": size}
        for size in (3, 5, 7)
        for shape in ("square", "cross", "disc")
    },
    **{operation: {"operation": operation} for operation in ("dilation", "opening", "closing")},
}


def visibility(surrogate: nn.Module, settings: Ageb, images: ImageSet) -> float:
    """Mean PSNR of triggered images, dB."""
    attacked = triggered(images, Erosion(surrogate, settings))
    return stealth_of(images, attacked, every_row(images)).psnr_db.mean


def value_at(level: float, low: float, high: float, psnr_of: Callable[[float], float]) -> float:
    """Where a PSNR that changes steadily from `low` to `high` is `level`, to three digits, by halving."""
    rises = psnr_of(high) > psnr_of(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if (psnr_of(middle) < level) == rises else (low, middle)
    return round((low + high) / 2, 3)


def found_at(level: float, surrogate: nn.Module, settings: Ageb, images: ImageSet) -> dict[str, float]:
    """The value of α, or where nothing is eroded of c, and the PSNR that it gives."""
    name, low, high = ("signal", 1.0, 64.0) if settings.alpha == 1 else ("alpha", 0.0, 1.0)

    def psnr_of(value: float) -> float:
        return visibility(surrogate, replace(settings, **{name: value}), images)

    value = value_at(level, low, high, psnr_of)
    return {name: value, "psnr": psnr_of(value)}


def main(runs: str) -> None:
    """Find every value, then write."""
    spec = load_sweep(SWEEP).points[0].spec
    trigger = vitrap.open_run(run_folder(spec, Path(runs))).trigger
    assert isinstance(trigger, Erosion)
    assert isinstance(spec.attack, Ageb)
    surrogate, whole = trigger.surrogate, spec.attack
    images = vitrap.open_data(spec.data.name, spec.data.size, spec.data.limit, holdout=spec.data.holdout).choose

    def at(level: float, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        each = {name: found_at(level, surrogate, replace(whole, **change), images) for name, change in changes.items()}
        return {"level": level, "n": len(images), "values": each}

    unblended = [visibility(surrogate, replace(whole, **change, alpha=0.0), images) for change in ELEMENTS.values()]
    found = {"steps": at(visibility(surrogate, whole, images), STEPS), "element": at(max(unblended), ELEMENTS)}
    RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
