"""MEGATRON's trigger off its place: `python docs/studies/megatron.py RUNS`, a few minutes on one core.

RUNS holds what `vitrap sweep` made of specs/studies/megatron_rate.toml and specs/studies/megatron_clean.toml; of those
runs the ones in SHIFTED are measured. Writes results/shifts/megatron.json, from which docs/make.py makes the table.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import vitrap
from vitrap.attacks.megatron import Masked
from vitrap.contracts import AllToOne
from vitrap.experiment.grid import load_sweep
from vitrap.experiment.predict import predict, triggered
from vitrap.experiment.run import run_folder
from vitrap.metrics.accuracy import attack_success
from vitrap.train.arithmetic import usual

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "results" / "shifts" / "megatron.json"
SHIFTS = range(9)
DIRECTIONS = {"right": (0, 1), "down": (1, 0), "diagonal": (1, 1)}
SHIFTED = {
    "cross-entropy alone": ("megatron_rate", "cross-entropy alone", 0.1),
    "both losses": ("megatron_rate", "+ both", 0.1),
    "clean label": ("megatron_clean", "clean", 0.5),
}
"""Of each line of the picture: sweep, title of the case, poison rate."""


def shifts(spec: vitrap.Spec, folder: Path) -> dict[str, dict[str, Any]]:
    """The victim's ASR with the trigger some pixels off its place."""
    done, found = vitrap.open_run(folder), {}
    test = vitrap.open_data(spec.data.name, spec.data.size, spec.data.limit).test
    assert isinstance(done.trigger, Masked)
    for name, (down, right) in DIRECTIONS.items():
        found[name] = {}
        for shift in SHIFTS:
            moved = replace(done.trigger, top=done.trigger.top + down * shift, left=done.trigger.left + right * shift)
            fired = predict(done.model, triggered(test, moved), usual(spec.recipe.precision, test.device))
            found[name][str(shift)] = vars(attack_success(fired, test.labels, AllToOne(spec.params.target)))
    return found


def main(runs: str) -> None:
    """Measure every seed, then write."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (sweep, title, rate) in SHIFTED.items():
        for point in load_sweep(ROOT / "specs" / "studies" / f"{sweep}.toml").points:
            if (point.settings["title"], point.spec.params.poison_rate) == (title, rate):
                measured = shifts(point.spec, run_folder(point.spec, Path(runs)))
                found.setdefault(name, []).append({"seed": point.spec.seed, "asr": measured})
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
