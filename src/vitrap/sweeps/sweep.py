"""`sweep`: does the runs of a grid side by side; each leaves a record, or a failure record."""

import os
from collections.abc import Sequence
from pathlib import Path

from vitrap.errors import UserError
from vitrap.experiment.store import Store
from vitrap.sweeps.estimate import twin_key
from vitrap.sweeps.grid import Point, Sweep
from vitrap.sweeps.jobs import Ended, Event, Listener, interleaved, job


def sweep(
    grid: Sweep,
    out: str | Path = "runs",
    *,
    workers: int | None = None,
    device: str = "auto",
    ray_address: str | None = None,
    listener: Listener = lambda event: None,
) -> list[Ended]:
    """Do every run of a sweep; a run whose record still holds is not made again.

    A failed run leaves `failure.json` in its folder and does not stop the others. If the same call is made again, it
    does the runs that are missing or have failed. From a script, call it below `if __name__ == "__main__":`, since
    worker processes import the script.

    Args:
        grid: the runs: `load_sweep(path)`.
        out: folder of runs and stages; with Ray one that all nodes see.
        workers: how many runs at once on this machine; None for one on each GPU or, without GPUs, on each core. On Ray
            the cluster decides: a run gets a GPU where there are any, else a core.
        device: "auto" or "cuda" (all GPUs), "cpu" or "cuda:N".
        ray_address: address of a running Ray cluster, HOST:PORT or "auto"; None for worker processes of this machine.
        listener: called with each event: a run has started, come further, or ended.

    Returns:
        How each run ended, in the order of the grid.

    Raises:
        UserError: the folder cannot be written, the data are not there (on Ray, where each node has its own, that is a
            failure of the runs), or Ray cannot be had.
    """
    Store(Path(out)).check()
    ended: dict[int, Ended] = {}

    def note(event: Event) -> None:
        if isinstance(event, Ended):
            ended[event.number] = event
        listener(event)

    # Runs that need different twins come first, so that workers train the twins side by side.
    jobs = [job(i, point.spec, Path(out), device) for i, point in enumerate(grid.points)]
    jobs = interleaved(jobs, lambda one: twin_key(one.spec))
    if ray_address is not None:
        from vitrap.sweeps.on_ray import run_on_ray

        run_on_ray(jobs, ray_address, 1, note)
    else:
        # On this machine all workers read the same data: missing data are found before any of them starts.
        _try_data(grid.points, device)
        devices, threads = assign_devices(workers, device, len(jobs))
        from vitrap.sweeps.workers import run_local

        run_local(jobs, devices, threads, note)
    return [ended[i] for i in sorted(ended)]


def assign_devices(workers: int | None, device: str, runs: int) -> tuple[list[str], int]:
    """The device of each worker, and how many threads every worker gets: GPUs and cores are divided among them.

    Raises:
        UserError: `workers` is less than 1.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} is too few; give 1 or more")
    import torch

    gpus = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    # By default a worker for each GPU, for the one GPU that is named, or for each core.
    default = gpus or (1 if device.startswith("cuda:") else cores())
    count = min(workers or default, runs)
    single = "cpu" if device == "auto" else device
    devices = [f"cuda:{i % gpus}" if gpus else single for i in range(count)]
    return devices, max(1, cores() // max(1, count))


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _try_data(points: Sequence[Point], device: str) -> None:
    """Open each data set once before any worker starts: a missing one is an error of the call, not of every run."""
    from vitrap.data.sources import open_data
    from vitrap.experiment.plan import choose_device

    choose_device(device)
    for data in {point.spec.data for point in points}:
        open_data(data.name, data.size, data.limit, holdout=data.holdout)
