"""What vitrap makes of a GPU: one script that checks, times and trains, prints each part as it is done, writes JSON.

All of it is planned for less than nine minutes on a GPU of the H200's class; `--small` is the same code on tiny
networks, to be run anywhere. What fails says why and stops nothing else.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import gpu_rows, victim
from benchmarks.gpu_rows import NEEDS_GPU, Bench, Found, Row
from vitrap.experiment.machine import environment
from vitrap.experiment.record import to_table

PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "peak": gpu_rows.peak,
    "check": gpu_rows.check,
    "step": gpu_rows.step,
    "trigger": gpu_rows.trigger,
    "together": gpu_rows.models_together,
    "accuracy": victim.accuracy,
}
BUDGET = 525.0
"""Seconds that everything may take on a GPU; rows that can be spared are left out, and training is fitted to it."""
AHEAD = {"trigger": 20.0, "together": 65.0, "accuracy": victim.NEEDED}
"""Seconds that a part is left by those before it."""
out, err = Console(width=120), Console(stderr=True)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    start, asked = time.monotonic(), parse(words)
    device: str = asked.device
    parts, found = asked.parts or list(PARTS), list[Found]()
    for number, part in enumerate(parts):
        ahead = 0.0 if asked.small else sum(AHEAD.get(name, 0.0) for name in parts[number + 1 :])
        rows = list[Found]()
        for row in measured(part, Bench(device, asked.small, start + BUDGET, ahead)):
            rows.append(row)
            write(asked.json, [*found, *rows], device, asked.small, time.monotonic() - start)
        found += rows
        out.print(shown(part, rows, device))
    out.print(verdict(found, device, asked.small), highlight=False)
    out.print(f"{time.monotonic() - start:.0f} s; figures in {asked.json}", highlight=False)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS) + "; none: all")
    parser.add_argument("--small", action="store_true", help="tiny networks: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="PATH", default=Path("bench.json"), help="write the figures there")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    asked = parser.parse_args(words)
    for part in asked.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; known: {', '.join(PARTS)}")
    if asked.device == "auto":
        asked.device = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.device == "cpu" and not asked.small:
        parser.error("whole networks need a GPU; give --small on a CPU")
    return asked


def measured(part: str, bench: Bench) -> Iterator[Found]:
    """The rows of a part; one that fails is a row that says so."""
    try:
        for name, row in PARTS[part](bench):
            err.print(f"measuring {part}: {name}", highlight=False)
            yield attempt(part, name, row)
    except Exception as error:  # noqa: BLE001 - whatever it is, the next part can do without this one
        yield failure(part, "its set-up", error)


def attempt(part: str, name: str, row: Callable[[], Found]) -> Found:
    """A row, or that it failed."""
    try:
        return row()
    except Exception as error:  # noqa: BLE001 - out of memory, no compiler: the next row may not need it
        return failure(part, name, error)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def failure(part: str, name: str, error: Exception) -> Found:
    """What went wrong, in a line."""
    lines = str(error).strip().splitlines() or [""]
    return Found(part, name, note=f"{type(error).__name__}: {lines[0][:300]}", failed=True)


def shown(part: str, rows: Sequence[Found], device: str) -> Table:
    """The rows of a part as a table."""
    title = f"{part}, on {device}; a ratio is ours over plain, in turns"
    table = Table("what", "figures", title=title, title_justify="left", header_style="bold")
    for heading in ("ratio", "min - max", "n", "wanted", "kept"):
        table.add_column(heading, justify="left" if heading in ("wanted", "kept") else "right")
    for row in rows:
        what = f"{row.name}\n[dim]{row.note.replace('[', chr(92) + '[')}[/]" if row.note else row.name
        values = ", ".join(f"{name}: {value:.4g}" for name, value in row.values.items())
        ratio, spread, n = "", "", ""
        if row.figure:
            ratios = row.figure.ratios
            ratio, spread, n = f"{row.figure.ratio:.3f}", f"{min(ratios):.2f} - {max(ratios):.2f}", str(len(ratios))
            values = f"{values}\n{'throughput' if row.figure.speed else 'time'}".strip()
        table.add_row(what, values, ratio, spread, n, row.wanted, kept(row, device), end_section=True)
    return table


def kept(row: Found, device: str) -> str:
    """Whether a bound is kept, in words."""
    if row.failed:
        return "[bold red]FAILED[/]"
    if row.met is not None:
        return "yes" if row.met else "[bold red]MISSED[/]"
    return "" if not row.wanted else NEEDS_GPU if device == "cpu" else "not measured"


def verdict(rows: Sequence[Found], device: str, small: bool) -> str:
    """What was wanted, in a line."""
    missed = [row.name for row in rows if row.met is False]
    failed = [row.name for row in rows if row.failed]
    open_still = [row.name for row in rows if row.wanted and row.met is None and not row.failed]
    said = [f"wanted and missed: {'; '.join(missed)}" if missed else "no measured bound is missed"]
    said += [f"failed: {'; '.join(failed)}"] if failed else []
    said += [f"{len(open_still)} bounds are not measured"] if open_still else []
    said += ["all GPU figures are missing: this was a CPU"] if device == "cpu" else []
    return "; ".join(said) + (" (--small: networks too small to say anything of speed)" if small else "")


def write(path: Path, rows: Sequence[Found], device: str, small: bool, seconds: float) -> None:
    """All rows so far as JSON, in one step, so that what is cut off leaves them whole."""
    content = {"small": small, "seconds": seconds, "environment": about(device), "rows": [row.table() for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def about(device: str) -> dict[str, Any]:
    """What it ran on; short where vitrap runs from its folder without being installed."""
    try:
        found: dict[str, Any] = to_table(environment(torch.device(device)))
    except PackageNotFoundError:
        found = {"device_kind": device, "torch": torch.__version__}
    if device != "cpu":
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "device_memory_bytes": card.total_memory, "cuda": torch.version.cuda}
    return found


if __name__ == "__main__":
    main()
