"""`vitrap report` from a shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import vitrap
from tests.report.made import failure, record, write


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for i in range(2):
        write(folder, record(number=i, seed=i))
    return folder


def test_a_page_is_made_and_named(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = vitrap("report", runs, "-o", page)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"report of 2 runs: {page}\n", "")
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "runs"]


def test_damaged_and_newer_records_are_named_and_the_rest_shown(runs: Path, tmp_path: Path) -> None:
    (write(runs, record(number=7)) / "record.json").write_text("{", "utf-8")
    write(runs, record(number=8) | {"schema": 99})
    write(runs, failure("lost", "no memory [bold]left[/]"), "failure.json")
    page = tmp_path / "report.html"
    done = vitrap("report", runs, "-o", page)
    assert (done.returncode, done.stdout) == (0, f"report of 2 runs: {page}\n")
    damaged, newer, count = done.stderr.splitlines()
    assert damaged.startswith("vitrap: ")
    assert "is skipped: it is damaged" in damaged
    assert "it has schema 99" in newer
    assert count == "vitrap: 2 skipped"
    text = page.read_text("utf-8")
    assert "it has schema 99" in text
    assert "no memory [bold]left[/]" in text


def test_a_page_of_failures_alone(tmp_path: Path) -> None:
    write(tmp_path / "runs", failure("lost", "no memory"), "failure.json")
    done = vitrap("report", tmp_path / "runs", "-o", tmp_path / "a.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no memory" in (tmp_path / "a.html").read_text("utf-8")


def refused(*words: object) -> str:
    done = vitrap("report", *words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("vitrap: ")
    return line


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    assert f"{str(tmp_path)!r} holds no record" in refused(tmp_path, "-o", tmp_path / "a.html")
    assert "are not there" in refused(tmp_path / "none", "-o", tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    "place", ["none/a.html", "runs", "runs/run-000000000000/record.json/a.html", "x" * 300, "null"]
)
def test_a_place_that_cannot_be_written_is_refused(runs: Path, place: str) -> None:
    (runs.parent / "null").symlink_to(os.devnull)
    line = refused(runs, "-o", runs.parent / place)
    assert "cannot be written" in line
    assert "name another with -o" in line
    assert (runs.parent / "null").is_symlink()


def test_an_earlier_page_is_replaced(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("old", "utf-8")
    assert vitrap("report", runs, "-o", page).returncode == 0
    assert "<h1>" in page.read_text("utf-8")


def test_records_in_one_file_do(runs: Path, tmp_path: Path) -> None:
    lines = [json.dumps({k: v for k, v in record(number=i).items() if k not in ("curves", "memory")}) for i in range(3)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines), "utf-8")
    done = vitrap("report", tmp_path / "records.jsonl", "-o", tmp_path / "a.html", "--no-pictures")
    assert done.stdout.startswith("report of 3 runs: ")


def test_torch_is_not_loaded(runs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from vitrap.cli.main import app\n"
        f"try: app(['report', {str(runs)!r}, '-o', {str(tmp_path / 'a.html')!r}])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
