"""Run all benchmarks, or those named; print a table, and write the figures as JSON."""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import (
    arithmetic,
    first_result,
    garbage,
    memory,
    objective,
    poisoning,
    records,
    screens,
    start_up,
    streaming,
    together,
    training,
    trigger,
    whole_runs,
)
from benchmarks.compare import FULL, QUICK, Figure, Scale
from vitrap.experiment.machine import environment
from vitrap.experiment.record import to_table

PARTS: dict[str, Callable[[Scale], Iterator[Figure]]] = {
    "poisoning": poisoning.figures,
    "trigger": trigger.figures,
    "training": training.figures,
    "streaming": streaming.figures,
    "objective": objective.figures,
    "screens": screens.figures,
    "together": together.figures,
    "records": records.figures,
    "arithmetic": arithmetic.figures,
    "start_up": start_up.figures,
    "garbage": garbage.figures,
    "whole_runs": whole_runs.figures,
    "memory": memory.figures,
    "first_result": first_result.figures,
}
out, err = Console(), Console(stderr=True)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    asked = parse(words)
    scale = replace(QUICK if asked.quick else FULL, device=asked.device)
    figures: list[Figure] = []
    for name in asked.parts or PARTS:
        about = {**to_table(environment(torch.device(asked.device))), "load_before": _load()}
        err.print(f"measuring {name}")
        found = list(PARTS[name](scale))
        keep(asked.json, name, {"quick": asked.quick, "environment": about, "figures": [f.table() for f in found]})
        figures += found
    out.print(shown(figures))
    missed = [f"{f.part} {f.name}" for f in figures if f.met is False]
    verdict = f"wanted and missed: {'; '.join(missed)}" if missed else "every wanted bound is kept"
    out.print(verdict + (" (--quick: too short to rely on)" if asked.quick else ""), highlight=False)


def _load() -> float | None:
    """Processes that wait for the machine's cores, over the last minute; best near 0."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def keep(path: Path, part: str, measured: dict[str, Any]) -> None:
    """Put what was measured of a part into the file, in one step; what it says of other parts stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = {name: content.get(name) for name in PARTS if name in content} | {part: measured}
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS) + "; none: all")
    parser.add_argument("--quick", action="store_true", help="a short look, too short to rely on")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        default=Path("bench.json"),
        help="put the figures there, beside those of other parts",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; whole runs stay on the CPU")
    asked = parser.parse_args(words)
    for part in asked.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; known: {', '.join(PARTS)}")
    return asked


def shown(figures: Sequence[Figure]) -> Table:
    """The figures as a table."""
    table = Table("what", title="ours over plain, in turns in one run", title_justify="left", header_style="bold")
    for heading in ("ratio", "min - max", "n", "wanted", "kept"):
        table.add_column(heading, justify="left" if heading in ("wanted", "kept") else "right", no_wrap=True)
    for f in figures:
        ours, plain = f.seconds
        what = f"{f.part}: {f.name}\n[dim]{f.kind}, {ours:.3g} {f.unit} over {plain:.3g} {f.unit}; {f.note}[/]"
        spread = f"{min(f.ratios):.2f} - {max(f.ratios):.2f}"
        kept = {True: "yes", False: "[bold red]MISSED[/]", None: ""}[f.met]
        table.add_row(what, f"{f.ratio:.3f}", spread, str(len(f.ratios)), f.wanted, kept, end_section=True)
    return table


if __name__ == "__main__":
    main()
