"""`vitrap table` from a shell."""

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Said
from tests.report.made import record, write
from tests.report.study.test_drawings import LINES
from tests.report.study.test_fill_page import ASR, HEAD, PAGE, REACH, SEEDS, at, study

Call = Callable[..., Said]
MARKS = "# A page\n\n<!-- asr -->\n<!-- /asr -->\n\nEnd.\n"


def test_a_page_is_collected_for_made_checked_and_found_outdated(tmp_path: Path, call: Call) -> None:
    spec = study(tmp_path, at((0.5, 0.6, 0.7)), PAGE + ASR + LINES)
    page, kept = tmp_path / "page.md", tmp_path / "kept" / "records.jsonl"
    page.write_text(MARKS, "utf-8")
    done = call("table", spec, "--collect", tmp_path / "runs")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        f"{kept}: 3 new, 0 superseded, 3 of the sweep not run",
        f"{page}: made anew (asr)",
        f"{tmp_path / 'a.png'}: made anew",
    ]
    assert (
        f"| 0.1 | 60.00 ± 10.00 |\n| 0.2 | not run |\n\nMean ± standard deviation over 3 seeds; {REACH}\n<!-- /asr -->"
        in (page.read_text("utf-8"))
    )
    done = call("table", spec, "--check")
    assert (done.code, done.out) == (0, f"{page}: up to date\n{tmp_path / 'a.png'}: up to date\n")
    page.write_text(page.read_text("utf-8").replace("60.00", "61.00"), "utf-8")
    kept.write_text("\n".join(kept.read_text("utf-8").splitlines()[1:]), "utf-8")
    (tmp_path / "a.png").write_bytes(b"")
    done = call("table", spec, "--check")
    assert (done.code, done.err) == (1, "")
    assert done.out.splitlines() == [
        f"{page}: outdated (asr); make it with vitrap table {spec}",
        f"{tmp_path / 'a.png'}: outdated; make it with vitrap table {spec}",
    ]
    assert (tmp_path / "a.png").read_bytes() == b""


def test_without_a_page_tables_are_printed_and_a_damaged_record_named(tmp_path: Path, call: Call) -> None:
    spec = study(tmp_path, at((0.5,)))
    (write(tmp_path / "runs", record(number=7)) / "record.json").write_text("{", "utf-8")
    done = call("table", spec, "--records", tmp_path / "runs")
    assert done.code == 0
    assert "| 0.1 | 50.00 [48.00, 52.00] (1 of 3 seeds) |" in done.out
    line, count = done.err.splitlines()
    assert "is skipped: it is damaged" in line
    assert count == "vitrap: 1 skipped"


def test_other_records_are_printed_and_the_page_stays(tmp_path: Path, call: Call) -> None:
    spec = study(tmp_path, at((0.5,)), PAGE + ASR + LINES)
    done = call("table", spec, "--records", tmp_path / "runs")
    assert (done.code, done.err) == (0, "")
    assert "50.00 [48.00, 52.00]" in done.out
    assert not (tmp_path / "page.md").exists()
    assert not (tmp_path / "a.png").exists()


def test_mistakes_are_one_line(tmp_path: Path, call: Call) -> None:
    spec = study(tmp_path, [], "")
    no_page = tmp_path / "no_page.toml"
    no_page.write_text(HEAD + SEEDS + ASR, "utf-8")
    run = tmp_path / "run.toml"
    run.write_text(HEAD, "utf-8")
    for words, said in (
        ((spec,), "add a [[table]] or a [[figure]]"),
        ((no_page,), "has no page.records"),
        ((no_page, "--records", tmp_path / "none"), "are not there"),
        ((no_page, "--collect", tmp_path / "runs"), "has no page.records"),
        ((no_page, "--check", "--collect", tmp_path / "runs"), "exclude each other"),
        ((run,), "has no [grid]"),
        ((tmp_path / "none.toml",), "cannot be read"),
    ):
        done = call("table", *words)
        assert (done.code, done.out) == (2, ""), words
        (line,) = done.err.splitlines()
        assert said in line
