"""`vitrap sweep`: does the runs of a sweep, and displays its progress; with --dry-run it lists them with estimates."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vitrap.cli.console import ProgressBars, complain, out, say, tell_skipped
from vitrap.cli.options import Memory
from vitrap.errors import UserError

if TYPE_CHECKING:
    from vitrap.experiment.spec import Spec
    from vitrap.sweeps.estimate import RunEstimate
    from vitrap.sweeps.grid import Sweep
    from vitrap.sweeps.jobs import Ended, Event

WORTH_SAYING = 60
"""Seconds that a run must take for its estimate to be said."""
ENDING_WORDS = {"done": "done", "kept": "had a record", "failed": "failed"}


def sweep(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="a TOML spec with a [grid]")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="overrides")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="folder of runs and stages")] = Path("runs"),
    workers: Annotated[int | None, typer.Option(help="runs at once; left out: one a GPU, or one a core")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    memory: Memory = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="on a running Ray cluster: HOST:PORT of its head, or auto")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs and about how long they take")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do more than 10,000 runs")] = False,
) -> None:
    """Do the runs of a grid side by side; the next call goes on where this one stopped."""
    from vitrap.sweeps.grid import load_sweep
    from vitrap.sweeps.sweep import sweep as run_sweep

    if workers is not None and ray_address is not None:
        raise UserError(f"--workers {workers} and --ray-address exclude each other: a Ray cluster knows its own cores")
    grid = load_sweep(spec, words or [], any_number=yes)
    if dry_run:
        print_estimates(grid, out_folder, workers, device)
        return
    with ProgressBars() as bars, SweepDisplay(grid, bars) as display:
        ended = run_sweep(
            grid,
            out_folder,
            workers=workers,
            device=device,
            ray_address=ray_address,
            listener=display.show,
        )
    _print_ended(ended, grid, out_folder)


class SweepDisplay:
    """The display of a sweep: a bar for the sweep, a line for each worker, and above them a line for each ended run."""

    def __init__(self, grid: "Sweep", bars: ProgressBars) -> None:
        self.labels = [point.label for point in grid.points]
        self.progress = bars.progress
        self.progress.columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        )  # fmt: skip
        self.counts: Counter[str] = Counter()
        self.lines: dict[int, TaskID] = {}
        self.whole: TaskID | None = None

    def __enter__(self) -> "SweepDisplay":
        return self

    def __exit__(self, *exception: object) -> None:
        for line in self.lines.values():
            self.progress.remove_task(line)

    def show(self, event: "Event") -> None:
        """Show an event of the sweep."""
        from vitrap.sweeps.jobs import Ended, Started

        # The display starts with the first event, so that an error before any run is the only line.
        if self.whole is None:
            self.progress.start()
            self.whole = self.progress.add_task("sweep", total=len(self.labels))
        label = self.labels[event.number]
        # A run has ended: count it, and print its result.
        if isinstance(event, Ended):
            self.counts[event.how] += 1
            text = ", ".join(f"{n} {how}" for how, n in sorted(self.counts.items()))
            self.progress.update(self.whole, advance=1, description=f"sweep: {text}")
            if event.how != "kept":
                say(f"{event.how}: {label}: {event.said}, {event.seconds:.0f} s", self.progress.console)
            return
        # A worker has begun a run, or come further: change its line.
        if event.worker not in self.lines:
            self.lines[event.worker] = self.progress.add_task("", total=None)
        line = self.lines[event.worker]
        if isinstance(event, Started):
            self.progress.reset(line, description=f"  {event.worker + 1}: {escape(label)}", total=None)
        else:
            text = f"  {event.worker + 1}: {escape(label)}: {escape(event.name)}"
            self.progress.update(line, description=text, total=event.total, completed=event.done)


def _print_ended(ended: "Sequence[Ended]", grid: "Sweep", folder: Path) -> None:
    """Print how many runs ended in which way, and each failure in a line; with failures the exit code is 1."""
    counts = Counter(one.how for one in ended)
    text = ", ".join(f"{counts[how]} {word}" for how, word in ENDING_WORDS.items() if counts[how])
    say(f"{grid.name}: {len(ended)} runs: {text}; records: {folder}")
    failed = [one for one in ended if one.how == "failed"]
    for one in failed:
        complain(f"failed: {grid.points[one.number].label}: {one.said}")
    if failed:
        complain("the same call tries failed runs again; failure.json in a run's folder says more")
        raise typer.Exit(1)


def say_estimate(spec: "Spec", folder: Path, device: str, threads: int | None) -> None:
    """Say on stderr about how long a run takes, if that is more than a minute and finished runs like it tell."""
    if not folder.is_dir():
        return
    from vitrap.experiment.records import read_records
    from vitrap.sweeps.estimate import estimate_runs
    from vitrap.sweeps.grid import Point, Sweep
    from vitrap.sweeps.sweep import assign_devices

    (place,), share_of_cores = assign_devices(1, device, 1)
    grid = Sweep(spec.name, (Point({}, spec),))
    (one,) = estimate_runs(grid, read_records(folder), place, threads or share_of_cores)
    if one.seconds and one.seconds > WORTH_SAYING:
        complain(f"about {_span(one.seconds)}, by finished runs like it in {str(folder)!r}")


def print_estimates(grid: "Sweep", folder: Path, workers: int | None, device: str, threads: int | None = None) -> None:
    """List the runs with their state, and estimate how long the rest takes from finished runs like them.

    Where `threads` is given, a worker has so many threads.
    """
    from vitrap.experiment.records import Loaded, read_records
    from vitrap.sweeps.estimate import estimate_runs, total
    from vitrap.sweeps.sweep import assign_devices

    loaded = read_records(folder) if folder.is_dir() else Loaded((), (), ())
    tell_skipped(loaded.skipped)
    devices, share_of_cores = assign_devices(workers, device, len(grid.points))
    estimates = estimate_runs(grid, loaded, devices[0], threads or share_of_cores)
    table = Table("run", "state", "estimate", "defences", "folder", header_style="bold")
    for one in estimates:
        spec = one.point.spec
        names = ", ".join(defence.name for defence in spec.defences)
        table.add_row(escape(one.point.label), one.state, _duration(one), names, f"{escape(spec.name)}-{spec.hash()}")
    out.print(table)
    to_do = sum(one.state != "record there" for one in estimates)
    busy = max(1, min(len(devices), to_do))
    seconds, unknown = total(estimates, busy)
    text = f"about {_span(seconds)} with {busy} worker{'s' * (busy > 1)}" if to_do > unknown else "no estimate"
    some = f"; {_runs(unknown)} without a finished run like it to go by" if unknown else ""
    rest = text if to_do else "nothing to wait for"
    out.print(f"{_runs(len(estimates))}, {to_do} to do: {rest}{some}")


def _runs(n: int) -> str:
    """The number of runs in words."""
    return f"{n} run{'s' * (n != 1)}"


def _duration(one: "RunEstimate") -> str:
    """The estimate of a run as the table has it; empty where the run is done."""
    if one.seconds is None:
        return "unknown"
    return _span(one.seconds) if one.seconds else ""


def _span(seconds: float) -> str:
    """A time in seconds, minutes or hours.

    >>> _span(40), _span(300), _span(9000)
    ('40 s', '5 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
