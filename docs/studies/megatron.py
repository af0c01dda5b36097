"""What MEGATRON's losses are worth: `python docs/studies/megatron.py OUT [WORKERS]`, about 2 hours on two cores.

Every cell of the grid is a run of the study model below OUT, so that the next call goes on where this one stopped. What
the pages quote of the records is gathered in results/megatron/records.jsonl; a cell that was not run is not in it.
"""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import vitrap
from vitrap.attacks.megatron import Masked
from vitrap.contracts import AllToOne
from vitrap.experiment.measure import predict, triggered
from vitrap.metrics.accuracy import attack_success

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "megatron"
LOSSES = {
    "ce": {"latent": 0, "diffusion": 0},
    "latent": {"diffusion": 0},
    "diffusion": {"latent": 0},
    "both": {},
    "none": {},
}
SHIFTS = range(9)
DIRECTIONS = {"right": (0, 1), "down": (1, 0), "diagonal": (1, 1)}


@dataclass(frozen=True)
class Cell:
    """One run of the study model.

    Attributes:
        part: the table that it belongs to.
        row: its place there.
        losses: a key of LOSSES.
        seed: of the run.
        settings: the attack's parameters, over those of `losses`.
        more: overrides of other tables.
        shifted: whether the trigger is shifted at test, too.
    """

    part: str
    row: str
    losses: str
    seed: int
    settings: dict[str, Any]
    more: tuple[str, ...] = ()
    shifted: bool = False

    @property
    def name(self) -> str:
        """What the run is called."""
        return f"{self.part}-{self.row}-{self.losses}-s{self.seed}"

    def spec(self) -> vitrap.Spec:
        """The run's spec."""
        settings = {**LOSSES[self.losses], **self.settings}
        attack = [f"attack.{key}={value}" for key, value in settings.items()]
        overrides = ["attack.name=megatron", f"name={self.name}", f"seed={self.seed}", *attack, *self.more]
        return vitrap.load_spec(ROOT / "specs" / "study.toml", overrides)


def cells() -> Iterator[Cell]:
    """The grid, what matters most first; in the training setting seeds 1 and 2 have no more than the table quotes."""
    yield from poison_rates(0)
    yield from clean_label()
    for seed in (1, 2):
        yield from poison_rates(seed)
    for opacity in (0.2, 0.1, 0.05):
        for losses in ("ce", "both"):
            yield Cell("opacity", f"{opacity:g}", losses, 0, {"opacity": opacity, "faint": min(0.05, opacity)})
    for side in (1, 4, 8, 16):
        for losses in ("ce", "both"):
            yield Cell("cell", f"{side * side}", losses, 0, {"poison_rate": 0.01, "cell": side})
    for key, value in (("combine", "projected"), ("combine", "learned"), ("attention", "rollout"),
                       ("attention", "gradient")):  # fmt: skip
        yield Cell("variant", value, "both", 0, {"poison_rate": 0.01, key: value})


def poison_rates(seed: int) -> Iterator[Cell]:
    """Every loss on and off, from a rate that cross-entropy needs no help at to rates at which it fails."""
    for rate in (0.01, 0.002, 0.005, 0.02, 0.05, 0.1) if seed == 0 else (0.01, 0.005, 0.02, 0.1):
        whole = (
            ("ce", "both", "diffusion", "latent")
            if seed == 0
            else ("ce", "both")
            if rate == 0.1
            else ("ce", "diffusion", "both")
        )
        for losses in whole:
            shifted = rate == 0.1 and losses in ("ce", "both")
            yield Cell("rate", f"{100 * rate:g}", losses, seed, {"poison_rate": rate}, shifted=shifted)


def clean_label() -> Iterator[Cell]:
    """Rate, surrogate, opacity, and what shapes the pattern."""
    clean = {"setting": '"clean-label"'}
    other = ("surrogate.patch_size=4", "surrogate.embed_dim=64", "surrogate.depth=3", "surrogate.num_heads=4")
    for seed in (0, 1, 2):
        for rate in (0.5, 1.0, 0.1):
            yield Cell("clean", f"{100 * rate:g}", "both", seed, {**clean, "poison_rate": rate}, shifted=rate == 0.5)
    for faint in (0.1, 0.2, 0.4, 0.6):
        yield Cell("clean-opacity", f"{faint:g}", "both", 0, {**clean, "faint": faint})
    for losses in ("latent", "diffusion"):
        yield Cell("clean-shape", "0.3", losses, 0, clean)
    yield Cell("clean-shape", "0.3", "none", 0, {**clean, "steps": 0})
    for rate in (0.5, 1.0, 0.1):
        yield Cell("clean-other", f"{100 * rate:g}", "both", 0, {**clean, "poison_rate": rate}, more=other)


def run(cell: Cell, out: str) -> str:
    """Run one cell, unless its record is there."""
    torch.set_num_threads(1)
    spec = cell.spec()
    record = vitrap.run(spec, out)
    folder = Path(out) / f"{record.name}-{record.hash}"
    if cell.shifted and not (folder / "shifts.json").exists():
        (folder / "shifts.json").write_text(json.dumps(shifts(spec, folder)), encoding="utf-8")
    return f"{cell.name}: ASR {record.victim['asr']['value']:.4f}, CDA {record.victim['cda']['value']:.4f}"


def shifts(spec: vitrap.Spec, folder: Path) -> dict[str, dict[str, Any]]:
    """The victim's ASR with the trigger some pixels off its place."""
    done, found = vitrap.open_run(folder), {}
    test = vitrap.open_data(spec.data.name, spec.data.size, spec.data.limit).test
    assert isinstance(done.trigger, Masked)
    for name, (down, right) in DIRECTIONS.items():
        found[name] = {}
        for shift in SHIFTS:
            moved = replace(done.trigger, top=done.trigger.top + down * shift, left=done.trigger.left + right * shift)
            fired = predict(done.model, triggered(test, moved), spec.recipe.precision)
            found[name][str(shift)] = vars(attack_success(fired, test.labels, AllToOne(spec.params.target)))
    return found


def gather(out: Path) -> None:
    """Write what is quoted of every record below `out`, sorted by name."""
    rows = []
    for cell in cells():
        spec = cell.spec()
        folder = out / f"{spec.name}-{spec.hash()}"
        if (folder / "record.json").exists():
            rows.append(line(cell, json.loads((folder / "record.json").read_text("utf-8")), folder))
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["name"]))
    (RESULTS / "records.jsonl").write_text(text, encoding="utf-8")


def line(cell: Cell, record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A record without its curves' history."""
    kept = ("name", "hash", "seed", "spec", "data", "victim", "attack", "precision", "seconds")
    last = {name: curve[-1] for name, curve in record["curves"]["victim"].items()}
    shifted = folder / "shifts.json"
    more = {"shifts": json.loads(shifted.read_text("utf-8"))} if shifted.exists() else {}
    versions = {key: record["environment"][key] for key in ("torch", "timm") if key in record["environment"]}
    return {"part": cell.part, "row": cell.row, "losses": cell.losses, **{k: record[k] for k in kept},
            "last": last, "versions": versions, **more}  # fmt: skip


def main(out: str, workers: str = "2") -> None:
    """Run what is missing, then gather."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(int(workers)) as pool:
        for told in [pool.submit(run, cell, out) for cell in cells()]:
            sys.stdout.write(f"{told.result()}\n")
            sys.stdout.flush()
            gather(Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
