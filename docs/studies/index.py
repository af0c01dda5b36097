"""The first page of the studies: `docs/make.py` makes its tables of index.toml, with every figure from a record.

`{SWEEP | TITLE | MEASURE}` in a cell becomes the figure of the sweep's case of that title, in %: with its interval for
one seed, as mean and standard deviation over several. `TITLE; KEY = VALUE` picks those of its runs with that setting.
"""

import re
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev

from vitrap.report.study.entries import Entry, Value, label, measure
from vitrap.report.study.fill_page import open_study

SPECS = Path(__file__).parents[2] / "specs" / "studies"
FIGURE = re.compile(r"\{([^|}]+) \| ([^|}]+) \| ([^|}]+)\}")
COLUMNS = {
    "says": "what the paper says or asks",
    "found": "what was found",
    "where": "where",
    "verdict": "verdict",
}


def table(paper: str) -> str:
    """The claims of a paper in Markdown."""
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))[paper]
    body = [[FIGURE.sub(lambda asked: figure(*asked.groups()), row[key]) for key in COLUMNS] for row in rows]
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(sweep: str, title: str, name: str) -> str:
    """A measure of a sweep's case."""
    title, _, setting = title.partition("; ")
    wanted = {"title": title, **(dict([setting.split(" = ")]) if setting else {})}
    chosen = (e for e in entries(sweep) if all(label(e.settings.get(key)) == value for key, value in wanted.items()))
    found = [value for entry in chosen if (value := measure(entry, name))]
    if not found:
        raise ValueError(f"no record of {sweep}.toml has {wanted} and the measure {name!r}")
    return shown(found)


@cache
def entries(sweep: str) -> tuple[Entry, ...]:
    """The runs of a sweep's spec."""
    return open_study(SPECS / f"{sweep}.toml").entries


def shown(seeds: Sequence[Value]) -> str:
    """Rates in %.

    >>> shown([Value(0.5, 0.25, 0.75, 10)]), shown([Value(0.5, n=10), Value(0.7, n=10)])
    ('50.0 % [25.0, 75.0]', '60.0 ± 14.1 %')
    """
    values = [100 * seed.value for seed in seeds]
    if len(values) > 1:
        return f"{mean(values):.1f} ± {stdev(values):.1f} %"
    low, high = ((100 * end if end is not None else values[0]) for end in (seeds[0].low, seeds[0].high))
    return f"{values[0]:.1f} % [{low:.1f}, {high:.1f}]"
