"""What a sweep has ahead of it: what there is of each run, and about how long the rest takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from vitrap.experiment.defence_spec import DefenceSpec
from vitrap.experiment.record import Record, Table
from vitrap.experiment.records import Loaded
from vitrap.experiment.rows import row_settings
from vitrap.experiment.spec import digest
from vitrap.sweeps.grid import Point, Sweep

State = Literal["record there", "defences missing", "failed before", "to run"]
OWN = ("poison", "victim", "fit", "measure")
"""What of a run's time no other run shares."""


@dataclass(frozen=True)
class Ahead:
    """A run before it is begun: whether there is something of it, and about how long it will take.

    Attributes:
        point: of the grid.
        state: what there is of it.
        seconds: of one worker; None where no finished run is like it, 0 where it is done.
    """

    point: Point
    state: State
    seconds: float | None


def look_ahead(grid: Sweep, loaded: Loaded, device: str = "cpu", threads: int = 1) -> list[Ahead]:
    """What a sweep has to do, with an estimate from finished runs of the same data, model and recipe.

    A record's keys are not tried here: where code has changed since, a run that seems done will be made again.

    Args:
        grid: the runs.
        loaded: what the folder of runs holds.
        device: what workers compute on; only runs on its kind are gone by.
        threads: of a worker; a run that had more or fewer is taken to have done as much a second with each of them.
    """
    done = {(found.record.name, found.record.hash): found.record for found in loaded.records}
    failed = {(failure.name, failure.hash) for failure in loaded.failures}
    known = [record for record in done.values() if _timed(record, device.partition(":")[0])]
    made = {stage for record in known for stage in _shared(record.spec, "surrogate" in record.seconds).values()}
    ahead = []
    for point in grid.points:
        # What there is of it,
        name = (point.spec.name, point.spec.hash())
        record = done.get(name)
        missing = [defence for defence in point.spec.defences if record is None or not _has(record, defence)]
        if record is not None:
            state: State = "defences missing" if missing else "record there"
        else:
            state = "failed before" if name in failed else "to run"
        # and how long the rest takes: twins and surrogates are made once for all runs that share them.
        seconds: float | None = 0.0
        if state != "record there":
            shared = _shared(point.spec.table(), point.spec.attack.needs_surrogate)
            parts = [] if record is not None else list(OWN)
            parts += [part for part, stage in shared.items() if stage not in made]
            seconds = _estimate(point, known, parts, missing, threads)
            made |= set(shared.values())
        ahead.append(Ahead(point, state, seconds))
    return ahead


def _timed(record: Record, kind: str) -> bool:
    """Whether a record says how long the run took on this kind of device."""
    whole = {"seed", "data", "model", "recipe", "attack"} <= record.spec.keys()
    return whole and record.environment.device_kind == kind and record.environment.threads > 0


def _has(record: Record, defence: DefenceSpec) -> bool:
    return any({"name": row.name, **row_settings(row)} == defence.table() for row in record.defences)


def _estimate(
    point: Point, known: Sequence[Record], parts: Sequence[str], missing: Sequence[DefenceSpec], threads: int
) -> float | None:
    """Seconds of the parts and the defences that a run lacks: medians of runs like it; None without any.

    Parts are gone by runs with the same attack, where there are any.
    """
    wanted = _alike(point.spec.table())
    alike = [record for record in known if _alike(record.spec) == wanted]
    if not alike:
        return None
    same = [record for record in alike if record.spec["attack"]["name"] == point.spec.attack_name] or alike
    share = {record.hash: record.environment.threads / threads for record in alike}
    took = [[share[record.hash] * record.seconds[part] for record in same if part in record.seconds] for part in parts]
    for defence in missing:  # on the victim, and as long on the twin
        rows = [(record, row) for record in alike for row in record.defences if row.name == defence.name]
        took.append([2 * share[record.hash] * sum(row.seconds.values()) for record, row in rows])
    return sum(median(each) for each in took if each)


def _alike(spec: Mapping[str, Any]) -> str:
    """What decides how long a training takes."""
    return digest([_images(spec), spec["model"], spec["recipe"]])


def total(ahead: Sequence[Ahead], workers: int) -> tuple[float, int]:
    """Seconds of all that is known, shared by workers, and how many runs are not known."""
    return sum(a.seconds or 0 for a in ahead) / workers, sum(a.seconds is None for a in ahead)


def twin(spec: Mapping[str, Any]) -> str:
    """What stands for the clean twin of a spec's table."""
    return digest([spec["seed"], _images(spec), spec["model"], spec["recipe"]])


def _shared(spec: Mapping[str, Any], surrogate: bool) -> dict[str, str]:
    """What stands for the stages of a spec's table that other runs may share: the twin, and the surrogate if any."""
    own = digest([_images(spec), spec.get("surrogate", spec["model"]), spec["recipe"]])
    return {"twin": twin(spec), **({"surrogate": own} if surrogate else {})}


def _images(spec: Mapping[str, Any]) -> Table:
    """What of a spec decides the training images."""
    return {key: value for key, value in spec["data"].items() if key != "measured"}
