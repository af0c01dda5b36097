"""Reading many records: what is found, what is passed over, and what is said of it."""

import json
import re
from pathlib import Path

import pytest

from tests.experiment.conftest import Runs
from vitrap.errors import UserError
from vitrap.experiment.record import SCHEMA, Record, to_table
from vitrap.experiment.records import parse, read_records


def change(out: Path, name: str, **keys: object) -> Path:
    """Put other values into the record of a run."""
    (file,) = out.glob(f"{name}-*/record.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return file


def test_a_folder_of_runs_a_run_a_file_and_lines_hold_the_same_records(copied: Path, tmp_path: Path):
    found = read_records(copied)
    assert [f.record.name for f in found.records] == ["ageb", "badnets"]
    assert [f.place.parent for f in found.records] == [copied, copied]
    assert (found.failures, found.skipped) == ((), ())
    first = found.records[0]
    assert to_table(first.record) == json.loads((first.place / "record.json").read_text())
    assert read_records(first.place).records == (first,)
    assert read_records(first.place / "record.json").records[0].record == first.record
    lines = tmp_path / "quoted" / "records.jsonl"
    lines.parent.mkdir()
    lines.write_text("".join(json.dumps(to_table(f.record)) + "\n" for f in found.records))
    assert [f.record for f in read_records(lines.parent).records] == [f.record for f in found.records]
    assert {f.place for f in read_records(lines).records} == {lines}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"schema": SCHEMA + 1}, f"it has schema {SCHEMA + 1}, this vitrap reads up to {SCHEMA}"),
        ({"victim": 3}, "it is damaged .victim"),
        ({"victim": {}}, "it is damaged .victim.cda: Field required"),
        ({"seed": "x"}, "it is damaged .seed"),
        ({"spec": {"attack": {}}}, "it is damaged .spec: Value error, data.name is missing"),
        (
            {"defences": [{"name": "strip"}]},
            "it is damaged .defences.0: Unable to extract tag using discriminator 'kind'",
        ),
    ],
)
def test_a_damaged_or_newer_record_is_named_and_the_rest_read(copied: Path, keys: dict[str, object], said: str):
    file = change(copied, "ageb", **keys)
    found = read_records(copied)
    assert [f.record.name for f in found.records] == ["badnets"]
    (line,) = found.skipped
    assert line.startswith(f"{str(file)!r} is skipped: ")
    assert re.search(said, line)
    assert "\n" not in line


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 1}', b'{"seed": NaN}'])
def test_a_file_that_is_no_record_is_passed_over(copied: Path, content: bytes):
    (file,) = copied.glob("ageb-*/record.json")
    file.write_bytes(content)
    found = read_records(copied)
    assert len(found.records) == 1
    assert len(found.skipped) == 1


def test_a_record_that_cannot_be_read_is_passed_over(copied: Path):
    (file,) = copied.glob("ageb-*/record.json")
    file.unlink()
    file.mkdir()
    found = read_records(copied)
    assert len(found.records) == 1
    assert "cannot be read (Is a directory)" in found.skipped[0]


def test_records_of_earlier_days_lack_what_came_later(copied: Path):
    (file,) = copied.glob("ageb-*/record.json")
    content = json.loads(file.read_text())
    for key in ("diagnosis", "defences", "memory", "stages", "models", "attack_version", "attention", "compiled"):
        del content[key]
    file.write_text(json.dumps(content))
    assert len(read_records(copied).records) == 2


def test_no_such_place_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere' are not there; give a folder of runs"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"xxx' are not there"):
        read_records("x" * 5000)
    assert read_records(tmp_path).records == ()


def test_a_finished_run_is_no_failure(runs: Runs):
    assert read_records(runs.out).failures == ()


@pytest.mark.parametrize("place", [(), ("victim",), ("data",), ("environment",)])
def test_a_key_that_no_field_holds_is_not_lost_in_silence(runs: Runs, place: tuple[str, ...]) -> None:
    table = to_table(runs.records["ageb"])
    part = table
    for key in place:
        part = part[key]
    part["newer"] = 1
    known = ".".join((*place, "newer"))
    with pytest.raises(ValueError, match=f"has a key '{known}' that this vitrap does not know; update vitrap"):
        parse(json.dumps(table).encode(), Record)
