"""`make_page`: makes the report, one HTML page that contains all it needs and loads nothing from a network."""

import base64
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from vitrap.errors import UserError
from vitrap.experiment.records import Loaded
from vitrap.printable import printable
from vitrap.report.page import figures
from vitrap.report.page.claims import UNKNOWN, comparable_runs, read_papers
from vitrap.report.page.details import to_detail
from vitrap.report.page.embed import Picture, embed
from vitrap.report.page.heat import to_heat
from vitrap.report.page.summary import Run, over_seeds, text, to_runs
from vitrap.report.tables import counts

TEMPLATES = Path(__file__).with_name("templates")
PICTURES = "pictures.png"
BYTES = 3_000_000
"""Greatest size of the page in bytes, without its pictures."""
PICTURED = 60
"""Greatest number of runs whose pictures are part of the page."""
PACK = 25
"""Number of sections that are compressed together."""
BESIDE = 12
"""Greatest number of runs that are listed beside a claim."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Page:
    """The report as HTML, and notes on what it leaves out."""

    content: bytes
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Sections:
    """The sections of all runs.

    Attributes:
        bodies: the HTML of each run's section.
        packed: the same in packs, zlib in base64, which the page unpacks when a section is opened; empty where the page
            contains the bodies as they are.
    """

    bodies: tuple[str, ...]
    packed: tuple[str, ...]


def make_page(loaded: Loaded, title: str, pictures: bool = True, progress: Progress = lambda done, whole: None) -> Page:
    """Make the report of all records that were read.

    Args:
        loaded: records, failures, and files that could not be read.
        title: the title of the page: the name of the folder.
        pictures: whether pictures of runs are part of the page.
        progress: called with how many pictures are done, and of how many.
    """
    runs = to_runs(loaded.records)
    # Embed the pictures, unless there are too many runs.
    drawn = [run for run in runs if pictures and run.place.is_dir() and (run.place / PICTURES).exists()]
    found, notes = _pictures(drawn, progress) if len(runs) <= PICTURED else ({}, [])
    if drawn and len(runs) > PICTURED:
        notes = [f"pictures are left out: there are {len(runs)} runs, and they are shown for up to {PICTURED}"]
    held = sum(len(picture.address) for picture in found.values())
    # Make the page in the plainest form that is small enough: sections as they are, packed, or packed without curves.
    content, kept = b"", notes
    for packed, curves in ((False, True), (True, True), (True, False)):
        sections = _sections(runs, found, packed, curves)
        if not packed and sum(map(len, sections.bodies)) - held > BYTES:
            continue
        kept = [*notes, *([] if curves else ["curves are left out, so that the page stays small"])]
        content = _draw(loaded, runs, sections, title, kept)
        if len(content) - held <= BYTES:
            return Page(content, tuple(kept))
    size = f"the page has {len(content) / 1e6:.1f} MB: too many runs for {BYTES / 1e6:g} MB, report on part of them"
    return Page(content, (*kept, size))


def _pictures(runs: Sequence[Run], progress: Progress) -> tuple[dict[str, Picture], list[str]]:
    """The picture of each run by its anchor, and a note on each that cannot be read."""
    found: dict[str, Picture] = {}
    notes: list[str] = []
    for done, run in enumerate(runs, 1):
        file = run.place / PICTURES
        try:
            found[run.anchor] = embed(file)
        except UserError as error:
            notes.append(f"a picture is left out: {error}")
        progress(done, len(runs))
    return found, notes


def _sections(runs: Sequence[Run], pictures: Mapping[str, Picture], packed: bool, curves: bool) -> Sections:
    """Render the section of each run."""
    template = _template("run.html")
    bodies = tuple(
        printable(template.render(detail=to_detail(run, curves), picture=pictures.get(run.anchor))) for run in runs
    )
    return Sections(bodies, tuple(_packs(bodies)) if packed else ())


def _packs(bodies: Sequence[str]) -> Iterator[str]:
    """Compress sections, `PACK` at a time."""
    for start in range(0, len(bodies), PACK):
        content = json.dumps(bodies[start : start + PACK], ensure_ascii=False).encode()
        yield base64.b64encode(zlib.compress(content, 9)).decode()


def _draw(loaded: Loaded, runs: Sequence[Run], sections: Sections, title: str, notes: Sequence[str]) -> bytes:
    """Render the page."""
    style = _source("page.css")
    script = _source("page.js")
    html = _template("page.html").render(
        title=title,
        notes=notes,
        skipped=loaded.skipped,
        failures=loaded.failures,
        runs=runs,
        counts={key: counts([getattr(run.victim, key).n for run in runs] or [0]) for key in ("cda", "asr")},
        attacks=Counter(run.attack for run in runs),
        data=Counter(run.data for run in runs),
        spreads=over_seeds(runs),
        scatter=figures.to_scatter(runs),
        papers=[
            (paper, [(claim, comparable_runs(claim, paper.attack, runs)) for claim in paper.claims])
            for paper in read_papers()
        ],
        heat=to_heat(runs),
        sections=sections,
        pack=PACK,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return printable(html).encode()


@cache
def _template(name: str) -> Template:
    """A template, with the filters and constants that templates use."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": text}
    environment.globals |= {
        "BESIDE": BESIDE,
        "UNKNOWN": UNKNOWN,
        "CHART": (figures.CHART_WIDTH, figures.CHART_HEIGHT),
        "PLOT": (figures.WIDTH, figures.HEIGHT, figures.LEFT, figures.RIGHT, figures.TOP, figures.BOTTOM),
        "ROLES": figures.ROLES,
    }
    return environment.get_template(name)


def _source(name: str) -> str:
    """The text of a file of the templates' folder."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    """The hash of a style or a script, by which the page's content security policy allows it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
