"""The `vitrap` command: each function with `@app.command()` is a subcommand.

A subcommand parses its arguments, calls one function of the package, and prints the result. It imports what it needs
itself, so that only commands that compute import torch.
"""

import errno
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.markup import escape
from rich.table import Table

from vitrap import registry
from vitrap.cli.console import ProgressBars, complain, out, print_json, say, split
from vitrap.cli.options import Memory, SpecWords
from vitrap.cli.report import report
from vitrap.cli.sweep import print_estimates, say_estimate, sweep
from vitrap.cli.table import table as table_command
from vitrap.errors import UserError, unknown
from vitrap.files import read_json
from vitrap.models.families import listed

if TYPE_CHECKING:
    from vitrap.experiment.defence_rows import Row
    from vitrap.experiment.record import Record
    from vitrap.experiment.spec import Spec

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""How torch says that there is no memory."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A test bench for backdoors in vision transformers.",
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets.")
app.add_typer(data_app, name="data")

OUTCOMES = {
    "screen": "a score for each input at test time",
    "repair": "a model without the backdoor",
    "filter": "a score for each training image",
    "judgement": "whether the model is backdoored",
}
LISTS = ("attacks", "defences", "models", "data")
ELSEWHERE = {
    "NAME": "any other folder of the data cache",
    "imagefolder:PATH": "{train,test}/CLASS/* below PATH",
    "npy:PATH": "a folder of four npy files in the cache's format",
}


def _version(wanted: bool | None) -> None:
    if wanted:
        out.print(f"vitrap {version('vitrap')}")
        raise typer.Exit


@app.callback()
def vitrap(
    show: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    """A test bench for backdoors in vision transformers."""


@app.command()
def run(
    words: SpecWords = None,
    out_folder: Annotated[Path, typer.Option("--out", help="folder of runs and stages")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="of the CPU; they decide the last digits of all figures; default: all cores")
    ] = None,
    memory: Memory = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the record alone on stdout")] = False,
    force: Annotated[bool, typer.Option("--force", help="make victim and record anew")] = False,
    force_all: Annotated[bool, typer.Option("--force-all", help="make every stage anew")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say whether it is done, or about how long it takes")
    ] = False,
) -> None:
    """Implant a backdoor as a spec says and measure it beside its clean twin."""
    from vitrap.experiment.answers import recall, remember, traces_of
    from vitrap.experiment.record import to_table
    from vitrap.experiment.spec import parse_spec, read_spec

    table_of_spec = read_spec(*split(words or []))
    redo = "all" if force_all else "victim" if force else "nothing"
    if dry_run:
        _dry_run(parse_spec(table_of_spec), out_folder, device, threads)
        return

    # This first look goes by the table as it was given, which needs no defaults of attacks, and so no torch. `run`
    # looks again, by the complete spec.
    record = recall(table_of_spec, out_folder, device, threads) if redo == "nothing" else None
    if record is None:
        spec = parse_spec(table_of_spec)
        # Taken before a file is read, so that one that changes during the run makes them invalid.
        traces = traces_of(table_of_spec, device)
        say_estimate(spec, out_folder, device, threads)
        with ProgressBars() as bars:
            from vitrap.experiment.run import run as run_spec

            record = run_spec(spec, out_folder, device=device, threads=threads, redo=redo, progress=bars.step)
        remember(table_of_spec, out_folder, device, out_folder / f"{record.name}-{record.hash}", traces)
    if as_json:
        print_json(to_table(record))
        return
    _print_record(record, out_folder / f"{record.name}-{record.hash}")


@app.command()
def tune(
    path: Annotated[Path, typer.Argument(metavar="SPEC", help="a TOML spec; the choice is written into its [recipe]")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="overrides, for the measuring alone")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    memory: Memory = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="measure, and write nothing")] = False,
) -> None:
    """Time training in each arithmetic on this machine, and write the fastest into a spec."""
    with ProgressBars() as bars:
        from vitrap.experiment.tune import name_of
        from vitrap.experiment.tune import tune as tune_spec

        found = tune_spec(path, words or [], device=device, progress=bars.step, write=not dry_run)
    table = Table("arithmetic", "seconds a step", header_style="bold")
    for name, seconds in found.seconds.items():
        table.add_row(name, f"{seconds:.4f}")
    out.print(table)
    when = "would be written" if dry_run else "written"
    say(f"{name_of(found.arithmetic)}: {when} into {path}")


@app.command()
def defend(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run")],
    defence: Annotated[str, typer.Option("--defence", help="its name; `vitrap list defences` has them all")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="the defence's settings")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    data: Annotated[
        str | None, typer.Option(help="where the run's data are by now: imagefolder:PATH or npy:PATH")
    ] = None,
    memory: Memory = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the defence's row alone on stdout")] = False,
) -> None:
    """Try a defence on a finished run, and add what it does to the run's record."""
    from vitrap.experiment.record import to_table
    from vitrap.experiment.spec import load_defence

    wanted = load_defence(defence, words or [])
    with ProgressBars() as bars:
        from vitrap.experiment.defend import defend as defend_run
        from vitrap.experiment.defend import find_row

        record = defend_run(folder, [wanted], device=device, data=data, progress=bars.step)
    row = find_row(record, wanted)
    assert row is not None
    if as_json:
        print_json(to_table(row))
        return
    _print_defences([row], record)


@app.command()
def poison(
    folder: Annotated[Path, typer.Option("-o", "--output", help="a new folder for the npy files")],
    words: SpecWords = None,
    out_folder: Annotated[Path, typer.Option("--out", help="folder of stages, shared with runs")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    memory: Memory = None,
) -> None:
    """Write a spec's poisoned data set for other tools: images, labels, and which images are poisoned."""
    from vitrap.experiment.spec import load_spec

    spec = load_spec(*split(words or []))
    with ProgressBars() as bars:
        from vitrap.experiment.export import NOTICE
        from vitrap.experiment.export import poison as poison_data

        poison_data(spec, folder, out_folder, device=device, progress=bars.step)
    _print_passed_over(read_json(folder / NOTICE).get("passed_over", ""))
    say(f"poisoned data set: {folder}")


@app.command("list")
def list_names(what: Annotated[str, typer.Argument(help=" | ".join(LISTS))]) -> None:
    """Name what vitrap knows."""
    if what not in LISTS:
        raise unknown("list", what, LISTS)
    if what == "data":
        from vitrap.data.cache import DATASETS

        known = DATASETS | ELSEWHERE
    else:
        known = listed() if what == "models" else registry.headlines("attacks" if what == "attacks" else "defences")
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, meaning in known.items():
        table.add_row(f"[bold]{name}[/]", meaning)
    out.print(table)
    if what == "models":
        out.print("`python -c 'import timm; print(timm.list_models())'` lists timm's names.")


@app.command()
def explain(name: Annotated[str, typer.Argument(help="an attack or a defence")]) -> None:
    """Say what an attack or a defence is: paper, what it needs, every parameter with unit, default and source."""
    attacks = registry.names("attacks")
    defences = registry.names("defences")
    if name not in (*attacks, *defences):
        raise unknown("attack or defence", name, [*attacks, *defences])
    kind = registry.get("attacks" if name in attacks else "defences", name)
    card = kind.card
    out.print(f"[bold]{name}[/]: {card.title}")
    link = f", https://arxiv.org/abs/{card.arxiv}" if card.arxiv else ""
    out.print(", ".join(filter(None, [card.authors, card.venue, str(card.year)])) + link)
    for line in _threats(kind) if name in attacks else _needs(kind):
        out.print(line)
    table = Table(
        "symbol", "parameter", "default", "source", "meaning \\[unit; range]", header_style="bold", pad_edge=False
    )
    table.columns[1].no_wrap = True
    for f in fields(kind):
        about = f.metadata["param"]
        default = about.default_from or ("none" if f.default in (None, MISSING) else f.default)
        facts = "; ".join(filter(None, [about.unit, about.range()]))
        meaning = about.doc + (f" \\[{facts}]" if facts else "")
        table.add_row(about.symbol, f.name, str(default), about.source, meaning)
    out.print(table)
    out.print(
        "source: paper = stated there; code = read in its public code; field = as commonly benchmarked;"
        " assumed = stated nowhere, our choice"
    )


def _threats(kind: Any) -> Iterator[str]:
    """A line for each setting of an attack: what the attacker controls, and what the attack needs."""
    for attack in registry.variants(kind):
        yield (
            (f"setting {attack.setting}: " if hasattr(attack, "setting") else "")
            + f"threat: the attacker controls the {attack.threat}; labels: {attack.labels};"
            f" surrogate: {'needed' if attack.needs_surrogate else 'none'}"
        )


def _needs(kind: Any) -> Iterator[str]:
    """A line for each setting of a defence: what it returns, and what it needs."""
    for defence in registry.variants(kind):
        things = {
            "the training set": defence.needs_train,
            "a model with plain token attention": defence.needs_attention,
        }
        needs = "".join(f", {thing}" for thing, needed in things.items() if needed)
        head = f"setting {defence.setting}: " if hasattr(defence, "setting") else ""
        yield f"{head}{defence.kind}: {OUTCOMES[defence.kind]}; needs a few clean images{needs}"


@data_app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="cifar10, cifar100, gtsrb or tiny-imagenet")],
    source: Annotated[str | None, typer.Option("--from", help="an archive, a folder or a URL")] = None,
) -> None:
    """Fill the data cache once."""
    from vitrap.data.cache import cache_folder
    from vitrap.data.prepare import prepare as prepare_data

    with ProgressBars() as bars:
        place = prepare_data(
            name,
            source,
            cache_folder(),
            progress=bars.fraction(f"prepare {name}"),
            waiting=lambda: bars.step(f"wait for another process that prepares {name}", None),
        )
    say(f"{name} is in {place}")


app.command()(sweep)
app.command()(report)
app.command()(table_command)


def _dry_run(spec: "Spec", folder: Path, device: str, threads: int | None) -> None:
    """Check a spec as `run` does before it starts, and list it like a sweep of one run."""
    from vitrap.sweeps.grid import Point, Sweep

    with ProgressBars() as bars:
        from vitrap.experiment.plan import make_plan

        make_plan(spec, device, progress=bars.step)
    print_estimates(Sweep(spec.name, (Point({}, spec),)), folder, 1, device, threads)


def _print_record(record: "Record", folder: Path) -> None:
    """Print a record: what was poisoned, the measures of victim and twin, the diagnosis, and all defences."""
    from vitrap.metrics.diagnosis import diagnose, in_a_line
    from vitrap.report.tables import adapted, measured_on, measures

    data = record.data
    out.print(
        f"[bold]{escape(record.name)}[/] seed {record.seed}: {data.n_poisoned} of {data.n_train} training"
        f" images poisoned, {data.n_test} {measured_on(record.spec)} images"
    )
    table = Table("measure", "victim", "clean twin", "n", header_style="bold")
    for row in measures(record.victim):
        table.add_row(*row)
    out.print(table)
    _print_passed_over(data.passed_over)
    for line in adapted(record.models):
        say(line)
    say(in_a_line(diagnose(record.victim, record.data.classes)))
    _print_defences(record.defences, record)
    say(f"record, pictures, model and trigger: {folder}")


def _print_passed_over(files: str) -> None:
    """Name the files of an image folder that are no images."""
    if files:
        say(f"files of the image folder that are no images, and were passed over: {files}")


def _print_defences(rows: "Sequence[Row]", record: "Record") -> None:
    """Print a table for each of these rows of a record's defences."""
    from vitrap.experiment.defence_rows import row_settings
    from vitrap.metrics.diagnosis import backdoor_faults, in_short
    from vitrap.report.tables import defence_measures

    faults = in_short(backdoor_faults(record.victim, record.data.classes))
    for row in rows:
        settings = ", ".join(f"{k} = {v}" for k, v in row_settings(row).items() if v is not None)
        seconds = ", ".join(f"{name} {took:.1f} s" for name, took in row.seconds.items())
        out.print(f"[bold]{escape(row.name)}[/] ({escape(settings)}): {seconds}")
        if faults:
            say(f"no backdoor ({', '.join(faults)}): no credit to the defence")
        table = Table("measure", "victim", "clean twin", "n", header_style="bold")
        for line in defence_measures(row, backdoor=not faults):
            table.add_row(*line)
        out.print(table)


def main() -> None:
    """Run the command; a user's mistake is printed as one line, with exit code 2."""
    try:
        try:
            app()
        finally:
            _flush(sys.stdout)  # output that cannot be written is a failure, too
    except UserError as mistake:
        complain(str(mistake))
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of a pipe, `head` say, has closed it
        raise SystemExit(1) from None
    except OSError as failure:  # the disk is full, say: the draft under way is removed, finished stages stay
        named = f"{failure.filename!r} cannot be written or read ({failure.strerror})"
        what = named if failure.filename else str(failure)
        full = failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "check its permissions"
        complain(f"{what}; {remedy} or choose another folder, then repeat the command")
        raise SystemExit(2 if failure.filename else 1) from None
    except (MemoryError, RuntimeError) as failure:
        # Torch says in words alone that it found no memory.
        if isinstance(failure, RuntimeError) and not any(each in str(failure) for each in NO_MEMORY):
            raise
        complain("there is not enough memory; lower data.size, recipe.batch_size or the size of the network")
        raise SystemExit(2) from None


def process() -> None:
    """Run `main` as a process, with rare garbage collections and none at exit.

    Importing torch and timm makes many objects and hardly any garbage; `benchmarks/garbage.py` measures what collecting
    costs.
    """
    gc.set_threshold(100_000, 50, 50)
    try:
        main()
    finally:
        gc.freeze()
        try:
            _flush(sys.stdout)
        except OSError:  # `main` has printed this failure; without this, Python would print it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush(stream: TextIO | None) -> None:
    """Write out all that was printed; the stream is None if it was closed before Python started."""
    if stream is not None:
        stream.flush()


if __name__ == "__main__":
    process()
