"""What is written beside the code agrees with it: docs, claims and specs."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from vitrap import registry
from vitrap.experiment.answers import ANSWERS
from vitrap.experiment.checksums import CHECKSUMS
from vitrap.experiment.record import Record, to_table
from vitrap.experiment.run import run
from vitrap.experiment.spec import load_spec
from vitrap.experiment.store import LOCKS
from vitrap.metrics.values import Centre, Rate, Stealth
from vitrap.sweeps.grid import load_sweep

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
SPECS = sorted((ROOT / "specs").rglob("*.toml"))
STUDIES = sorted((ROOT / "specs" / "studies").glob("*.toml"))
CLAIMS = sorted((ROOT / "src" / "vitrap" / "report" / "claims").glob("*.toml"))

SUMMARIES = {"Rate": {f.name for f in fields(Rate)}, "Centre": {f.name for f in fields(Centre)}}
FREE = {"contents",   # what is in them, spec or attack decides
    "spec", "attack", "models.victim.overrides", "models.surrogate.overrides", "curves.victim", "curves.twin",
    "curves.surrogate", "defences",
}  # fmt: skip
NEWER = {  # keys of rows that records of older vitraps lack
    "version", "screened", "scores", "suspected_classes", "suspected_classes_clean_model", "by_class",
    "by_class_clean_model", "tied_at_fpr", "no_backdoor", "unresolved",
}  # fmt: skip
CLAIM = {"measure", "value", "unit", "data", "model", "setting", "source", "where", "note"}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


SOME = {"contents", "last", "data.passed_over"}
"""Keys of some records alone: of specs that name a path, abridged ones, and of image folders with other files."""


def first_column(text: str) -> list[str]:
    """What stands in backticks at the start of each row of the tables."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def paths(table: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """The dotted paths of a record, down to rates, centres and plain values."""
    for key, value in table.items():
        path = f"{place}{key}"
        if isinstance(value, dict) and path not in FREE and set(value) not in SUMMARIES.values():
            yield from paths(value, f"{path}.")
        else:
            yield path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    """The shortest run that has every stage, and the folder of runs."""
    out = tmp_path_factory.mktemp("runs")
    spec = load_spec(None, ["recipe.epochs=1", "model.depth=1", "model.embed_dim=16"])
    return run(spec, out, device="cpu"), out


def test_record_page_lists_the_keys_of_a_record(finished: tuple[Record, Path]):
    text = (DOCS / "record.md").read_text("utf-8")
    before, _, after = text.partition("## Defences\n")  # rows of defences have keys of their own
    listed = first_column(before + after.partition("## Schema\n")[2])
    sums = {f"{name}.{key}" for name, keys in SUMMARIES.items() for key in keys}
    files = {name for name in listed if name.endswith((".json", ".png", ".safetensors", ".npy", ".txt", CHECKSUMS))}
    assert set(listed) - files == set(paths(to_table(finished[0]))) | sums | SOME


def test_record_page_lists_the_fields_of_record_and_stealth():
    listed = first_column((DOCS / "record.md").read_text("utf-8"))
    assert {f.name for f in fields(Record)} <= {path.partition(".")[0] for path in listed}
    assert {f"victim.stealth.{f.name}" for f in fields(Stealth)} <= set(listed)


def test_record_page_lists_files_and_metadata(finished: tuple[Record, Path]):
    text = (DOCS / "record.md").read_text("utf-8")
    files = [path for path in finished[1].rglob("*") if path.is_file()]
    keys = set()
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                keys |= {(path.name, key) for key in file.metadata()}
    assert {path.name for path in files if path.parent.name not in (ANSWERS, LOCKS)} <= set(first_column(text))
    assert keys == set(re.findall(r"^\| `([^`]+\.safetensors)` \| `([^`]+)` \|", text, re.MULTILINE))


def test_files_with_a_backdoor_say_so(finished: tuple[Record, Path]):
    folder = finished[1] / f"{finished[0].name}-{finished[0].hash}"
    for name in ("model.safetensors", "trigger.safetensors"):
        with safe_open(folder / name, "np") as file:  # as docs/responsible-use.md reads it
            about = json.loads(file.metadata()["vitrap"])
        assert about["backdoor"] is True
        assert about["attack"] == "ageb"
        assert "backdoor" in about["warning"]


def test_every_dependency_is_explained():
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(one for extra in extras for one in extra)]
    names = {re.match(r"[\w.-]+", one)[0] for one in wanted}
    assert set(first_column((DOCS / "dependencies.md").read_text("utf-8"))) == names


def test_architecture_page_has_the_layers_of_the_imports():
    text = (DOCS / "architecture.md").read_text("utf-8").partition("## Layers\n")[2].partition("\n## ")[0]
    listed = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]
    contract = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    assert listed == [re.findall(r"\w+", layer) for layer in contract["layers"] if "__main__" not in layer]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    relative = [t for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in relative if not (page.parent / t.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *sorted((DOCS / "studies").glob("*.md"))], ids=lambda page: page.name)
def test_specs_that_a_page_names_are_there(page: Path):
    named = re.findall(r"\bspecs/[\w/.-]+\.toml", page.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_spec_loads_and_states_claim_cost_and_command(path: Path):
    load_sweep(path) if path in STUDIES else load_spec(path)
    opening = re.match(r"(?:#.*\n)*", path.read_text("utf-8"))[0]
    missing = [word for word in ("Claim", "Cost", "Command", path.relative_to(ROOT).as_posix()) if word not in opening]
    assert missing == []


def test_every_attack_has_its_claims():
    assert [path.stem for path in CLAIMS] == registry.names("attacks")


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_claims_are_whole(path: Path):
    table = tomllib.loads(path.read_text("utf-8"))
    assert set(table) == {"attack", "paper", "arxiv", "code", "claim"}
    assert table["attack"] == path.stem
    assert table["arxiv"] == registry.get("attacks", path.stem).card.arxiv
    documented = first_column((DOCS / "record.md").read_text("utf-8"))
    for claim in table["claim"]:
        assert set(claim) == CLAIM
        assert f"victim.{claim['measure']}" in documented
        assert isinstance(claim["value"], int | float)
        assert claim["source"] in {"paper", "code"}
        assert all(claim[key] for key in CLAIM - {"value", "note"})


def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    short = ["recipe.epochs=1", "model.depth=1", "model.embed_dim=16"]
    monkeypatch.setattr(
        "vitrap.load_spec", lambda path, overrides: load_spec(path, [*overrides, *short]), raising=False
    )
    monkeypatch.chdir(tmp_path)
    exec(code[1], {})
    printed = capsys.readouterr().out
    assert re.match(r"ASR \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\], n = \d+\ntensor\(\[", printed)


def test_the_example_of_the_readme_takes_any_model(capsys: pytest.CaptureFixture[str]):
    code = re.search(r"<!-- any model -->\n```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) <= 10
    exec(code[1], {})
    assert re.match(r"tensor\(\[.*\]\)\n(True|False) \d\n$", capsys.readouterr().out)


def keys_of_rows() -> dict[str, set[str]]:
    """The keys that docs/record.md names for every row, and for those of each kind."""
    text = (DOCS / "record.md").read_text("utf-8").partition("## Defences\n")[2].partition("### Scores")[0]
    parts = dict(
        zip(("every", "screen", "repair", "filter", "judgement"), text.split("| key of a row |")[1:], strict=True)
    )
    return {
        kind: {
            name for row in re.findall(r"^\| (`.*?`) \|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
        }
        for kind, part in parts.items()
    }


def test_record_page_lists_every_key_of_every_kind_of_row():
    listed = keys_of_rows()
    rows = [
        row
        for line in (ROOT / "results" / "defences" / "records.jsonl").read_text("utf-8").splitlines()
        for row in json.loads(line)["defences"]
    ]
    assert {row["kind"] for row in rows} == set(listed) - {"every"}
    for row in rows:
        assert set(row) | NEWER == listed["every"] | listed[row["kind"]] | NEWER, row["name"]
        assert set(row) <= listed["every"] | listed[row["kind"]], row["name"]


def test_the_matrix_has_no_hole():
    """Whatever defence it has, it has against every one of its attacks; a new method need not be in it."""
    lines = (ROOT / "results" / "defences" / "records.jsonl").read_text("utf-8").splitlines()
    tried = [{row["name"] for row in record["defences"]} for record in map(json.loads, lines) if record["seed"] == 0]
    assert all(names == tried[0] for names in tried)
    assert tried[0] <= set(registry.names("defences"))
