"""A sweep: the runs of a grid, side by side, each with a record or a failure record at its end."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vitrap.errors import UserError
from vitrap.experiment.store import Store
from vitrap.sweeps.ahead import twin
from vitrap.sweeps.grid import Point, Sweep
from vitrap.sweeps.jobs import Ended, Listener, News, interleaved, job


def ignore(news: News) -> None:
    """Hears nothing."""


def sweep(
    grid: Sweep,
    out: str | Path = "runs",
    *,
    workers: int | None = None,
    device: str = "auto",
    ray: str | None = None,
    hear: Listener = ignore,
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
        ray: address of a running Ray cluster, HOST:PORT or "auto"; None for worker processes of this machine.
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
    jobs = interleaved(jobs, lambda one: twin(one.spec))
    if ray is not None:
        from vitrap.sweeps.on_ray import run_on_ray

        run_on_ray(jobs, ray, 1, heard)
    else:
        _try_data(grid.points, device)
        devices, threads = share(workers, device, len(jobs))
        from vitrap.sweeps.workers import run_local

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
