"""MEGATRON's trigger off its place: `python docs/studies/megatron.py RUNS NETWORK`, NETWORK a key of NETWORKS.

RUNS holds what `vitrap sweep` made of the specs in specs/studies that stand there, and of those runs the ones named are
measured: a few minutes on one core for a small network, a quarter of an hour for the pretrained one. Writes
results/shifts/NETWORK.json, from which docs/make.py makes tables and picture.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import vitrap
from vitrap.attacks.megatron import Masked
from vitrap.contracts import AllToOne
from vitrap.experiment.predict import every_row, predict, spread, triggered
from vitrap.experiment.run import run_folder
from vitrap.experiment.spec_file import leaves
from vitrap.metrics.accuracy import attack_success
from vitrap.sweeps.grid import load_sweep
from vitrap.train.arithmetic import default_arithmetic

ROOT = Path(__file__).parents[2]
DIRECTIONS = {"right": (0, 1), "down": (1, 0), "diagonal": (1, 1)}


@dataclass(frozen=True)
class Network:
    """What is measured of a network.

    Attributes:
        furthest: greatest shift, in pixels: one whole patch.
        images: test images, spread evenly over the set; None for all.
        lines: by what was trained: a sweep, the title of its case, and settings that its runs must have.
    """

    furthest: int
    images: int | None
    lines: Mapping[str, tuple[str, str, Mapping[str, Any]]]


RATE, PATCH = "attack.poison_rate", "model.patch_size"
TRIED = (
    "cross-entropy alone", "both losses", "both losses, margin 4 px", "both losses, margin 8 px", "both losses, crops",
    "clean label", "clean label, crops",
)  # fmt: skip
NETWORKS = {
    "small": Network(8, None, {
        "cross-entropy alone": ("megatron_rate", "cross-entropy alone", {RATE: 0.1}),
        "both losses": ("megatron_rate", "+ both", {RATE: 0.1}),
        "clean label": ("megatron_clean", "clean", {RATE: 0.5}),
    }),
    "pretrained": Network(14, 1000, {
        "both losses": ("pretrained", "`megatron_cifar10`", {}),
        "clean label": ("pretrained", "`megatron_clean_cifar10`", {}),
    }),
    "patches of 8 px": Network(8, 2000, {name: ("megatron_shift", name, {PATCH: 8}) for name in TRIED}),
    "patches of 4 px": Network(8, 2000, {name: ("megatron_shift", name, {PATCH: 4}) for name in TRIED}),
}  # fmt: skip


def shifts(spec: vitrap.Spec, folder: Path, network: Network) -> dict[str, dict[str, Any]]:
    """The victim's ASR with the trigger some pixels off its place."""
    done, found = vitrap.open_run(folder), {}
    test = vitrap.open_data(spec.data.name, spec.data.size, spec.data.limit).test
    some = test.take(spread(every_row(test), network.images or len(test)))
    assert isinstance(done.trigger, Masked)
    for name, (down, right) in DIRECTIONS.items():
        found[name] = {}
        for shift in range(network.furthest + 1):
            moved = replace(done.trigger, top=done.trigger.top + down * shift, left=done.trigger.left + right * shift)
            fired = predict(done.model, triggered(some, moved), default_arithmetic(spec.recipe.precision, some.device))
            found[name][str(shift)] = vars(attack_success(fired, some.labels, AllToOne(spec.attack.target)))
    return found


def main(runs: str, name: str) -> None:
    """Measure every seed, then write."""
    network = NETWORKS[name]
    found: dict[str, list[dict[str, Any]]] = {}
    for line, (sweep, title, wanted) in network.lines.items():
        for point in load_sweep(ROOT / "specs" / "studies" / f"{sweep}.toml").points:
            known = dict(leaves(point.spec.table())) | point.settings
            if all(known[key] == value for key, value in {"title": title, **wanted}.items()):
                measured = shifts(point.spec, run_folder(point.spec, Path(runs)), network)
                found.setdefault(line, []).append({"seed": point.spec.seed, "asr": measured})
    result = ROOT / "results" / "shifts" / f"{name.replace(' ', '_')}.json"
    result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
