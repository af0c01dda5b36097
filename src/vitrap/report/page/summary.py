"""Makes the report's summary: a line for each run, and means over runs that differ by seed alone."""

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrap.experiment.defence_rows import Row
from vitrap.experiment.record import Record
from vitrap.experiment.records import Found
from vitrap.experiment.spec_file import leaves
from vitrap.metrics.diagnosis import backdoor_faults, diagnose, in_a_line, in_short
from vitrap.metrics.values import Measures
from vitrap.report.tables import measured_on

HEADED = ("name", "seed", "data.name", "attack.name", "attack.setting", "attack.poison_rate", "defences")
"""Settings that have a column of their own."""


@dataclass(frozen=True)
class Run:
    """A run as a line of the summary.

    Attributes:
        record: the run's record.
        place: where the record was found.
        anchor: the name by which the page links to its section.
        attack: the attack's name, and its setting where it has one.
        data: the data set's name.
        differs: settings that differ between runs; those of the attack, between runs of this attack.
        effect: ASR minus that of the twin, in percentage points.
        psnr: mean over images, dB.
        verdict: the diagnosis in a line.
        faults: the diagnosis in keywords; empty where the backdoor works.
        backdoor: whether there is one for a defence to find.
    """

    record: Record
    place: Path
    anchor: str
    attack: str
    data: str
    differs: tuple[str, ...]
    effect: float
    psnr: float
    verdict: str
    faults: tuple[str, ...]
    backdoor: bool

    @property
    def victim(self) -> Measures:
        """The measures of victim and twin."""
        return self.record.victim

    @property
    def poison_rate(self) -> float | None:
        """The poison rate: a share of the training set or, with clean labels, of the target class."""
        return number(self.record.spec["attack"].get("poison_rate"))

    @property
    def defences(self) -> Sequence[Row]:
        """The rows of defences."""
        return self.record.defences


@dataclass(frozen=True)
class Spread:
    """Runs that differ by seed alone: one of them, the seeds, and mean and standard deviation of each measure."""

    first: Run
    seeds: tuple[int, ...]
    measures: Mapping[str, tuple[float, float]]


def text(value: Any) -> str:
    """A setting's value as short text.

    >>> text(0.1), text(None), text(True), text([1, 2])
    ('0.1', 'none', 'true', '1, 2')
    """
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(text, value))
    return str(value)


def number(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def to_runs(records: Sequence[Found]) -> tuple[Run, ...]:
    """A line for each record, sorted by attack, data, name and seed."""
    records = sorted(records, key=_order)
    specs = [dict(leaves(found.record.spec)) for found in records]
    named = _differences(specs)
    anchors = _anchors([found.record.hash for found in records])
    return tuple(
        _run(found, anchor, _differs(spec, named)) for found, anchor, spec in zip(records, anchors, specs, strict=True)
    )


def _order(found: Found) -> tuple[str, str, str, int]:
    """The key by which records are sorted."""
    record = found.record
    return attack_label(record), record.spec["data"]["name"], record.name, record.seed


def _run(found: Found, anchor: str, differs: tuple[str, ...]) -> Run:
    """The line of a record."""
    record = found.record
    victim = record.victim
    faults = diagnose(victim, record.data.classes)
    return Run(
        record,
        found.place,
        anchor,
        attack_label(record),
        data_label(record.spec),
        differs,
        100 * (victim.asr.value - victim.asr_clean_model.value),
        victim.stealth.psnr_db.mean,
        in_a_line(faults),
        in_short(faults),
        not backdoor_faults(victim, record.data.classes),
    )


def data_label(spec: Mapping[str, Any]) -> str:
    """The data set's name and, where figures are not of its test set, of which images they are."""
    name = text(spec["data"]["name"])
    images = measured_on(spec)
    return name if images == "test" else f"{name}, {images} images"


def attack_label(record: Record) -> str:
    """The attack's name and its setting, if it has one."""
    attack = record.spec["attack"]
    return " ".join(filter(None, [attack["name"], text(attack.get("setting") or "")]))


def _anchors(hashes: Sequence[str]) -> list[str]:
    """A distinct name of a section for each hash; a hash that is none, in a damaged record, is not used."""
    seen: dict[str, int] = defaultdict(int)
    anchors = []
    for i, digits in enumerate(hashes):
        stem = f"run-{digits}" if re.fullmatch(r"[0-9a-zA-Z]{1,64}", digits) else f"run-nr{i}"
        seen[stem] += 1
        anchors.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return anchors


def _differences(specs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The settings that differ between runs, by dotted key, each with the name that the report gives it."""
    by_attack: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for spec in specs:
        by_attack[text(spec.get("attack.name"))].append(spec)
    found = {}
    for key in dict.fromkeys(key for spec in specs for key in spec if key not in HEADED):
        groups = by_attack.values() if key.startswith("attack.") else [specs]
        if any(len({text(spec.get(key)) for spec in group}) > 1 for group in groups):
            found[key] = key.removesuffix(".name").rpartition(".")[2]
    short = list(found.values())
    return {key: name if short.count(name) == 1 else key for key, name in found.items()}


def _differs(spec: Mapping[str, Any], named: Mapping[str, str]) -> tuple[str, ...]:
    """A spec's values of the named settings, as text."""
    return tuple(f"{name} {text(spec[key])}" for key, name in named.items() if key in spec)


def over_seeds(runs: Sequence[Run]) -> tuple[Spread, ...]:
    """Groups of runs whose specs differ by seed, name and defences alone; of two with one seed, the first counts."""
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        rest = {k: v for k, v in run.record.spec.items() if k not in ("name", "seed", "defences")}
        groups[json.dumps(rest, sort_keys=True)].setdefault(run.record.seed, run)
    return tuple(_spread(group) for group in groups.values() if len(group) > 1)


def _spread(group: Mapping[int, Run]) -> Spread:
    """The means of a group of runs, by seed."""

    def rates(key: str) -> list[float]:
        return [100 * getattr(run.victim, key).value for run in group.values()]

    lists = {key: rates(key) for key in ("cda", "cda_clean_model", "asr", "asr_clean_model")}
    lists |= {"effect": [run.effect for run in group.values()], "psnr": [run.psnr for run in group.values()]}
    measures = {key: (statistics.fmean(found), statistics.stdev(found)) for key, found in lists.items()}
    return Spread(next(iter(group.values())), tuple(sorted(group)), measures)
