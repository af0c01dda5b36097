"""`vitrap sweep`: many runs, what is done of them, and what is ahead."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vitrap.cli.console import Bars, err, out, tell_skipped
from vitrap.cli.options import Memory
from vitrap.errors import UserError

if TYPE_CHECKING:
    from vitrap.sweeps.ahead import RunEstimate
    from vitrap.sweeps.grid import Sweep
    from vitrap.sweeps.jobs import Ended, Event


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
        print_ahead(grid, out_folder, workers, device)
        return
    with Bars() as bars, Board(grid, bars) as board:
        ended = run_sweep(
            grid,
            out_folder,
            workers=workers,
            device=device,
            ray=ray_address,
            hear=board.hear,
        )
    _print_ended(ended, grid, out_folder)


class Board:
    """What the workers are at: one line for the sweep, one for each of them; a run that ends is told above."""

    def __init__(self, grid: "Sweep", bars: Bars) -> None:
        self.labels = [point.label for point in grid.points]
        self.progress = bars.progress
        self.progress.columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        )  # fmt: skip
        self.counts: Counter[str] = Counter()
        self.lines: dict[int, TaskID] = {}
        self.whole: TaskID | None = None

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *exception: object) -> None:
        for line in self.lines.values():
            self.progress.remove_task(line)

    def hear(self, news: "Event") -> None:
        """Show what happened."""
        from vitrap.sweeps.jobs import Ended, Started

        if self.whole is None:  # only now, so that a refusal before any run is the only line
            self.progress.start()
            self.whole = self.progress.add_task("sweep", total=len(self.labels))
        label = escape(self.labels[news.number])
        if isinstance(news, Ended):
            self.counts[news.how] += 1
            told = ", ".join(f"{n} {how}" for how, n in sorted(self.counts.items()))
            self.progress.update(self.whole, advance=1, description=f"sweep: {told}")
            line = f"{news.how}: {label}: {escape(news.said)}, {news.seconds:.0f} s"
            if news.how != "kept":
                self.progress.console.print(line, highlight=False, soft_wrap=True)
            return
        if news.worker not in self.lines:
            self.lines[news.worker] = self.progress.add_task("", total=None)
        line = self.lines[news.worker]
        if isinstance(news, Started):
            self.progress.reset(line, description=f"  {news.worker + 1}: {label}", total=None)
        else:
            told = f"  {news.worker + 1}: {label}: {escape(news.name)}"
            self.progress.update(line, description=told, total=news.total, completed=news.done)


def _print_ended(ended: "Sequence[Ended]", grid: "Sweep", folder: Path) -> None:
    """How many runs ended how; failures one a line, and then exit code 1."""
    counts = Counter(one.how for one in ended)
    told = ", ".join(f"{counts[how]} {word}" for how, word in KINDS.items() if counts[how])
    out.print(
        f"{grid.name}: {len(ended)} runs: {told}; records: {folder}", highlight=False, markup=False, soft_wrap=True
    )
    failed = [one for one in ended if one.how == "failed"]
    for one in failed:
        err.print(f"vitrap: failed: {grid.points[one.number].label}: {one.said}", highlight=False, markup=False,
                  soft_wrap=True)  # fmt: skip
    if failed:
        more = "vitrap: the same call tries failed runs again; failure.json in a run's folder says more"
        err.print(more, highlight=False, soft_wrap=True)
        raise typer.Exit(1)


KINDS = {"done": "done", "kept": "had a record", "failed": "failed"}


def print_ahead(grid: "Sweep", folder: Path, workers: int | None, device: str) -> None:
    """List runs, what there is of each, and about how long the rest takes by finished runs like them."""
    from vitrap.experiment.records import Loaded, read_records
    from vitrap.sweeps.ahead import look_ahead, total
    from vitrap.sweeps.sweep import share

    loaded = read_records(folder) if folder.is_dir() else Loaded((), (), ())
    tell_skipped(loaded.skipped)
    devices, threads = share(workers, device, len(grid.points))
    ahead = look_ahead(grid, loaded, devices[0], threads)
    table = Table("run", "state", "estimate", "defences", "folder", header_style="bold")
    for one in ahead:
        spec = one.point.spec
        names = ", ".join(defence.name for defence in spec.defences)
        table.add_row(escape(one.point.label), one.state, _duration(one), names, f"{escape(spec.name)}-{spec.hash()}")
    out.print(table)
    to_do = sum(one.state != "record there" for one in ahead)
    crew = max(1, min(len(devices), to_do))
    seconds, unknown = total(ahead, crew)
    told = f"about {_span(seconds)} with {crew} worker{'s' * (crew > 1)}" if to_do > unknown else "no estimate"
    some = f"; {_runs(unknown)} without a finished run like it to go by" if unknown else ""
    out.print(f"{_runs(len(ahead))}, {to_do} to do: {told if to_do else 'nothing to wait for'}{some}", highlight=False)


def _runs(n: int) -> str:
    return f"{n} run{'s' * (n != 1)}"


def _duration(one: "RunEstimate") -> str:
    return "unknown" if one.seconds is None else _span(one.seconds) if one.seconds else ""


def _span(seconds: float) -> str:
    """A time as people say it.

    >>> _span(40), _span(300), _span(9000)
    ('40 s', '5 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
