"""A sweep: the runs of a grid, side by side, each with a record or a failure record at its end."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from vitrap.errors import UserError
from vitrap.experiment.grid import Point, Sweep
from vitrap.experiment.jobs import Ended, Hear, News, job, turns
from vitrap.experiment.record import Table
from vitrap.experiment.records import Shelf
from vitrap.experiment.spec import digest
from vitrap.experiment.store import Store

State = Literal["record there", "defences missing", "failed before", "to run"]


def deaf(news: News) -> None:
    """Hears nothing."""


def sweep(
    grid: Sweep,
    out: str | Path = "runs",
    *,
    workers: int | None = None,
    device: str = "auto",
    ray: str | None = None,
    hear: Hear = deaf,
) -> list[Ended]:
    """Do every run of a sweep, each at most once; what has a record that still holds is kept.

    A failed run leaves `failure.json` in its folder and does not stop the others. The same call again goes on from
    what is there, and tries failed runs again. From a script, call it below `if __name__ == "__main__":`, since worker
    processes import the script.

    Args:
        grid: the runs: `load_sweep(path)`.
        out: folder of runs and stages; with Ray one that all nodes see.
        workers: how many runs at once on this machine; None for one a GPU, or one a core. On Ray the cluster decides:
            a run gets a GPU where there are any, or a core.
        device: "auto" or "cuda" (GPUs shared out), "cpu" or "cuda:N".
        ray: address of a Ray cluster, "local" to start one here; None for worker processes of this machine.
        hear: is told what happens.

    Returns:
        How each run ended, in the order of the grid.

    Raises:
        UserError: the folder cannot be written, the data are not there (on Ray, where each node has its own, that is a
            failure of the runs), or Ray cannot be had.
    """
    Store(Path(out)).check()
    ended: dict[int, Ended] = {}

    def heard(news: News) -> None:
        if isinstance(news, Ended):
            ended[news.number] = news
        hear(news)

    jobs = [replace(job(i, point.label, point.spec, Path(out)), device=device) for i, point in enumerate(grid.points)]
    jobs = turns(jobs, lambda one: _twin(one.spec))
    if ray is not None:
        from vitrap.experiment.on_ray import run_on_ray

        run_on_ray(jobs, None if ray == "local" else ray, 1, heard)
    else:
        _try_data(grid.points, device)
        devices, threads = share(workers, device, len(jobs))
        from vitrap.experiment.workers import run_local

        run_local(jobs, devices, threads, heard)
    return [ended[i] for i in sorted(ended)]


def share(workers: int | None, device: str, runs: int) -> tuple[list[str], int]:
    """What each worker computes on, and how many threads it has: GPUs and cores shared out, none used twice over.

    Raises:
        UserError: no worker is asked for.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} is too few; give 1 or more")
    import torch

    gpus = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    own = gpus or (1 if device.startswith("cuda:") else cores())
    crew = min(workers or own, runs)
    devices = [f"cuda:{i % gpus}" if gpus else device if device != "auto" else "cpu" for i in range(crew)]
    return devices, max(1, cores() // max(1, crew))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _try_data(points: Sequence[Point], device: str) -> None:
    """Open each data set once before any worker starts, so that a missing one is a refusal, not a row of failures."""
    from vitrap.data.sources import open_data
    from vitrap.experiment.plan import choose_device

    choose_device(device)
    for data in {point.spec.data for point in points}:
        open_data(data.name, data.size, data.limit, holdout=data.holdout)


def _twin(spec: Mapping[str, Any]) -> str:
    """What stands for the clean twin of a spec's table."""
    return digest({key: spec[key] for key in ("seed", "data", "model", "recipe")})


def _surrogate(spec: Mapping[str, Any]) -> str:
    return digest([spec["data"], spec.get("surrogate", spec["model"]), spec["recipe"]])


# ---- what there is to do


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
    made = {_twin(record["spec"]) for record in records}
    made |= {_surrogate(record["spec"]) for record in records if "surrogate" in record["seconds"]}
    kin: dict[str, list[Table]] = {}
    for record in records:
        kin.setdefault(_kin(record["spec"]), []).append(record)
    ahead = []
    for point in grid.points:
        key, spec = (point.spec.name, point.spec.hash()), point.spec.table()
        missing = [d for d in point.spec.defences if not _has(done.get(key), d)]
        state: State = "record there" if not missing else "defences missing"
        state = state if key in done else "failed before" if key in failed else "to run"
        alike, seconds = kin.get(_kin(spec), []), 0.0
        if state != "record there":
            shared = {"twin": _twin(spec)} | (
                {"surrogate": _surrogate(spec)} if point.spec.params.needs_surrogate else {}
            )
            own = () if state == "defences missing" else ("poison", "victim", "fit", "measure")
            parts = [*own, *(part for part, key in shared.items() if key not in made)]
            seconds = _cost(point, alike, parts, missing, threads) if alike else None
            made |= set(shared.values())
        ahead.append(Ahead(point, state, seconds))
    return ahead


def _timed(record: Table, kind: str) -> bool:
    """Whether a record says how long the run took on this kind of device."""
    whole = {"data", "model", "recipe", "attack"} <= record["spec"].keys()
    where = record.get("environment")
    return whole and isinstance(record.get("seconds"), dict) and isinstance(where, dict) and (
        where.get("device_kind") == kind and isinstance(where.get("threads"), int)
    )  # fmt: skip


def _has(record: Table | None, defence: Any) -> bool:
    table = defence.table()
    name = table.pop("name")
    rows = record.get("defences") or [] if record else []
    return any((row["name"], row["params"]) == (name, table) for row in rows)


def _kin(spec: Mapping[str, Any]) -> str:
    """What decides how long a training takes."""
    return digest([spec["data"], spec["model"], spec["recipe"]])


def _cost(point: Point, alike: Sequence[Table], parts: Sequence[str], missing: Sequence[Any], threads: int) -> float:
    """Seconds of what is still to be made; of runs with the same attack, where there are any."""
    same = [record for record in alike if record["spec"]["attack"]["name"] == point.spec.attack] or alike
    known = [[_seconds(record, record["seconds"].get(part), threads) for record in same] for part in parts]
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
