"""Rows of screens have a rate only where their held-out images give a threshold."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.made import rate, record, screen, to_record, to_row
from vitrap.experiment.defence_rows import RATES_BY_FPR, ScreenRow
from vitrap.experiment.record import to_table
from vitrap.report.frame import of_row


def row(n_threshold: int, fprs: list[str]) -> ScreenRow:
    tables = {name: {fpr: rate(0.5) for fpr in fprs} for name in RATES_BY_FPR}
    made = to_row({**screen(), **tables, "n_threshold": n_threshold})
    assert isinstance(made, ScreenRow)
    return made


@given(st.integers(0, 300), st.lists(st.integers(1, 99), min_size=1, unique=True))
def test_a_rate_is_there_if_one_held_out_image_is_that_share(n: int, percents: list[int]) -> None:
    made = row(n, [f"{percent / 100:.2f}" for percent in percents])
    for percent in percents:
        fpr = f"{percent / 100:.2f}"
        there = [getattr(made, name)[fpr] is not None for name in RATES_BY_FPR]
        assert there == [n * percent >= 100] * len(there)
        assert (fpr in made.unresolved) == (not there[0])


@pytest.mark.parametrize("n", [0, 1, 19, 20, 99, 100])
def test_a_row_is_written_and_read_as_it_is(n: int) -> None:
    made = row(n, ["0.01", "0.05", "0.10"])
    table = json.loads(json.dumps(to_table(made)))
    assert to_row(table) == made
    assert ("unresolved" in table) == (n < 100)
    # Measures without a value are no lines of the table of records.
    names = {name for name, *_ in of_row(made)}
    assert ("tpr_at_fpr.0.05" in names, "tpr_at_fpr.0.01" in names) == (n >= 20, n >= 100)
    assert "n_threshold" in names


@pytest.mark.parametrize("fpr", ["", "a", "0", "1", "-0.1", "nan", "inf", "1e-400", "1e999"])
def test_what_is_no_false_positive_rate_is_a_damaged_record(fpr: str) -> None:
    rates = {"tpr_at_fpr": {fpr: rate(0.5)}, "fpr_on_test": {fpr: rate(0.5)}}
    with pytest.raises(ValueError, match="is damaged"):
        to_record(record(defences=[{**screen(), **rates}]))


@pytest.mark.parametrize("name", ["fpr_on_test", "tpr_at_fpr_on_hits", "fpr_on_clean_model"])
@pytest.mark.parametrize("rates", [{}, {"0.05": None}, {"0.10": rate(0.5)}])
def test_a_rate_that_is_missing_is_a_damaged_record(name: str, rates: dict[str, object]) -> None:
    broken = {**screen(), "tpr_at_fpr": {"0.05": rate(0.5), "0.10": rate(0.5)}, name: rates}
    with pytest.raises(ValueError, match="is damaged .* has no rate for"):
        to_record(record(defences=[broken]))


@pytest.mark.parametrize("name", ["tied_at_fpr", "fpr_on_test", "fpr_on_clean_model"])
def test_a_rate_for_another_false_positive_rate_is_not_dropped_without_a_word(name: str) -> None:
    row = screen()
    broken = {**row, name: {**row["tpr_at_fpr"], "0.2": rate(0.5)}}
    with pytest.raises(ValueError, match=f"is damaged .*{name} has a rate for '0.2', and tpr_at_fpr has none"):
        to_record(record(defences=[broken]))
