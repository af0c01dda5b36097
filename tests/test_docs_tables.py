"""Tables and figures of README and docs are made from results/ by specs/studies, and only so."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from vitrap.experiment.records import read_records
from vitrap.report.study.entries import current_hash
from vitrap.report.study.fill_page import fill_page, open_study
from vitrap.report.study.layout import FIGURES, PageSpec, TableSpec, read_page
from vitrap.sweeps.grid import load_sweep

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
STUDIES = [
    path for path in sorted((ROOT / "specs").rglob("*.toml")) if "page" in tomllib.loads(path.read_text("utf-8"))
]
THEORY = DOCS / "studies" / "attention_diffusion.md"  # measures of no record; its own test is beside its statements
NO_RECORDS = {"dependencies.md"}
"""Pages with other numbers in their tables: seconds of a benchmark."""
FIGURE = re.compile(r"[-+]?\d+(\.\d+)?( ?%| s| dB)?( ±.*| \[.*| / .*)?")


def page_of(spec: Path) -> PageSpec:
    return read_page(load_sweep(spec), spec.parent)


def parts(text: str) -> list[str]:
    """What stands between marks, by name."""
    return re.findall(r"^<!-- ([\w -]+) -->$", text, re.MULTILINE)


def figures_by_hand(text: str) -> Iterator[str]:
    """Rows of tables outside of marks that have a cell that is a figure and nothing else."""
    for line in re.sub(
        r"(?s)^<!-- ([\w -]+) -->\n.*?<!-- /\1 -->$|```.*?```", "", text, flags=re.MULTILINE
    ).splitlines():
        if line.startswith("|") and any(map(FIGURE.fullmatch, map(str.strip, line.strip("|").split("|")))):
            yield line


@pytest.mark.parametrize("spec", STUDIES, ids=lambda spec: spec.stem)
def test_page_and_figures_agree_with_the_records(spec: Path):
    study = open_study(spec)
    assert study.skipped == ()
    assert [str(change.file) for change in fill_page(study, write=False) if change.outdated] == []


def test_parts_that_no_sweep_makes_agree_with_registry_and_measures():
    done = subprocess.run(
        [sys.executable, str(DOCS / "make.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_every_part_has_one_maker_and_every_figure_is_in_a_part():
    makers = Counter(
        (page.file.resolve(), table.part)
        for page in map(page_of, STUDIES)
        if page.file is not None
        for table in page.tables
    )
    others = runpy.run_path(str(DOCS / "make.py"))["PARTS"]
    makers += Counter((ROOT / page, part) for page, made in others.items() for part in made)
    makers += Counter((THEORY, part) for part in ("layers", "networks"))
    code = Counter((ROOT / "README.md", part) for part in ("example", "any model"))
    there = Counter((page, part) for page in PAGES for part in parts(page.read_text("utf-8")))
    assert makers == there - code
    assert set(makers.values()) == {1}
    by_hand = {page.name: list(figures_by_hand(page.read_text("utf-8"))) for page in PAGES}
    assert {name for name, found in by_hand.items() if found} <= NO_RECORDS


@pytest.mark.parametrize(
    "row", ["| a | 90.2 |", "| a | 1 | 90.2 [89.1, 91.0] | b |", "|x|-0.1 ± 2.0|", "| 5 % |", "| 3 s |"]
)
def test_a_figure_outside_of_parts_is_found(row: str):
    assert list(figures_by_hand(f"| a |\n|---|\n{row}\n\n<!-- x -->\n| 1 |\n<!-- /x -->\n")) == [row]
    assert (
        list(figures_by_hand("| `0.05` | rate, 0 to 1 |\n| `schema` | version of this format, 1; see below |\n")) == []
    )


def test_every_record_that_is_kept_is_of_a_run_that_a_sweep_names():
    kept = {page.records for page in map(page_of, STUDIES)}
    assert kept == {file.parent for file in (ROOT / "results").glob("*/records.jsonl")}
    for place in kept:
        points = {p.spec.hash() for spec in STUDIES if page_of(spec).records == place for p in load_sweep(spec).points}
        loaded = read_records(place)
        hashes = [current_hash(found.record) for found in loaded.records]
        assert loaded.skipped == ()
        assert set(hashes) == points, place
        assert len(set(hashes)) == len(hashes), place


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A study's spec beside copies of its page, its picture and its records."""
    for folder in ("specs", "results/ageb_strength", "docs/studies", "src/vitrap/experiment"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "docs" / "pictures").mkdir()
    shutil.copy(DOCS / "pictures" / "ageb_strength.png", tmp_path / "docs" / "pictures")
    return tmp_path / "specs" / "studies" / "ageb_strength.toml"


def outdated(spec: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(c.file.name, c.parts) for c in fill_page(open_study(spec), write=False) if c.outdated]


def test_a_changed_digit_is_noticed(copy: Path):
    page = copy.parents[2] / "docs" / "studies" / "ageb_strength.md"
    assert outdated(copy) == []
    text = page.read_text("utf-8")
    page.write_text(text.replace("97.53 [95.52", "97.54 [95.52"), "utf-8")
    assert page.read_text("utf-8") != text
    assert outdated(copy) == [("ageb_strength.md", ("digits",))]
    fill_page(open_study(copy), out=copy.parents[2])
    assert page.read_text("utf-8") == text


def test_a_changed_and_a_missing_record_are_noticed(copy: Path):
    page, picture = ("ageb_strength.md", ("gtsrb",)), ("ageb_strength.png", ())
    records = copy.parents[2] / "results" / "ageb_strength" / "records.jsonl"
    *lines, last = records.read_text("utf-8").splitlines()
    changed = json.loads(last)
    changed["victim"]["asr"]["value"] += 1e-4
    records.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(changed)]), "utf-8")
    assert outdated(copy) == [page, picture]
    records.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    assert outdated(copy) == [page, picture]
    fill_page(open_study(copy), out=copy.parents[2])
    assert "| not run | not run |" in (copy.parents[2] / "docs" / "studies" / page[0]).read_text("utf-8")
    assert outdated(copy) == []


def test_the_page_of_tables_lists_every_key():
    text = (DOCS / "tables.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.MULTILINE)
    listed = {name for first, _ in rows for name in re.findall(r"`(\w+)`", first)}
    assert {field.name for field in fields(TableSpec)} <= listed
    assert set(FIGURES) <= listed
    for kind, figure in FIGURES.items():
        about = next(rest for first, rest in rows if first == f"`{kind}`")
        own = {field.name for field in fields(figure)} - {"file", "title", "where"}
        assert own <= set(re.findall(r"`(\w+)`", about)), kind
