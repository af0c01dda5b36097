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
from vitrap.experiment.records import FAILURE, Shelf, read_records
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
        workers: how many runs at once on this machine (with Ray: how many cores a run gets is one, and the cluster
            decides); None for one a GPU, or one a core.
        device: "auto" (GPUs shared out), "cpu", "cuda" or "cuda:N".
        ray: address of a Ray cluster, "local" to start one here; None for worker processes of this machine.
        hear: is told what happens.

    Returns:
        How each run ended, in the order of the grid.

    Raises:
        UserError: the folder cannot be written, the data are not there, or Ray cannot be had.
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

        Path(out).mkdir(parents=True, exist_ok=True)
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

    gpus = torch.cuda.device_count() if device == "auto" and torch.cuda.is_available() else 0
    crew = min(workers or gpus or cores(), runs)
    devices = [f"cuda:{i % gpus}" if gpus else device for i in range(crew)]
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


def look_ahead(grid: Sweep, out: str | Path) -> list[Ahead]:
    """What a sweep has to do, with an estimate from finished runs of the same data, model and recipe.

    A record's keys are not tried here: where code has changed since, a run that seems done will be made again.
    """
    shelf = read_records(out) if Path(out).is_dir() else Shelf((), (), ())
    records = [found.content for found in shelf.records if "seconds" in found.content]
    made = {_twin(record["spec"]) for record in records}
    surrogates = {_surrogate(record["spec"]) for record in records if "surrogate" in record["seconds"]}
    done, ahead = {(r["name"], r["hash"]): r for r in records}, []
    kin: dict[str, list[Table]] = {}
    for record in records:
        kin.setdefault(_kin(record["spec"]), []).append(record)
    for point in grid.points:
        spec = point.spec.table()
        state = _state(point, Path(out), done.get((point.spec.name, point.spec.hash())))
        seconds: float | None = 0.0
        if state != "record there":
            seconds = _cost(point, kin.get(_kin(spec), []), _twin(spec) in made, _surrogate(spec) in surrogates, state)
            made.add(_twin(spec))
            surrogates.add(_surrogate(spec))
        ahead.append(Ahead(point, state, seconds))
    return ahead


def _state(point: Point, out: Path, record: Table | None) -> State:
    if record is None:
        failed = (out / f"{point.spec.name}-{point.spec.hash()}" / FAILURE).exists()
        return "failed before" if failed else "to run"
    rows = [(row["name"], row["params"]) for row in record.get("defences", [])]
    return "record there" if all(_row(d) in rows for d in point.spec.defences) else "defences missing"


def _row(defence: Any) -> tuple[str, Table]:
    table = defence.table()
    return table.pop("name"), table


def _kin(spec: Mapping[str, Any]) -> str:
    """What decides how long a training takes."""
    return digest([spec["data"], spec["model"], spec["recipe"]])


def _cost(point: Point, alike: Sequence[Table], twin: bool, surrogate: bool, state: State) -> float | None:
    """Seconds of the parts that are still to be made; of runs with the same attack, where there are any."""
    if not alike:
        return None
    same = [record for record in alike if record["spec"]["attack"]["name"] == point.spec.attack] or alike
    parts = [] if state == "defences missing" else ["poison", "victim", "fit", "measure"]
    parts += [] if twin else ["twin"]
    parts += [] if surrogate else ["surrogate"]
    cost = sum(median(found) for part in parts if (found := [r["seconds"][part] for r in same if part in r["seconds"]]))
    return cost + sum(_defending(defence.name, alike) for defence in point.spec.defences)


def _defending(name: str, records: Sequence[Table]) -> float:
    """Seconds of a defence on the victim, and as many on the twin."""
    rows = [row for record in records for row in record.get("defences", []) if row["name"] == name]
    return 2 * median(sum(row["seconds"].values()) for row in rows) if rows else 0.0


def total(ahead: Sequence[Ahead], workers: int) -> tuple[float, int]:
    """Seconds of all that is known, shared by workers, and how many runs are not known."""
    return sum(a.seconds or 0 for a in ahead) / workers, sum(a.seconds is None for a in ahead)
