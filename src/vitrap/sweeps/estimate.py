"""`vitrap sweep --dry-run`: finds which runs of a sweep are done, and estimates how long the others take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from vitrap.experiment.defence_rows import row_settings
from vitrap.experiment.defence_spec import DefenceSpec
from vitrap.experiment.record import Record
from vitrap.experiment.records import Loaded
from vitrap.experiment.spec import digest
from vitrap.formats import Table
from vitrap.sweeps.grid import Point, Sweep

State = Literal["record there", "defences missing", "failed before", "to run"]
OWN_PARTS = ("poison", "victim", "fit", "measure")
"""Parts of a run's time that it shares with no other run."""


@dataclass(frozen=True)
class RunEstimate:
    """A run of a sweep, how much of it is done, and about how long the rest takes.

    Attributes:
        point: the run's point of the grid.
        state: how much of it is done.
        seconds: time that one worker needs for the rest; 0 where it is done, None where no finished run is like it.
    """

    point: Point
    state: State
    seconds: float | None


def estimate_runs(grid: Sweep, loaded: Loaded, device: str = "cpu", threads: int = 1) -> list[RunEstimate]:
    """Estimate each run of a sweep from finished runs of the same data, model and recipe.

    Keys of records are not compared: where code has changed since, a run that seems done will be made again.

    Args:
        grid: the runs.
        loaded: the records in the folder of runs.
        device: where workers compute; estimates rest on runs on the same kind of device.
        threads: threads of a worker; a run's time is scaled by the number of threads that it had.
    """
    done = {(found.record.name, found.record.hash): found.record for found in loaded.records}
    failed = {(failure.name, failure.hash) for failure in loaded.failures}
    # Runs that say how long they took, and the shared stages that they have made.
    known = [record for record in done.values() if _timed(record, device.partition(":")[0])]
    made = {stage for record in known for stage in _shared_keys(record.spec, "surrogate" in record.seconds).values()}
    estimates = []
    for point in grid.points:
        # How much of the run is done.
        name = (point.spec.name, point.spec.hash())
        record = done.get(name)
        missing = [defence for defence in point.spec.defences if record is None or not _has(record, defence)]
        if record is not None:
            state: State = "defences missing" if missing else "record there"
        else:
            state = "failed before" if name in failed else "to run"
        # How long the rest takes. Twins and surrogates are counted once for all runs that share them.
        seconds: float | None = 0.0
        if state != "record there":
            shared = _shared_keys(point.spec.table(), point.spec.attack.needs_surrogate)
            parts = [] if record is not None else list(OWN_PARTS)
            parts += [part for part, stage in shared.items() if stage not in made]
            seconds = _estimate(point, known, parts, missing, threads)
            made |= set(shared.values())
        estimates.append(RunEstimate(point, state, seconds))
    return estimates


def _timed(record: Record, kind: str) -> bool:
    """Whether a record is complete enough to estimate from, and of a run on this kind of device."""
    whole = {"seed", "data", "model", "recipe", "attack"} <= record.spec.keys()
    return whole and record.environment.device_kind == kind and record.environment.threads > 0


def _has(record: Record, defence: DefenceSpec) -> bool:
    """Whether the record has a row of this defence with these settings."""
    return any({"name": row.name, **row_settings(row)} == defence.table() for row in record.defences)


def _estimate(
    point: Point, known: Sequence[Record], parts: Sequence[str], missing: Sequence[DefenceSpec], threads: int
) -> float | None:
    """Seconds of the parts and the defences that a run lacks: medians over runs like it; None if there are none."""
    wanted = _training_key(point.spec.table())
    alike = [record for record in known if _training_key(record.spec) == wanted]
    if not alike:
        return None
    # Parts are estimated from runs with the same attack, where there are any.
    same = [record for record in alike if record.spec["attack"]["name"] == point.spec.attack_name] or alike
    share = {record.hash: record.environment.threads / threads for record in alike}
    took = [[share[record.hash] * record.seconds[part] for record in same if part in record.seconds] for part in parts]
    # A row has the time on the victim, and the twin takes as long.
    for defence in missing:
        rows = [(record, row) for record in alike for row in record.defences if row.name == defence.name]
        took.append([2 * share[record.hash] * sum(row.seconds.values()) for record, row in rows])
    return sum(median(each) for each in took if each)


def _training_key(spec: Mapping[str, Any]) -> str:
    """A digest of what decides how long a training takes: data, model and recipe."""
    return digest([_images(spec), spec["model"], spec["recipe"]])


def total(estimates: Sequence[RunEstimate], workers: int) -> tuple[float, int]:
    """Seconds of all runs with an estimate, divided among the workers, and the number of runs without one."""
    return sum(e.seconds or 0 for e in estimates) / workers, sum(e.seconds is None for e in estimates)


def twin_key(spec: Mapping[str, Any]) -> str:
    """A digest that stands for the clean twin of a spec's table: runs with the same digest share their twin."""
    return digest([spec["seed"], _images(spec), spec["model"], spec["recipe"]])


def _shared_keys(spec: Mapping[str, Any], surrogate: bool) -> dict[str, str]:
    """Digests of the stages that a run may share with others: the twin and, if it has one, the surrogate."""
    keys = {"twin": twin_key(spec)}
    if surrogate:
        keys["surrogate"] = digest([_images(spec), spec.get("surrogate", spec["model"]), spec["recipe"]])
    return keys


def _images(spec: Mapping[str, Any]) -> Table:
    """The settings of a spec that decide its training images."""
    return {key: value for key, value in spec["data"].items() if key != "measured"}
