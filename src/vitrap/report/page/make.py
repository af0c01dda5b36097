"""The report: one page that holds all it needs, and asks no network for anything."""

import base64
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from vitrap.experiment.records import Loaded
from vitrap.report.page import figures
from vitrap.report.page.claims import UNKNOWN, beside, read_papers
from vitrap.report.page.details import to_detail
from vitrap.report.page.embed import Picture, embed
from vitrap.report.page.heat import to_heat
from vitrap.report.page.summary import Run, over_seeds, text, to_runs

TEMPLATES = Path(__file__).with_name("templates")
PICTURES = "pictures.png"
BYTES = 3_000_000
"""What the page is kept under, but for its pictures."""
PICTURED = 60
"""Runs up to which their pictures are part of the page."""
PACK = 25
"""Sections that are packed together."""
BESIDE = 12
"""Runs that are listed beside a claim."""
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Page:
    """The report, and what it leaves out."""

    content: bytes
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Sections:
    """The inside of each run's section, and how it goes into the page.

    Attributes:
        bodies: HTML, one a run.
        packed: the same in packs, as base64 of zlib; empty where the page holds the bodies as they are.
    """

    bodies: tuple[str, ...]
    packed: tuple[str, ...]


def make_page(loaded: Loaded, title: str, pictures: bool = True, progress: Progress = lambda done, whole: None) -> Page:
    """The report of all records that were found.

    Args:
        loaded: records, failures, and what was passed over.
        title: what the page calls the place that they were found in.
        pictures: whether runs' pictures are part of it.
        progress: told how many of the runs are done.
    """
    runs = to_runs(loaded.records)
    drawn = [run for run in runs if pictures and run.place.is_dir() and (run.place / PICTURES).exists()]
    found, notes = _pictures(drawn, progress) if len(runs) <= PICTURED else ({}, [])
    if drawn and len(runs) > PICTURED:
        notes = [f"pictures are left out: there are {len(runs)} runs, and they are shown for up to {PICTURED}"]
    held = sum(len(picture.address) for picture in found.values())
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
    found, notes = {}, []
    for done, run in enumerate(runs, 1):
        file = run.place / PICTURES
        try:
            found[run.anchor] = embed(file)
        except ValueError as error:
            notes.append(f"{str(file)!r} is left out: {error}")
        progress(done, len(runs))
    return found, notes


def _sections(runs: Sequence[Run], pictures: Mapping[str, Picture], packed: bool, curves: bool) -> Sections:
    template = _template("run.html")
    bodies = tuple(
        _clean(template.render(detail=to_detail(run, curves), picture=pictures.get(run.anchor))) for run in runs
    )
    return Sections(bodies, tuple(_packs(bodies)) if packed else ())


def _packs(bodies: Sequence[str]) -> Iterator[str]:
    for start in range(0, len(bodies), PACK):
        content = json.dumps(bodies[start : start + PACK], ensure_ascii=False).encode()
        yield base64.b64encode(zlib.compress(content, 9)).decode()


def _draw(loaded: Loaded, runs: Sequence[Run], sections: Sections, title: str, notes: Sequence[str]) -> bytes:
    style, script = (_source(name) for name in ("page.css", "page.js"))
    html = _template("page.html").render(
        title=title,
        notes=notes,
        skipped=loaded.skipped,
        failures=loaded.failures,
        runs=runs,
        counts={key: _count(runs, key) for key in ("cda", "asr")},
        attacks=Counter(run.attack for run in runs),
        data=Counter(run.data for run in runs),
        spreads=over_seeds(runs),
        scatter=figures.to_scatter(runs),
        papers=[
            (paper, [(claim, beside(claim, paper.attack, runs)) for claim in paper.claims]) for paper in read_papers()
        ],
        heat=to_heat(runs),
        sections=sections,
        pack=PACK,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return _clean(html).encode()


def _count(runs: Sequence[Run], key: str) -> str:
    """Of how many images a rate is, over all runs."""
    counts = [getattr(run.victim, key).n for run in runs]
    if not counts:
        return "0"
    low = min(counts)
    high = max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


@cache
def _template(name: str) -> Template:
    room = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.filters |= {"text": text}
    room.globals |= {
        "BESIDE": BESIDE,
        "UNKNOWN": UNKNOWN,
        "CHART": (figures.CHART_WIDTH, figures.CHART_HEIGHT),
        "PLOT": (figures.WIDTH, figures.HEIGHT, figures.LEFT, figures.RIGHT, figures.TOP, figures.BOTTOM),
        "ROLES": figures.ROLES,
    }
    return room.get_template(name)


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    """What the page's policy knows its own style and script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _clean(html: str) -> str:
    """HTML without characters that no page can hold; a record may have them."""
    return CONTROLS.sub("\ufffd", html)
