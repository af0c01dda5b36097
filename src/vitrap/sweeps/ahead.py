"""What a sweep has ahead of it: what there is of each run, and about how long the rest takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from vitrap.experiment.named import defence_settings
from vitrap.experiment.record import Table
from vitrap.experiment.records import Shelf
from vitrap.experiment.spec import digest
from vitrap.sweeps.grid import Point, Sweep

State = Literal["record there", "defences missing", "failed before", "to run"]


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


def look_ahead(grid: Sweep, shelf: Shelf, device: str = "cpu", threads: int = 1) -> list[Ahead]:
    """What a sweep has to do, with an estimate from finished runs of the same data, model and recipe.

    A record's keys are not tried here: where code has changed since, a run that seems done will be made again.

    Args:
        grid: the runs.
        shelf: what the folder of runs holds.
        device: what workers compute on; only runs on its kind are gone by.
        threads: of a worker; a run that had more or fewer is taken to have done as much a second with each of them.
    """
    done = {(found.content["name"], found.content["hash"]): found.content for found in shelf.records}
    failed = {(found.content["name"], found.content["hash"]) for found in shelf.failures}
    records = [record for record in done.values() if _timed(record, device.partition(":")[0])]
    made = {twin(record["spec"]) for record in records}
    made |= {_surrogate(record["spec"]) for record in records if "surrogate" in record["seconds"]}
    similar: dict[str, list[Table]] = {}
    for record in records:
        similar.setdefault(_alike(record["spec"]), []).append(record)
    ahead = []
    for point in grid.points:
        key, spec = (point.spec.name, point.spec.hash()), point.spec.table()
        missing = [d for d in point.spec.defences if not _has(done.get(key), d)]
        state: State = "record there" if not missing else "defences missing"
        state = state if key in done else "failed before" if key in failed else "to run"
        alike, seconds = similar.get(_alike(spec), []), 0.0
        if state != "record there":
            shared = {"twin": twin(spec)}
            if point.spec.attack.needs_surrogate:
                shared["surrogate"] = _surrogate(spec)
            own = () if state == "defences missing" else ("poison", "victim", "fit", "measure")
            parts = [*own, *(part for part, stage in shared.items() if stage not in made)]
            seconds = _cost(point, alike, parts, missing, threads) if alike else None
            made |= set(shared.values())
        ahead.append(Ahead(point, state, seconds))
    return ahead


def _timed(record: Table, kind: str) -> bool:
    """Whether a record says how long the run took on this kind of device."""
    whole = {"seed", "data", "model", "recipe", "attack"} <= record["spec"].keys()
    where = record.get("environment")
    return whole and isinstance(record.get("seconds"), dict) and isinstance(where, dict) and (
        where.get("device_kind") == kind and isinstance(where.get("threads"), int)
    )  # fmt: skip


def _has(record: Table | None, defence: Any) -> bool:
    rows = record.get("defences") or [] if record else []
    return any({"name": row["name"], **defence_settings(row)} == defence.table() for row in rows)


def _alike(spec: Mapping[str, Any]) -> str:
    """What decides how long a training takes."""
    return digest([_images(spec), spec["model"], spec["recipe"]])


def _cost(point: Point, alike: Sequence[Table], parts: Sequence[str], missing: Sequence[Any], threads: int) -> float:
    """Seconds of what is still to be made; of runs with the same attack, where there are any."""
    same = [record for record in alike if record["spec"]["attack"]["name"] == point.spec.attack_name] or alike
    known = [
        [_seconds(record, record["seconds"][part], threads) for record in same if part in record["seconds"]]
        for part in parts
    ]
    for defence in missing:  # on the victim, and as long on the twin
        rows = [
            (r, row.get("seconds")) for r in alike for row in r.get("defences") or [] if row["name"] == defence.name
        ]
        known.append([2 * sum(_seconds(r, s, threads) for s in took.values())
                      for r, took in rows if isinstance(took, dict)])  # fmt: skip
    return sum(median(each) for each in known if each)


def _seconds(record: Table, took: Any, threads: int) -> float:
    """A time of a record, as a worker with so many threads would need it."""
    return took * record["environment"]["threads"] / threads if isinstance(took, int | float) else 0.0


def total(ahead: Sequence[Ahead], workers: int) -> tuple[float, int]:
    """Seconds of all that is known, shared by workers, and how many runs are not known."""
    return sum(a.seconds or 0 for a in ahead) / workers, sum(a.seconds is None for a in ahead)


def twin(spec: Mapping[str, Any]) -> str:
    """What stands for the clean twin of a spec's table."""
    return digest([spec["seed"], _images(spec), spec["model"], spec["recipe"]])


def _surrogate(spec: Mapping[str, Any]) -> str:
    return digest([_images(spec), spec.get("surrogate", spec["model"]), spec["recipe"]])


def _images(spec: Mapping[str, Any]) -> Table:
    """What of a spec decides the training images."""
    return {key: value for key, value in spec["data"].items() if key != "measured"}
